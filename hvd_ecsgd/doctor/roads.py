"""The ways to start ranks: which are there, and whether two ranks train on each."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from .findings import Finding, State
from .look import INSTALL_HOROVOD, INSTALL_MPI
from .processes import Ended, environment_of_ranks, run
from .trial import PASSED

__all__ = ["ROADS", "Road", "try_road"]


@dataclass(frozen=True)
class Road:
    """A launcher and a backend."""

    name: str
    backend: str
    launcher: str
    """What must be on PATH."""
    package: str
    """What must be importable."""
    command: Callable[[str, int], Sequence[str]]
    """The launcher's path, and a time limit in seconds → the command up to the ranks' own."""
    absent: str
    """The remedy where launcher or package is missing."""


def _mpirun(launcher: str, limit: int) -> Sequence[str]:
    return [launcher, "-n", "2"]


def _horovodrun(launcher: str, limit: int) -> Sequence[str]:
    return [launcher, "--gloo", "--start-timeout", str(limit), "-np", "2"]


def _torchrun(launcher: str, limit: int) -> Sequence[str]:
    return [launcher, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


ROADS: Mapping[str, Road] = {
    "mpi": Road("mpi_backend under mpirun", "mpi_backend", "mpirun", "mpi4py", _mpirun, INSTALL_MPI),
    "horovod": Road("Horovod under horovodrun", "horovod.torch", "horovodrun", "horovod", _horovodrun, INSTALL_HOROVOD),
    "torch": Road(
        "torch.distributed under torchrun", "hvd_ecsgd.torch_backend", sys.executable, "torch.distributed", _torchrun, "another build of torch"
    ),
}

_INTERFACE = (
    "often ranks try an interface by which they cannot reach each other (a VPN's, Docker's, one behind a firewall): name one that is up, above, by "
)
_HANGS = {
    "mpi": _INTERFACE + "launch/mpirun.sh -i NAME, or mpirun --mca btl_tcp_if_include NAME; --mca pml ob1 --mca btl self,sm rules the network out",
    "horovod": _INTERFACE + "launch/horovodrun.sh -i NAME, or horovodrun --network-interfaces NAME",
    "torch": _INTERFACE + "GLOO_SOCKET_IFNAME=NAME",
}
# Road ("" for all), what the output has, what to do; the first that fits.
_FAILURES = (
    ("", r"this one sees 1\b", "mpirun and mpi4py belong to different MPIs: put the bin folder of mpi4py's first on PATH, or reinstall mpi4py"),
    ("mpi", r"not enough slots", "mpirun --map-by slot:oversubscribe (Open MPI 5) or --oversubscribe (4); launch/mpirun.sh does that"),
    ("mpi", r"run as root|as root", "do not run as root, or set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"),
    ("", r"No space left|Permission denied", "free or choose another folder for temporary files: TMPDIR"),
    ("horovod", r"undefined symbol|cannot open shared object", f"Horovod was built for another torch or MPI; {INSTALL_HOROVOD}"),
    ("", r"ModuleNotFoundError|ImportError", "install what is named in the environment that the ranks run in"),
)


def try_road(which: str, limit: float, environment: Mapping[str, str]) -> Finding:
    """Train two ranks for a step, in at most `limit` seconds, after which the job is ended. `environment` must have a PATH."""
    road = ROADS[which]
    launcher = shutil.which(road.launcher, path=environment["PATH"])
    missing = [f"{road.launcher} is not on PATH"] if launcher is None else []
    if not _importable(road.package):
        missing.append(f"{road.package} is not installed")
    found = Finding("roads", road.name, " and ".join(missing), State.ABSENT, road.absent)
    if launcher is None or missing:
        return found
    command = [*road.command(launcher, max(1, round(limit))), sys.executable, "-m", "hvd_ecsgd.doctor.trial", road.backend]
    try:
        ended = run(command, limit, environment_of_ranks(environment))
    except OSError as error:
        return replace(found, what=f"{launcher} cannot be started: {error}", state=State.BROKEN)
    passed = len(set(re.findall(rf"{PASSED} (\d)", ended.output)))
    if ended.status == 0 and passed == 2:
        return Finding("roads", road.name, f"two ranks trained, {ended.seconds:.1f} s")
    if ended.status is None:
        what = f"did not end within {limit:g} s, and was ended; its last words: {ended.last_line}"
        return replace(found, what=what, state=State.BROKEN, remedy=f"{_HANGS[which]}. On a slow machine give more time: --limit")
    return replace(found, what=f"failed (status {ended.status}): {_reason(ended)}", state=State.BROKEN, remedy=_remedy(which, ended))


def _importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


def _reason(ended: Ended) -> str:
    """The line that names an error, or else the last one."""
    said = [line.strip() for line in ended.output.splitlines() if re.search(r"this one sees|\w+Error\b|[Ee]rror:|after a step weights", line)]
    return said[-1][:200] if said else ended.last_line


def _remedy(which: str, ended: Ended) -> str:
    for road, pattern, remedy in _FAILURES:
        if road in ("", which) and re.search(pattern, ended.output):
            return remedy
    return (
        f"see the whole output: {' '.join(ROADS[which].command(ROADS[which].launcher, 30))} python -m hvd_ecsgd.doctor.trial {ROADS[which].backend}"
    )
