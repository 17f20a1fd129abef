"""One rank fails: the job ends on all ranks soon and says which rank it was. program_failure.py does the failing."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import pytest

from tests.ranks import LIMIT, SOON, mpirun, require_mpirun, run_job

PROGRAM = Path(__file__).parent / "program_failure.py"
# By whoever is first: the watchdog, or the coordinator, which is told after a second that rank 0 waits.
LEFT = r"gradients of 'weight', 'bias': rank 1 shut down without it|rank 1 left \(by the end of the script, .*\) without a collective"


def job(
    how: str, where: str, *options: str, env: dict[str, str] | None = None, expect_failure: bool = True, n: int = 2, timeout: float = LIMIT
) -> str:
    """What the ranks printed; `run_job` fails the test when processes are left behind, or when the job had to be ended."""
    require_mpirun()
    launcher = ["mpirun", *options, "-n", str(n)]
    status = None if "continuous" in options else expect_failure  # then it is a matter of timing: 0 after some aborts
    with tempfile.NamedTemporaryFile("r") as when:
        output = run_job(launcher, PROGRAM, (how, where, when.name), timeout=timeout, env=env, expect_failure=status, bare=True)
        if expect_failure:
            failed = when.read()
            assert failed and time.time() - float(failed) < SOON, f"failed at {failed or 'no time'}: {output}"
            assert "got through" not in output, output
    return output


@pytest.mark.parametrize(
    ("how", "where", "message"),
    [
        ("kill", "step", r"rank 1 (.|\n)*signal 9"),
        ("raise", "step", r"uncaught exception on rank 1 of 2(.|\n)*RuntimeError: on purpose"),
        ("exit", "step", LEFT),
        ("early", "function", r"rank 1 shut down without it"),
        ("finalize", "function", r"rank 1 shut down without it"),
        ("early", "join", r"rank 1 shut down without joining"),
        ("caught", "function", r"communication failed on rank 1, and other ranks have not shut down: MemoryError\('on purpose'\)"),
        ("start", "function", r"uncaught exception on rank 1 of 2(.|\n)*communication failed: MemoryError\('on purpose'\)"),
        ("landing", "function", r"uncaught exception on rank 1 of 2(.|\n)*communication failed: MemoryError\('on purpose'\)"),
        ("interrupt", "step", r"uncaught exception on rank 1 of 2(.|\n)*KeyboardInterrupt"),
        ("interrupt", "function", r"uncaught exception on rank 1 of 2(.|\n)*KeyboardInterrupt"),
        ("ctrl-c", "step", r"\A(?!(.|\n)*(Traceback|mpi_backend:))"),  # cleanly
        (
            "stall",
            "step",
            r"step 1 of DistributedOptimizer 0, the gradients of 'weight', 'bias': submitted by rank 0, but not by rank 1 within 2 s",
        ),
    ],
)
def test_the_job_ends_on_all_ranks_and_names_the_one_that_failed(how: str, where: str, message: str) -> None:
    env = {"MPI_BACKEND_THREAD": "0"} if (how, where) == ("interrupt", "step") else None  # the main thread waits in the transport itself
    env = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"} if how == "stall" else env
    output = job(how, where, env=env)
    assert re.search(message, output), output


def test_a_dead_rank_is_noticed_without_the_launcher() -> None:
    """`continuous` tells Open MPI's launcher to go on when a rank dies, as srun does; the control is that without the watchdog it does, for ever."""
    options = ("--runtime-options", "continuous")
    output = job("kill", "step", *options)
    assert re.search(r"rank 0 .*: ending, because rank 1 \(process \d+ on .*\) ended without shutting down: killed, crashed", output), output
    with pytest.raises(AssertionError, match="ended by its time limit"):
        job("kill", "step", *options, env={"MPI_BACKEND_WATCHDOG": "0"}, timeout=12)


def test_slow_ranks_are_left_alone() -> None:
    """Twice as long as the timeout: asleep (and its watchdog killed), computing with the interpreter lock held, and stopped as in a debugger.
    On a busy machine a watchdog takes a second or two to start again."""
    output = job("slow", "step", env={"MPI_BACKEND_WATCHDOG_TIMEOUT": "4"}, expect_failure=False)
    assert output.count("well") == 2, output
    assert "rank 1: its watchdog ended (status -9) and is started again" in output, output
    assert "ending" not in output, output


