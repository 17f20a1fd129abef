#!/usr/bin/env bash
# Emulated hosts on one machine: network namespaces with hostnames of their own, on a switch, behind links of a given rate. Needs root.
#
#   benchmarks/netlab.sh up N RATE [--delay MS]      make N hosts; RATE as tc writes it (100mbit, 1gbit): of each host's link, each way
#   benchmarks/netlab.sh run COMMAND [ARGUMENT …]    run COMMAND under mpirun, one rank on each host (variable NETLAB_RANKS: so many)
#   benchmarks/netlab.sh down                        end what runs there, and take the hosts away; no error when there are none
#   benchmarks/netlab.sh with N RATE [--delay MS] COMMAND …    up, run, down: nothing is left, whatever ends the command
#
# --delay: milliseconds that a packet takes from one host to another, so a ping takes twice as long. Each host's link is then a small program
# (delay_line.cpp, which needs a C++ compiler and /dev/net/tun): kernels without netem can do it too.
# Hosts control congestion by reno, which all kernels have, unless the variable NETLAB_CONGESTION names another one that the machine allows: with
# bbr collectives take a few per cent more, as it paces what each connection sends.
# Everything lives in namespaces called NETLAB-host-0 …, NETLAB-switch (variable NETLAB, default netlab), so nothing is added to the machine's own
# network. In COMMAND, gloo finds its network too (GLOO_SOCKET_IFNAME, MASTER_ADDR), and NETLAB_RATE is the rate in bits per second,
# NETLAB_DELAY the delay in milliseconds.
# Every way of ending but `kill -9` of this script takes away what it has made; after that, `down` does.
set -euo pipefail

NETLAB=${NETLAB:-netlab}
SELF=$(readlink -f "$0")
NETWORK=10.78.0

fail() {
    echo "netlab.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '/^# /s/^# \{0,1\}//p' "$SELF" | sed -n '1,7p' >&2
    exit 2
}

check_machine() {
    [ "$(id -u)" -eq 0 ] || fail "network namespaces and shaped links need root; run it as root (sudo -E)."
    local tool
    for tool in ip tc unshare; do
        command -v "$tool" >/dev/null || fail "the command '$tool' is missing: install iproute2 and util-linux."
    done
    [[ $NETLAB =~ ^[a-z][a-z0-9]{0,19}$ ]] || fail "NETLAB='$NETLAB': expected up to 20 lower-case letters and digits, a letter first."
}

# The namespaces of this lab.
namespaces() {
    ip netns list | awk -v lab="$NETLAB" '$1 == lab "-switch" || index($1, lab "-host-") == 1 { print $1 }'
}

count_hosts() {
    namespaces | grep -c -- '-host-' || true
}

# In bits per second.
bits_of() {
    local number unit
    [[ $1 =~ ^([0-9]+)(kbit|mbit|gbit)$ ]] || fail "the rate '$1' is not understood; expected for example 100mbit or 1gbit."
    number=${BASH_REMATCH[1]} unit=${BASH_REMATCH[2]}
    [ "$number" -gt 0 ] || fail "the rate '$1' is zero."
    case $unit in
        kbit) echo $((number * 1000)) ;;
        mbit) echo $((number * 1000000)) ;;
        gbit) echo $((number * 1000000000)) ;;
    esac
}

shape() { # namespace device bits
    # A burst holds a packet of TCP segmentation offload (64 KiB) and a millisecond; the queue a tenth of a second, as switches do, and 1 MB at least.
    local burst=$(($3 / 8000)) limit=$(($3 / 80))
    [ "$burst" -ge 70000 ] || burst=70000
    [ "$limit" -ge 1000000 ] || limit=1000000
    tc -n "$1" qdisc add dev "$2" root tbf rate "${3}bit" burst "$burst" limit "$limit"
}

