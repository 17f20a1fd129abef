"""Commands with a time limit, of which no process is left, whatever they start; and the environment that ranks of one machine need."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "environment_of_ranks", "run"]

_MARK = "HVD_ECSGD_DOCTOR"  # in the environment of every process of a command; its value names the command
_GRACE = 3.0  # seconds in which a launcher that is asked to end may end its ranks
_GONE = 10.0  # seconds in which killed processes vanish


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """None where the time limit ended it."""
    output: str
    """Both streams together."""
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line that is not empty, shortened."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip(" \t-=*")]
        return lines[-1][:200] if lines else "it printed nothing"


def environment_of_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what small jobs on one machine need, where it is not set: as launch/common.sh exports it, which says why."""
    defaults = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_btl": "^ofi",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": "/tmp",
    }
    if os.geteuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = {**defaults, **environment}
    if len(result["TMPDIR"]) > 50:  # Open MPI's sockets lie below it, and a socket's name is short
        result["TMPDIR"] = "/tmp"
    result["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), result.get("PATH", os.defpath)])
    return result


def run(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> Ended:
    """Run `command` for at most `limit` seconds. Whatever happens, Ctrl-C included, none of its processes outlives the call.

    Raises OSError where it cannot be started.
    """
    mark, start = uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryFile() as output:  # a pipe would be open for as long as the last descendant is there
        job = subprocess.Popen(
            command, env={**environment, _MARK: mark}, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        status: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = job.wait(limit)
        finally:
            _end(job, mark)
        seconds = time.monotonic() - start
        output.seek(0)
        return Ended(status, output.read().decode(errors="replace"), seconds)


def _end(job: subprocess.Popen[bytes], mark: str) -> None:
    """Ask the launcher, which ends its ranks in its own way; then kill all that is left, also what left its session."""
    if job.poll() is None:
        job.terminate()
        with suppress(subprocess.TimeoutExpired):
            job.wait(_GRACE)
    deadline = time.monotonic() + _GONE
    while (left := _processes(mark)) and time.monotonic() < deadline:
        for process in left:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    with suppress(OSError):
        os.killpg(job.pid, signal.SIGKILL)  # where there is no /proc
    with suppress(subprocess.TimeoutExpired):
        job.wait(_GRACE)


def _processes(mark: str) -> list[int]:
    """The living processes whose environment has the mark."""
    sign, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if sign in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