@pytest.mark.parametrize("thread", ["0", "1"])
def test_a_script_may_handle_an_interrupt_itself(thread: str) -> None:
    assert job("handled", "step", env={"MPI_BACKEND_THREAD": thread}, expect_failure=False).count("handled") == 1


def test_a_wrong_timeout_is_refused() -> None:
    output = run_job([], "import mpi_backend\nmpi_backend.init()", env={"MPI_BACKEND_WATCHDOG_TIMEOUT": "soon"}, expect_failure=True)
    assert "MPI_BACKEND_WATCHDOG_TIMEOUT is 'soon'; expected a number of seconds, at least 1." in output


START = """
import os, sys
from mpi4py import MPI
import mpi_backend as hvd
rank = MPI.COMM_WORLD.Get_rank()
os.environ.update({} if rank == 0 else SETTINGS)
hvd.init(**({} if rank == 0 else OPTIONS))
print("got through")
"""


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"HOROVOD_FUSION_THRESHOLD": "4M"}, {}, "HOROVOD_FUSION_THRESHOLD is '4M'; expected a number of bytes, 0 for no fusion."),
        ({}, {"process_sets": [[0, 1]]}, "init: process_sets is [[0, 1]]; expected a list of ProcessSet"),
        ({}, {"comm": [7]}, "init: comm is [7]; expected"),
        ({"HOROVOD_TIMELINE": "/no/such/folder/trace.json"}, {}, "No such file or directory: '/no/such/folder/trace.json"),
    ],
)
def test_what_is_wrong_on_one_rank_at_the_start_ends_all(settings: dict[str, str], options: dict[str, object], message: str) -> None:
    """They would wait for it in init, or at the end in MPI. What can be told before is told to all: rank 0 may be on the screen alone."""
    program = START.replace("SETTINGS", repr(settings)).replace("OPTIONS", repr(options))
    output = mpirun(2, program, expect_failure=True, bare=True)
    assert message in output, output
    assert re.search(r"uncaught exception on rank [01] of 2 \(process \d+ on ", output), output
    assert "got through" not in output or "HOROVOD_TIMELINE" in settings, output


CAUGHT = """
import os
from mpi4py import MPI
import mpi_backend as hvd
os.environ["HOROVOD_FUSION_THRESHOLD"] = ("", "4M")[MPI.COMM_WORLD.Get_rank()]
try:
    hvd.init()
except ValueError as error:
    print("told:", error)
os.environ["HOROVOD_FUSION_THRESHOLD"] = ""
hvd.init()
print("sum", float(hvd.allreduce(__import__("torch").ones(1), op=hvd.Sum)))
"""


def test_all_ranks_are_told_of_a_wrong_setting_and_may_start_again() -> None:
    output = mpirun(2, CAUGHT, bare=True)
    assert "told: init() has failed on rank 1: HOROVOD_FUSION_THRESHOLD is '4M'" in output, output
    assert output.count("told: ") == 2 and output.count("sum 2.0") == 2, output


FORK = """
import os, sys
import torch
import mpi_backend as hvd
hvd.init()
child = os.fork()
if child == 0:
    try:
        hvd.allreduce(torch.ones(1))
    except ValueError as error:
        print("told:", error, flush=True)
    try:
        hvd.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    except ValueError as error:
        print("told:", error, flush=True)
    if WHAT == "raise":
        raise RuntimeError(f"in a child of rank {hvd.rank()}")
    sys.exit(3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print("child ended with", status, "sum", float(hvd.allreduce(torch.ones(1), op=hvd.Sum)))
"""


@pytest.mark.parametrize(("what", "status"), [("exit", 3), ("raise", 1)])
def test_what_becomes_of_a_forked_process_is_its_own_matter(what: str, status: int) -> None:
    output = mpirun(2, FORK.replace("WHAT", repr(what)), bare=True)
    assert output.count(f"child ended with {status} sum 2.0") == 2, output
    assert output.count("cannot communicate; only the rank itself can") == 4, output