# In DIRECTORY, which is taken away again once it runs.
build_line() { # directory
    local compiler=${CXX:-c++}
    command -v "$compiler" >/dev/null || fail "--delay needs a C++ compiler, and there is no '$compiler'; CXX names another one."
    [ -c /dev/net/tun ] || fail "--delay needs TUN/TAP, and this machine has no /dev/net/tun: load the module 'tun', or leave --delay out."
    "$compiler" -std=c++17 -O2 -o "$1/delay_line" "$(dirname "$SELF")/delay_line.cpp" || fail "delay_line.cpp could not be compiled."
}

# The ends of a host's link, 'cable' there and 'port$i' at the switch.
link_host() { # number delay-or-nothing directory
    local i=$1 ready
    if [ -z "$2" ]; then
        ip link add cable netns "$NETLAB-host-$i" type veth peer name "port$i" netns "$NETLAB-switch"
        return
    fi
    # It ends with the namespace of the switch, in which it stays.
    mkfifo "$3/ready$i"
    "$3/delay_line" "$NETLAB-host-$i" cable "$NETLAB-switch" "port$i" "$2" </dev/null >"$3/ready$i" &
    disown
    read -r ready <"$3/ready$i" || fail "the link of host $i could not be made."
    [ "$ready" = ready ] || fail "the link of host $i could not be made: $ready"
    ip -n "$NETLAB-switch" link set "port$i" alias "delay $2"
}

# All hosts, in the file that is /etc/hosts on this one: Horovod's gloo looks its own name up, and is killed where there is none.
name_hosts() { # number, how many
    local host
    mkdir -p "/etc/netns/$NETLAB-host-$1"
    {
        cat /etc/hosts
        for ((host = 0; host < $2; host++)); do echo "$NETWORK.$((host + 1)) host-$host"; done
    } >"/etc/netns/$NETLAB-host-$1/hosts"
}

