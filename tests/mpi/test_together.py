"""A checkpoint function that one rank alone calls: ranks are told soon, whatever the others do, and the job ends by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import require_mpirun, run_job

STEP = "DisagreementError: save_checkpoint was called on rank 0 only; call it on every rank. Meanwhile a training step began on rank 1."
HERE = "rank 0: HorovodInternalError: save_checkpoint (call it on every rank): "
CASES = {
    "step, first": ("step", 0, [f"rank 0: {STEP}", f"rank 1: {STEP}"]),
    "step": ("step", 1, [f"rank 0: {STEP}", f"rank 1: {STEP}"]),
    "end": ("end", 1, [f"{HERE}rank 1 shut down without it."]),
    "allreduce": ("allreduce", 1, ["Meanwhile rank 0 waits: save_checkpoint (call it on every rank)."]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_function_that_one_rank_alone_calls(case: str, tmp_path: Path) -> None:
    what, steps, expected = CASES[case]
    require_mpirun()
    args = what, str(steps), str(tmp_path / "a")
    limit = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    # After a stall the rank that waited still has something on its way, and the watchdog ends the job.
    output = run_job(["mpirun", "-n", "2"], "tests/mpi/program_together.py", args, timeout=60, env=limit, expect_failure=None)
    for text in expected:
        assert text in output
    assert not (tmp_path / "a").exists()
