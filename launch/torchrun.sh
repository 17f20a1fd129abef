#!/usr/bin/env bash
# Start a training script on several ranks with torchrun: torch_backend, or DDP's hook. No MPI needed.
#
#   launch/torchrun.sh [options] [--] COMMAND [ARGUMENT…]
#   launch/torchrun.sh -n 4 python examples/digits.py --backend torch --method detached
#   launch/torchrun.sh -n 2 -N 2 -e node1 python train.py            # the same on node1 and on node2
#   launch/torchrun.sh -N 1:4 -e node1 -r 3 python train.py          # goes on with the machines that are left
#
# Option, or environment variable: meaning (default)
#   -n, --ranks N             RANKS          number of ranks of this machine (2; where several machines meet, 1)
#   -N, --nodes N|MIN:MAX     NODES          number of machines; this script is started on each of them (1)
#   -e, --endpoint HOST[:PORT]  ENDPOINT     where they meet: one of them, and a free port of it (needed with NODES; port 29400)
#       --id ID               ID             what the job is called there, the same on all machines (hvd-ecsgd)
#   -r, --max-restarts N      MAX_RESTARTS   how often all ranks are started again after one has failed, or a machine came or went (0)
#   -i, --interface NAME      INTERFACE      network interface of Gloo and NCCL (that of the route to the endpoint)
#   -t, --threads N           OMP_NUM_THREADS   threads of each rank (cores ÷ ranks of this machine)
#       --torchrun-args ARGS  TORCHRUN_ARGS  more arguments for torchrun, split at blanks (none)
#       --dry-run             DRY_RUN=1      print the command on standard output and do not run it (0)
#   -h, --help                               this text
#
# Also: VENV as in launch/common.sh. Ranks read nothing from standard input, and keep memory that they free (launch/memory.sh).
# A script that is started again goes on from its last checkpoint if it keeps one, as `examples/digits.py --backend torch --checkpoint folder` does: with
# as many ranks to the bit, with fewer or more by the rules of docs/reliability.md, "Another number of workers".
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RANKS=${RANKS:-} NODES=${NODES:-1} ENDPOINT=${ENDPOINT:-} ID=${ID:-hvd-ecsgd} MAX_RESTARTS=${MAX_RESTARTS:-0} INTERFACE=${INTERFACE:-}
TORCHRUN_ARGS=${TORCHRUN_ARGS:-} DRY_RUN=${DRY_RUN:-0}
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
        -N|--nodes) NODES=${2-} ;;
        -e|--endpoint) ENDPOINT=${2-} ;;
        --id) ID=${2-} ;;
        -r|--max-restarts) MAX_RESTARTS=${2-} ;;
        -i|--interface) INTERFACE=${2-} ;;
        -t|--threads) OMP_NUM_THREADS=${2-} ;;
        --torchrun-args) TORCHRUN_ARGS=${2-} ;;
        *) die "unknown option '$1'." "See $0 --help; the training script's own options come after it." ;;
    esac
    need_value "$@"
    shift 2
done
[ "$#" -gt 0 ] || die "no command to run." "E.g. $0 -n 2 python examples/digits.py --backend torch"
switch "$DRY_RUN" DRY_RUN
if [ -z "$RANKS" ]; then if [ -n "$ENDPOINT" ]; then RANKS=1; else RANKS=2; fi; fi
whole_number "$RANKS" "the number of ranks"
whole_number "${NODES%%:*}" "the number of machines"
whole_number "${NODES##*:}" "the number of machines"
[ "$MAX_RESTARTS" = 0 ] || whole_number "$MAX_RESTARTS" "the number of restarts (or 0)"
if [ "$NODES" != 1 ] && [ -z "$ENDPOINT" ]; then
    die "$NODES machines need a place to meet." "Start this on each of them with the same --endpoint HOST:PORT, the name of one of them and a free port."
fi

use_environment
[ "$DRY_RUN" = 1 ] || python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    die "torch is not installed in $(command -v python)." "Activate your environment, or make one in $VENV: launch/quickstart.sh does."
say_versions
HOST_NAMES=() HOST_SLOTS=() SLOTS=$RANKS
if [ -n "$ENDPOINT" ]; then
    case $ENDPOINT in *:*) ;; *) ENDPOINT=$ENDPOINT:29400 ;; esac
    HOST_NAMES=("${ENDPOINT%:*}") HOST_SLOTS=("$RANKS")
    say "$RANKS ranks on this machine, $(uname -n), of $NODES that meet at $ENDPOINT"
else
    say_rank_map
fi
choose_interface
if [ -n "$INTERFACE" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then   # a task is all ranks of a machine
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK > RANKS ? SLURM_CPUS_PER_TASK / RANKS : 1))}
fi
choose_threads
keep_freed_memory

command=(python -m torch.distributed.run --nproc-per-node "$RANKS" --max-restarts "$MAX_RESTARTS")
if [ -n "$ENDPOINT" ]; then command+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$ENDPOINT" --rdzv-id "$ID")
else command+=(--standalone); fi
# Left to itself torchrun takes a machine that has the endpoint's name for the one that hosts it.
if [ -n "$ENDPOINT" ] && [ -n "${SLURM_NODEID:-}" ]; then command+=(--rdzv-conf "is_host=$((SLURM_NODEID == 0))"); fi
read -r -a more <<<"$TORCHRUN_ARGS"
launch "${command[@]}" ${more[@]+"${more[@]}"} --no-python "$@"
