"""mpi_backend under mpirun, and as a single process without it. What is checked is in the programs; each prints one line from rank 0."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mpich import installed_mpich
from tests.ranks import REPO, SOON, mpirun, rank_environment, require_mpirun, run_job

HERE = Path(__file__).parent


def concluded(output: str) -> bool:
    """Rank 0 said so, and no rank failed on its way out. What else MPI or Python says there comes in any order."""
    return re.search(r"^ok \d+$", output, re.MULTILINE) is not None and "Traceback" not in output


def check_programs(names: str, output: str) -> None:
    """Each began and concluded; the last that began is the one that did not."""
    assert re.findall(r"^program (\w+)$", output, re.MULTILINE) == names.split() and "Traceback" not in output, output
    assert len(re.findall(r"^ok \d+$", output, re.MULTILINE)) == len(names.split()), output


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("names", ["transport bits flight", "functions mismatch surface state", "optimizer join"])
def test_programs(names: str, n: int) -> None:
    check_programs(names, mpirun(n, HERE / "programs.py", *names.split()))


def test_five_ranks_receive_the_same_bits() -> None:
    output = mpirun(5, HERE / "program_bits.py")
    assert concluded(output), output


def test_nodes_are_workers() -> None:
    assert concluded(mpirun(4, HERE / "program_nodes.py", env={"MPI_BACKEND_NODES": "2"}))


def test_an_algorithm_that_differs_between_ranks_or_is_unknown_is_an_error_on_all() -> None:
    code = """
    import os, mpi_backend as hvd
    from mpi4py import MPI
    first = MPI.COMM_WORLD.Get_rank() == 0
    def refused(variable, here, there, expected):
        os.environ[variable] = here if first else there
        try:
            hvd.init()
        except ValueError as error:
            assert variable in str(error) and expected in str(error), error
        else:
            raise AssertionError("init went on")
    refused("MPI_BACKEND_ALLREDUCE", "direct", "exchange", "differs between ranks: ['direct', 'exchange']")
    refused("MPI_BACKEND_ALLREDUCE", "", "ring", "'ring'; expected one of")
    os.environ["MPI_BACKEND_ALLREDUCE"] = ""
    refused("MPI_BACKEND_NODES", "2", "", "differs between ranks: ['', '2']")
    refused("MPI_BACKEND_NODES", "", "two", "'two'; expected hosts, a number")
    os.environ["MPI_BACKEND_ALLREDUCE"] = "mpi"
    refused("MPI_BACKEND_NODES", "2", "2", "MPI_BACKEND_ALLREDUCE=mpi adds among all ranks")
    os.environ["MPI_BACKEND_ALLREDUCE"], os.environ["MPI_BACKEND_NODES"] = "exchange", "2"
    hvd.init()
    import torch
    p = torch.nn.Parameter(torch.ones(3))
    try:
        hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.1), [("p", p)])
    except ValueError as error:
        assert "MPI_BACKEND_NODES=2: the nodes have [1, 2] of these 3 ranks" in str(error), error
    else:
        raise AssertionError("nodes of different sizes were taken")
    os.environ["MPI_BACKEND_NODES"] = ""
    hvd.shutdown()
    os.environ["MPI_BACKEND_ALLREDUCE"] = "mpi"
    hvd.init()
    try:
        hvd.allreduce(torch.ones(3, dtype=torch.float16), name="halves")
    except hvd.HorovodInternalError as error:
        assert "halves" in str(error) and "cannot reduce torch.float16" in str(error), error
    else:
        raise AssertionError("the MPI library has added halves")
    assert hvd.allreduce(torch.ones(3), op=hvd.Sum).tolist() == [3.0] * 3, "the control: what it can goes on"
    print("ok", hvd.rank())
    """
    assert "ok 0" in mpirun(3, code)


CALLERS = {"MPI_BACKEND_THREAD": "0"}


@pytest.mark.parametrize("env", [{}, CALLERS], ids=["thread", "callers"])
def test_what_scripts_do(env: dict[str, str]) -> None:
    assert concluded(mpirun(2, HERE / "program_field.py", env=env))


def test_functions_without_a_communication_thread() -> None:
    assert concluded(mpirun(2, HERE / "program_functions.py", env=CALLERS))


def test_joining_without_a_communication_thread_warns() -> None:
    assert concluded(mpirun(2, HERE / "program_join.py", "unthreaded", env=CALLERS))


def test_an_optimizer_that_only_some_ranks_hold_is_named_when_they_join() -> None:
    output = mpirun(2, HERE / "program_join.py", "different", expect_failure=True)
    assert "join: ranks hold different DistributedOptimizers" in output and "by rank: [0], [0, 1]." in output and "went on" not in output, output


def test_an_optimizer_that_others_step_after_a_rank_dropped_it_and_joined_is_named() -> None:
    output = mpirun(2, HERE / "program_join.py", "dropped", expect_failure=True)
    failed = re.search(r"fails at (\d+\.\d+)", output)
    assert failed and time.time() - float(failed[1]) < SOON and "went on" not in output, output
    said = "rank 0 joined after it had dropped the DistributedOptimizer of 'dropped.0.weight', 'dropped.0.bias', 'dropped.2.weight', … (4 parameters)"
    assert f"{said}, which rank 1 still uses" in output, output


@pytest.mark.full
def test_without_the_watchdog_nobody_tells_of_a_dropped_optimizer() -> None:
    """The control of the test above."""
    with pytest.raises(AssertionError, match="ended by its time limit"):
        mpirun(2, HERE / "program_join.py", "dropped", timeout=20, env={"MPI_BACKEND_WATCHDOG": "0"})


def test_mpi_without_threads_is_said_and_works() -> None:
    code = """
    import mpi4py
    mpi4py.rc.thread_level = "single"
    import torch, warnings, mpi_backend as hvd
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hvd.init()
    assert not hvd.mpi_threads_supported()
    assert [str(w.message)[:60] for w in caught] == ["mpi_backend: MPI was initialised without MPI_THREAD_MULTIPLE"[:60]] * (hvd.rank() == 0), caught
    handles = [hvd.allreduce_async(torch.ones(2), name=str(i if hvd.rank() else 9 - i), op=hvd.Sum) for i in range(10)]
    assert all(handle.wait().tolist() == [2, 2] for handle in handles)
    print("ok", hvd.rank())
    """
    assert "ok 0" in mpirun(2, code)


def test_one_process_without_mpirun() -> None:
    require_mpirun()
    names = "transport functions surface state optimizer join"
    check_programs(names, run_job([], HERE / "programs.py", tuple(names.split())))


def test_of_several_programs_the_one_that_fails_ends_the_job() -> None:
    """The control of `check_programs`."""
    output = mpirun(2, HERE / "programs.py", "crash", "state", expect_failure=True)
    assert re.findall(r"^program (\w+)$", output, re.MULTILINE) == ["crash"], output
    with pytest.raises(AssertionError):
        check_programs("crash state", output)


def test_collectives_in_flight_that_share_tags_do_not_pass() -> None:
    """The control for what the `flight` program tests: without tags of their own, results are wrong, or the job fails or hangs."""
    with pytest.raises(AssertionError):
        mpirun(2, HERE / "program_flight.py", "same-tags", timeout=20)


@pytest.mark.parametrize("n", [2, 3])
def test_an_uncaught_exception_ends_the_job(n: int) -> None:
    output = mpirun(n, HERE / "program_crash.py", expect_failure=True, bare=True)
    raised = re.search(r"raised at (\d+\.\d+)", output)
    assert raised and time.time() - float(raised[1]) < SOON, output
    assert "rank fails on purpose" in output and "Traceback" in output
    assert f"uncaught exception on rank {n - 1} of {n}" in output
    assert "got through" not in output


def test_the_previous_hook_still_runs() -> None:
    output = mpirun(2, HERE / "program_crash.py", "chained", expect_failure=True, bare=True)
    assert "the previous hook saw RuntimeError: rank fails on purpose" in output


def test_a_hook_around_ours_does_not_go_in_circles_after_a_second_init() -> None:
    output = mpirun(2, HERE / "program_crash.py", "rechained", expect_failure=True, bare=True)
    assert output.count("the hook around saw RuntimeError: rank fails on purpose") == 1 and "RecursionError" not in output, output


def test_what_torchs_hook_holds_back_is_printed() -> None:
    output = mpirun(2, HERE / "program_crash.py", "held", expect_failure=True, bare=True)
    assert output.count("RuntimeError: rank fails on purpose") == 1 and "uncaught exception on rank 1 of 2" in output, output


def test_without_the_hook_the_others_are_told_only_that_a_rank_has_left() -> None:
    """The control: the message above is the hook's. Without it the leaving rank's farewell, or the watchdog, ends the job."""
    output = mpirun(2, HERE / "program_crash.py", "unhooked", expect_failure=True, bare=True)
    assert "raised at" in output and "uncaught exception on rank" not in output and "got through" not in output, output


def test_importing_does_not_initialise_mpi() -> None:
    require_mpirun()
    code = """
