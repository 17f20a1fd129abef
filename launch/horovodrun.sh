#!/usr/bin/env bash
# Start a training script on several ranks with Horovod's launcher, over Gloo (no MPI needed) or over Open MPI 4 or 5 or MPICH.
#
#   launch/horovodrun.sh [options] [--] COMMAND [ARGUMENT…]
#   launch/horovodrun.sh -n 2 python examples/digits.py --backend horovod
#   launch/horovodrun.sh -c mpi -H node1:2,node2:2 python train.py
#
# Option, or environment variable: meaning (default)
#   -n, --ranks N             RANKS          number of ranks (slots of the hosts, else 2)
#   -H, --hosts LIST          HOSTS          name[:slots],…, where the job is started by ssh (this machine)
#   -c, --controller gloo|mpi CONTROLLER     what the ranks negotiate with (gloo)
#   -i, --interface NAME      INTERFACE      network interface (that of the route to the first other host)
#   -t, --threads N           OMP_NUM_THREADS   threads of each rank (cores ÷ ranks of this machine)
#       --ssh-port N          SSH_PORT       port of the hosts' ssh (22)
#       --start-timeout S     START_TIMEOUT  seconds in which all ranks must have started (30)
#       --fusion-mb N         FUSION_MB      Horovod's fusion buffer in MiB (128)
#       --cycle-ms N          CYCLE_MS       Horovod's cycle time in milliseconds (1)
#       --timeline FILE       TIMELINE       write Horovod's timeline there (none)
#       --log-level LEVEL     LOG_LEVEL      TRACE, DEBUG, INFO, WARNING, ERROR or FATAL (WARNING)
#       --mpi-args ARGS       MPI_ARGS       more arguments for mpirun, with the controller mpi (none)
#       --dry-run             DRY_RUN=1      print the command on standard output and do not run it (0)
#   -h, --help                               this text
#
# Also: MPI_FLAVOUR as in launch/mpirun.sh, VENV and MPI as in launch/common.sh. Horovod gives all ranks the whole environment.
# Ranks read nothing from standard input, and keep memory that they free (launch/memory.sh).
# With Open MPI 5 and the controller mpi, launch/shim is put before PATH: Horovod 0.28.1 writes Open MPI's options with one dash, which 5 rejects.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RANKS=${RANKS:-} HOSTS=${HOSTS:-} CONTROLLER=${CONTROLLER:-gloo} INTERFACE=${INTERFACE:-} SSH_PORT=${SSH_PORT:-} START_TIMEOUT=${START_TIMEOUT:-30}
FUSION_MB=${FUSION_MB:-} CYCLE_MS=${CYCLE_MS:-} TIMELINE=${TIMELINE:-} LOG_LEVEL=${LOG_LEVEL:-} MPI_ARGS=${MPI_ARGS:-} DRY_RUN=${DRY_RUN:-0}
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
        -c|--controller) CONTROLLER=${2-} ;;
        -i|--interface) INTERFACE=${2-} ;;
        -t|--threads) OMP_NUM_THREADS=${2-} ;;
        --ssh-port) SSH_PORT=${2-} ;;
        --start-timeout) START_TIMEOUT=${2-} ;;
        --fusion-mb) FUSION_MB=${2-} ;;
        --cycle-ms) CYCLE_MS=${2-} ;;
        --timeline) TIMELINE=${2-} ;;
        --log-level) LOG_LEVEL=${2-} ;;
        --mpi-args) MPI_ARGS=${2-} ;;
        *) die "unknown option '$1'." "See $0 --help; the training script's own options come after it." ;;
    esac
    need_value "$@"
    shift 2
done
[ "$#" -gt 0 ] || die "no command to run." "E.g. $0 -n 2 python examples/digits.py --backend horovod"
switch "$DRY_RUN" DRY_RUN
whole_number "$START_TIMEOUT" "the time to start in seconds"
if [ -n "$SSH_PORT" ]; then whole_number "$SSH_PORT" "the port of ssh"; fi
case $CONTROLLER in gloo|mpi) ;; *) die "CONTROLLER='$CONTROLLER' is not known." "It is gloo or mpi." ;; esac

use_environment
command -v horovodrun >/dev/null 2>&1 ||
    die "no horovodrun on PATH." "launch/install_horovod.sh builds Horovod (about 4 minutes). Without Horovod: launch/mpirun.sh and mpi_backend."
read_hosts
if [ -z "$RANKS" ]; then if [ "$SLOTS" -gt 0 ]; then RANKS=$SLOTS; else RANKS=2; fi; fi
whole_number "$RANKS" "the number of ranks"
if [ "$SLOTS" -gt 0 ] && [ "$RANKS" -gt "$SLOTS" ]; then
    die "$RANKS ranks do not fit the $SLOTS slots of HOSTS='$HOSTS'." "Give the hosts more slots: name:slots."
fi

command=(horovodrun "--$CONTROLLER" -np "$RANKS" --start-timeout "$START_TIMEOUT")
if [ "$CONTROLLER" = mpi ]; then
    detect_mpi
    say "$MPI_VERSION ($(command -v mpirun))"
    if [ "$FLAVOUR" = openmpi5 ]; then export PATH=$REPO/launch/shim:$PATH; fi
else
    say "Gloo"
fi
say_versions
say_rank_map
choose_interface
choose_threads
keep_freed_memory
if [ -n "$HOSTS" ]; then command+=(-H "$HOSTS"); fi
if [ -n "$INTERFACE" ]; then
    export MPI_BACKEND_INTERFACE=$INTERFACE
    command+=(--network-interfaces "$INTERFACE")
fi
if [ -n "$SSH_PORT" ]; then command+=(--ssh-port "$SSH_PORT"); fi
if [ -n "$FUSION_MB" ]; then command+=(--fusion-threshold-mb "$FUSION_MB"); fi
if [ -n "$CYCLE_MS" ]; then command+=(--cycle-time-ms "$CYCLE_MS"); fi
if [ -n "$TIMELINE" ]; then command+=(--timeline-filename "$TIMELINE"); fi
if [ -n "$LOG_LEVEL" ]; then command+=(--log-level "$LOG_LEVEL"); fi
if [ -n "$MPI_ARGS" ] && [ "$CONTROLLER" = mpi ]; then command+=("--mpi-args=$MPI_ARGS"); fi
launch "${command[@]}" "$@"
