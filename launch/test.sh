#!/usr/bin/env bash
# Run every check of this repository: linters, types, and all tests on real ranks (Open MPI and Horovod, both installed into the environment).
#
#   launch/test.sh [--full] [arguments of pytest]        needs: Python 3.10 or newer, a C++ compiler (Horovod); the first time also a network
#
#   --full       also the tests that take minutes
#   VENV=… PYTHON=… MPI=system TORCH_SPEC=…       as in launch/quickstart.sh
#
# Every part runs, also after a failure; the table at the end says which failed, and then the exit status is 1. Tests of one process run on all cores,
# those that start ranks one after the other; each part ends with its slowest tests. The first time takes about 20 minutes on 2 cores, 4 of them to
# build Horovod; later that is there.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h|--help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

setup_venv dev
cd "$REPO"
export HVD_ECSGD_REQUIRE_ALL=1   # a missing mpirun or Horovod fails the tests that need it; it does not skip them
export PYTHONUNBUFFERED=1

table='' failed=0
part() {   # $1: name  then: the command
    local name=$1 start=$SECONDS result=passed
    shift
    say "$name"
    guarded "$@" || { result=FAILED; failed=1; }
    table+=$(printf '%-40s %-8s %6d' "$name" "$result" $((SECONDS - start)))$'\n'
}

ALONE=(tests/unit tests/property tests/convergence)
if [ "$#" -gt 0 ]; then NOTHING_FITS=5; fi   # pytest's status when the arguments leave no test of a part
# shellcheck disable=SC2329  # `part` calls it
tests() { python -m pytest --durations=25 --durations-min=1 "$@" || [ $? = "${NOTHING_FITS:-}" ]; }

part 'launch/install_horovod.sh' launch/install_horovod.sh
part 'ruff check .' ruff check .
part 'ruff format --check .' ruff format --check .
part 'mypy --strict hvd_ecsgd mpi_backend' mypy --strict hvd_ecsgd mpi_backend
part 'shellcheck' shellcheck launch/*.sh launch/slurm/*.sbatch launch/shim/mpirun benchmarks/netlab.sh .ci/run
part 'pytest, one process' tests "${ALONE[@]}" -n auto --maxprocesses 8 "$@"
part 'pytest, ranks' tests tests "${ALONE[@]/#/--ignore=}" "$@"

printf '\n%-40s %-8s %6s\n%s' part result seconds "$table"
exit "$failed"
