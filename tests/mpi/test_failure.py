"""One rank fails: the job ends on all ranks within 10 seconds and says which rank it was. program_failure.py does the failing."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import pytest

from tests.ranks import mpirun, require_mpirun, run_job

PROGRAM = Path(__file__).parent / "program_failure.py"
LIMIT = 10.0  # seconds from the failure to the end of the last process
# By whoever is first: the watchdog, or the coordinator, which is told after a second that rank 0 waits.
LEFT = r"gradients of 'weight', 'bias': rank 1 shut down without it|rank 1 left \(by the end of the script, .*\) without a collective"


def job(how: str, where: str, *options: str, env: dict[str, str] | None = None, expect_failure: bool = True, n: int = 2, timeout: float = 90) -> str:
    """What the ranks printed; `run_job` fails the test when processes are left behind, or when the job had to be ended."""
    require_mpirun()
    launcher = ["mpirun", *options, "-n", str(n)]
    status = None if "continuous" in options else expect_failure  # then it is a matter of timing: 0 after some aborts
    with tempfile.NamedTemporaryFile("r") as when:
        output = run_job(launcher, PROGRAM, (how, where, when.name), timeout=timeout, env=env, expect_failure=status, bare=True)
        if expect_failure:
            failed = when.read()
            assert failed and time.time() - float(failed) < LIMIT, f"failed at {failed or 'no time'}: {output}"
            assert "got through" not in output, output
    return output


@pytest.mark.parametrize(
    ("how", "where", "message"),
    [
        ("kill", "step", r"rank 1 (.|\n)*signal 9"),
        ("raise", "step", r"uncaught exception on rank 1 of 2(.|\n)*RuntimeError: on purpose"),
        ("exit", "step", LEFT),
        ("early", "function", r"rank 1 shut down without it"),
        ("early", "join", r"rank 1 shut down without joining"),
        ("caught", "function", r"communication failed on rank 1, and other ranks have not shut down: MemoryError\('on purpose'\)"),
        ("start", "function", r"uncaught exception on rank 1 of 2(.|\n)*communication failed: MemoryError\('on purpose'\)"),
        ("landing", "function", r"uncaught exception on rank 1 of 2(.|\n)*communication failed: MemoryError\('on purpose'\)"),
        ("interrupt", "step", r"rank 1 was interrupted \(SIGINT\) while it waited"),
        ("interrupt", "function", r"uncaught exception on rank 1 of 2(.|\n)*KeyboardInterrupt"),
        ("ctrl-c", "step", r""),
        (
            "stall",
            "step",
            r"step 1 of DistributedOptimizer 0, the gradients of 'weight', 'bias': submitted by rank 0, but not by rank 1 within 2 s",
        ),
    ],
)
def test_the_job_ends_on_all_ranks_and_names_the_one_that_failed(how: str, where: str, message: str) -> None:
    # Without the threads the main one waits inside of MPI, where Python sees no signal.
    env = {"MPI_BACKEND_THREAD": "0"} if message.startswith("rank 1 was interrupted") else None
    env = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"} if how == "stall" else env
    output = job(how, where, env=env)
    assert re.search(message, output), output


def test_a_dead_rank_is_noticed_without_the_launcher() -> None:
    """`continuous` tells Open MPI's launcher to go on when a rank dies, as srun does; the control is that without the watchdog it does, for ever."""
    options = ("--runtime-options", "continuous")
    output = job("kill", "step", *options)
    assert re.search(r"rank 0 .*: ending, because rank 1 \(process \d+ on .*\) ended without shutting down: killed, crashed", output), output
    with pytest.raises(AssertionError, match="ended by its time limit"):
        job("kill", "step", *options, env={"MPI_BACKEND_WATCHDOG": "0"}, timeout=18)


def test_slow_ranks_are_left_alone() -> None:
    """Twice as long as the timeout: asleep (and its watchdog killed), computing with the interpreter lock held, and stopped as in a debugger."""
    output = job("slow", "step", env={"MPI_BACKEND_WATCHDOG_TIMEOUT": "2"}, expect_failure=False, timeout=120)
    assert output.count("well") == 2, output
    assert "rank 1: its watchdog ended (status -9) and is started again" in output, output
    assert "ending" not in output, output


@pytest.mark.parametrize("thread", ["0", "1"])
def test_a_script_may_handle_an_interrupt_itself(thread: str) -> None:
    assert job("handled", "step", env={"MPI_BACKEND_THREAD": thread}, expect_failure=False).count("handled") == 1


def test_a_wrong_timeout_is_refused() -> None:
    output = run_job([], "import mpi_backend\nmpi_backend.init()", env={"MPI_BACKEND_WATCHDOG_TIMEOUT": "soon"}, expect_failure=True)
    assert "MPI_BACKEND_WATCHDOG_TIMEOUT is 'soon'; expected a number of seconds, at least 1." in output


def test_a_wrong_setting_of_the_engine_is_refused_on_all_ranks() -> None:
    """Also on those that do not negotiate: they would wait for the one that does."""
    output = mpirun(2, "import mpi_backend\nmpi_backend.init()", env={"HOROVOD_FUSION_THRESHOLD": "4M"}, expect_failure=True, bare=True, timeout=60)
    assert "HOROVOD_FUSION_THRESHOLD is '4M'; expected a number of bytes, 0 for no fusion." in output