up() {
    local delay='' directory=''
    if [ "${3-}" = --delay ]; then
        [ $# -eq 4 ] || usage
        [[ $4 =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "the delay is '$4'; expected milliseconds, for example 25."
        delay=$4
        set -- "$1" "$2"
    fi
    [ $# -eq 2 ] || usage
    [[ $1 =~ ^[0-9]+$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 200 ] || fail "the number of hosts is '$1'; expected 1 to 200."
    local n=$1 bits i
    bits=$(bits_of "$2")
    check_machine
    [ -z "$(namespaces)" ] || fail "the namespaces $(namespaces | xargs) are there already; 'netlab.sh down' takes them away, NETLAB=… chooses other names."
    directory=$(mktemp -d)
    # shellcheck disable=SC2064  # expanded now
    trap "trap - EXIT; rm -rf '$directory'; echo 'netlab.sh: the hosts could not be made; taking away what was.' >&2; down" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    [ -z "$delay" ] || build_line "$directory"
    ip netns add "$NETLAB-switch"
    ip -n "$NETLAB-switch" link add switch type bridge
    ip -n "$NETLAB-switch" link set switch up
    for ((i = 0; i < n; i++)); do
        ip netns add "$NETLAB-host-$i"
        name_hosts "$i" "$n"
        link_host "$i" "$delay" "$directory"
        ip -n "$NETLAB-switch" link set "port$i" master switch
        ip -n "$NETLAB-host-$i" addr add "$NETWORK.$((i + 1))/24" dev cable
        ip -n "$NETLAB-host-$i" link set lo up
        # shellcheck disable=SC2016 # the shell that is started expands it
        ip netns exec "$NETLAB-host-$i" sh -c 'echo "$1" >/proc/sys/net/ipv4/tcp_congestion_control' - "${NETLAB_CONGESTION:-reno}" 2>/dev/null ||
            fail "the congestion control '${NETLAB_CONGESTION:-reno}' is not to be had; allowed are: $(cat /proc/sys/net/ipv4/tcp_allowed_congestion_control)."
        shape "$NETLAB-host-$i" cable "$bits"
        shape "$NETLAB-switch" "port$i" "$bits"
        ip -n "$NETLAB-switch" link set "port$i" up
        ip -n "$NETLAB-host-$i" link set cable up
    done
    rm -rf "$directory"
    trap - EXIT INT TERM HUP
}

rate() {
    tc -n "$NETLAB-host-0" -j qdisc show dev cable | sed -n 's/.*"rate":\([0-9]*\).*/\1/p' | awk '{ printf "%.0f\n", 8 * $1 }'
}

# Milliseconds from one host to another, or 0.
delay() {
    ip -n "$NETLAB-switch" -d link show port0 | awk '$1 == "alias" { found = $3 } END { print found + 0 }'
}

# Everything that runs on the hosts; with the argument 'links' the links too.
end_processes() {
    local name tries pids signal=-TERM
    for ((tries = 0; tries < 100; tries++)); do
        pids=$(for name in $(namespaces); do
            [[ $name == *-switch && ${1-} != links ]] || ip netns pids "$name" || true
        done)
        [ -n "$pids" ] || return 0
        [ "$tries" -lt 10 ] || signal=-KILL
        # shellcheck disable=SC2086  # one argument for each
        kill $signal $pids 2>/dev/null || true
        sleep 0.1
    done
    fail "these processes cannot be killed: $pids"
}

down() {
    check_machine
    end_processes links
    local name
    for name in $(namespaces); do
        ip netns del "$name"
        rm -rf "/etc/netns/$name"
    done
}

on_host() { # number command…
    local i=$1
    shift
    # shellcheck disable=SC2016  # expanded there
    exec ip netns exec "$NETLAB-host-$i" unshare -u sh -c 'hostname "$0"; exec "$@"' "host-$i" "$@"
}

run() { run_and end_processes "$@"; }

with() {
    [ $# -ge 3 ] || usage
    if [ "$3" = --delay ]; then
        [ $# -ge 5 ] || usage
        up "$1" "$2" "$3" "$4"
        shift 4
    else
        up "$1" "$2"
        shift 2
    fi
    run_and down "$@"
}

run_and() { # what follows, whatever comes; command…
    # shellcheck disable=SC2064  # expanded now
    trap "trap - EXIT; $1" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    shift
    [ $# -ge 1 ] || usage
    check_machine
    local n ranks hosts launcher name status=0
    n=$(count_hosts)
    [ "$n" -ge 1 ] || fail "there are no hosts; 'netlab.sh up N RATE' makes them."
    ranks=${NETLAB_RANKS:-1}
    [[ $ranks =~ ^[1-9][0-9]?$ ]] || fail "NETLAB_RANKS='$ranks': expected how many ranks run on each host, 1 to 99."
    hosts=$(seq -s, -f "host-%g:$ranks" 0 $((n - 1)))
    NETLAB_RATE=$(rate) NETLAB_DELAY=$(delay)
    export NETLAB NETLAB_RATE NETLAB_DELAY GLOO_SOCKET_IFNAME=cable MASTER_ADDR=$NETWORK.1
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # gloo finds no names for addresses here, and says so
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # shellcheck source=../launch/memory.sh
    . "$(dirname "$SELF")/../launch/memory.sh"
    keep_freed_memory # as the launch scripts do
    launcher=(mpirun -n "$((n * ranks))" -H "$hosts" --map-by slot --bind-to none --prtemca plm_ssh_agent "$SELF agent" --prtemca prte_if_include "$NETWORK.0/24")
    launcher+=(--mca pml ob1 --mca btl "self,sm,tcp" --mca btl_tcp_if_include "$NETWORK.0/24")
    for name in PATH PYTHONPATH OMP_NUM_THREADS MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ TORCH_CPP_LOG_LEVEL GLOO_SOCKET_IFNAME MASTER_ADDR NETLAB_RATE NETLAB_DELAY; do
        [ -z "${!name+set}" ] || launcher+=(-x "$name")
    done
    (on_host 0 "${launcher[@]}" "$@") &
    wait $! || status=$?
    exit "$status"
}

# Open MPI starts its daemons with this, in place of ssh: [options] host command…
agent() {
    while [[ ${1-} == -* ]]; do shift; done
    local host=$1
    shift
    on_host "${host#host-}" sh -c "$*"
}

case ${1-} in
    up | run | down | with | agent) "$@" ;;
    *) usage ;;
esac
