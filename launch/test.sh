#!/usr/bin/env bash
# Run every check of this repository: linters, types, the documentation's site, and all tests on real ranks (Open MPI and Horovod, both installed into
# the environment).
#
#   launch/test.sh [--full] [arguments of pytest]        needs: Python 3.10 or newer, a C++ compiler (Horovod); the first time also a network
#
#   --full       also the tests that take minutes
#   VENV=… PYTHON=… MPI=system TORCH_SPEC=…       as in launch/quickstart.sh
#
# Every part runs, also after a failure; the table at the end says which failed, and then the exit status is 1. Tests of one process run on all cores,
# those that start ranks one after the other. Horovod is built beside the former, and tests that mostly wait (for a time limit, Slurm, a network that
# is cut) run beside all of these, those of scripts once Horovod is there; what they print comes when it is waited for. Each part ends with its
# slowest tests. It takes some 15 minutes on 2 cores, and the first time longer, to build Horovod.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h|--help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

setup_venv dev
cd "$REPO"
export HVD_ECSGD_REQUIRE_ALL=1   # a missing mpirun or Horovod fails the tests that need it; it does not skip them
export PYTHONUNBUFFERED=1

table='' failed=0
enter() {   # $1: name  $2: passed or FAILED  $3: seconds
    [ "$2" = passed ] || failed=1
    table+=$(printf '%-40s %-8s %6d' "$1" "$2" "$3")$'\n'
}
part() {   # $1: name  then: the command
    local name=$1 start=$SECONDS result=passed
    shift
    say "$name"
    guarded "$@" || result=FAILED
    enter "$name" "$result" $((SECONDS - start))
}

# The same in two: `start_guarded kept NAME COMMAND…` begins, and `show NAME GROUP` waits for the end and says what came of it.
KEPT=$(mktemp -d)
trap 'rm -rf "$KEPT"' EXIT
keeps() { printf '%s' "$KEPT/${1//\//-}"; }   # the file of a part, whose name may be a path
# shellcheck disable=SC2329  # start_guarded calls it
kept() {
    local name=$1 start=$SECONDS result=passed
    shift
    "$@" >"$(keeps "$name")" 2>&1 || result=FAILED
    printf '%s %s' "$result" $((SECONDS - start)) >"$(keeps "$name, result")"
}
show() {
    local result=FAILED seconds=0
    say "$1"
    finish_guarded "$2" || true
    if [ -f "$(keeps "$1, result")" ]; then read -r result seconds <"$(keeps "$1, result")" || true; fi
    cat "$(keeps "$1")"
    enter "$1" "$result" "$seconds"
}

ALONE=(tests/convergence tests/unit tests/property)   # the longest test is not the last one
FAILING=(tests/mpi/test_{failure,cut_link,names,together,ulfm,async_ulfm,soak}.py)   # they wait, mostly for ranks that die, and need no Horovod
SCRIPTS=(tests/launch tests/horovod/test_together.py)   # they wait, and need it
if [ "$#" -gt 0 ]; then NOTHING_FITS=5; fi   # pytest's status when the arguments leave no test of a part
# shellcheck disable=SC2329  # so it does this, for the parts
tests() { python -m pytest --durations=25 --durations-min=1 "$@" || [ $? = "${NOTHING_FITS:-}" ]; }

HOROVOD='launch/install_horovod.sh' FAIL='pytest, failures' WAIT='pytest, scripts'
start_guarded kept "$HOROVOD" launch/install_horovod.sh
HOROVOD_STARTED=$STARTED
# shellcheck disable=SC2329  # start_guarded calls it
after_horovod() {
    until [ -f "$(keeps "$HOROVOD, result")" ] || ! kill -0 "$HOROVOD_STARTED" 2>/dev/null; do sleep 0.2; done
    "$@"
}
# Ranks that wait leave the cores to what works, so they run beside all that follows. Those that work come one after the other: beside others each
# takes as much longer as the others take.
start_guarded kept "$FAIL" tests "${FAILING[@]}" "$@"
FAIL_STARTED=$STARTED
start_guarded after_horovod kept "$WAIT" tests "${SCRIPTS[@]}" "$@"
WAIT_STARTED=$STARTED
part 'ruff check .' ruff check .
part 'ruff format --check .' ruff format --check .
part 'mypy --strict hvd_ecsgd mpi_backend' mypy --strict hvd_ecsgd mpi_backend
# Not --quiet, with which warnings are no errors (MkDocs 1.6).
part 'mkdocs build --strict' env NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$KEPT/site"   # not where another run writes one
part 'shellcheck' shellcheck launch/*.sh launch/slurm/*.sbatch launch/shim/mpirun benchmarks/netlab.sh .ci/run

part 'pytest, one process' tests "${ALONE[@]}" -n auto --maxprocesses 8 "$@"
show "$HOROVOD" "$HOROVOD_STARTED"
part 'pytest, ranks' tests tests "${ALONE[@]/#/--ignore=}" "${FAILING[@]/#/--ignore=}" "${SCRIPTS[@]/#/--ignore=}" "$@"
show "$FAIL" "$FAIL_STARTED"
show "$WAIT" "$WAIT_STARTED"

enter all "$([ "$failed" = 0 ] && echo passed || echo FAILED)" "$SECONDS"
printf '\n%-40s %-8s %6s\n%s' part result seconds "$table"
exit "$failed"
