"""MPICH beside the MPI of the environment, for tests of what differs between them: a wheel from PyPI in a folder of the tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import REPO

__all__ = ["installed_mpich"]


@contextlib.contextmanager
def installed_mpich(prefix: Path, path: str) -> Iterator[dict[str, str]]:
    """What a job needs in its environment, of which PATH is `path` otherwise, to use it: mpi4py loads the MPI that it is told.

    Skips the test, and says why, where it cannot be had.
    """
    import mpi4py  # which loads no MPI yet

    if not list(Path(mpi4py.__file__).parent.glob("MPI.mpich.*")):
        pytest.skip("this mpi4py was built for one MPI: it cannot load MPICH too")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", "--retries=1", "--only-binary=:all:"]
    pip += ["--no-deps", "--ignore-installed", f"--prefix={prefix}", "-c", str(REPO / "launch" / "constraints.txt"), "mpich"]
    try:
        whole = subprocess.run(pip, capture_output=True, timeout=90).returncode == 0
    except subprocess.TimeoutExpired:  # what it has put there by then may be a part of it
        whole = False
    if not whole:
        pytest.skip("MPICH cannot be installed from PyPI: no network, no pip, or no wheel for this machine")
    before = set(Path("/dev/shm").glob("mpich_shm_*"))
    yield {"PATH": f"{prefix}/bin:{path}", "MPI4PY_LIBMPI": str(prefix / "lib" / "libmpi.so.12")}
    for left in set(Path("/dev/shm").glob("mpich_shm_*")) - before:  # by ranks that failed; MPICH knows no other folder
        left.unlink(missing_ok=True)