import sys
import mpi_backend
assert "mpi4py.MPI" not in sys.modules, "import mpi_backend imports mpi4py.MPI"
from mpi4py import rc
rc.initialize = False
from mpi4py import MPI
assert not MPI.Is_initialized()
mpi_backend.init()
assert MPI.Is_initialized() and MPI.Query_thread() == MPI.THREAD_MULTIPLE
assert mpi_backend.size() == 1
import atexit
print("ok", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", code], env=rank_environment(), cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0 and result.stdout.strip() == "ok" and not result.stderr, result.stdout + result.stderr


@pytest.mark.full
def test_what_is_larger_than_messages_and_counts_travels() -> None:
    """Objects of 560 MiB and 1.2 GB, parts of more than 2³⁰ rows that differ between ranks, an all-reduce of over 2³¹ elements. It takes 12 GB."""
    said = mpirun(2, "tests/mpi/program_large.py")
    assert all(f"rank {r}: all right" in said for r in range(2)), said


@pytest.mark.full
def test_mpich_has_communicators_for_optimizers_that_are_dropped(tmp_path: Path) -> None:
    """It has about 2000 in a process, of which an optimizer takes one. (Those of Open MPI are 81 in `program_field.py`: what they cost is memory.)"""
    program = """
        import sys

        import torch

        import mpi_backend as hvd

        hvd.init()
        kept = []
        for i in range(2200):
            model = torch.nn.Linear(2, 2)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), hvd.Compression.random_block(2))
            if i % 100 == 0:
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            if sys.argv[1] == "keep":
                kept.append(optimizer)
        hvd.shutdown()
    """
    with installed_mpich(tmp_path / "mpich", rank_environment()["PATH"]) as environment:
        mpirun(2, program, "drop", env=environment)
        assert "Too many communicators" in mpirun(2, program, "keep", env=environment, expect_failure=True), "the control"
