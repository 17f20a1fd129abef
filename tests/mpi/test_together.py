"""A checkpoint function that one rank alone calls: ranks are told soon, whatever the others do, and the job ends by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import require_mpirun, run_job

STEP = "DisagreementError: save_checkpoint was called on rank 0 only; call it on every rank. Meanwhile a training step began on rank 1."
HERE = "rank 0: HorovodInternalError: {} (call it on every rank): "
ENDED = HERE + "rank 1 shut down without it."
WAITS = "Meanwhile rank 0 waits: {} (call it on every rank)."
CASES = {
    "step, first": ("save", "step", 0, [f"rank 0: {STEP}", f"rank 1: {STEP}"]),
    "step": ("save", "step", 1, [f"rank 0: {STEP}", f"rank 1: {STEP}"]),
    "end": ("save", "end", 1, [ENDED.format("save_checkpoint")]),
    "allreduce": ("save", "allreduce", 1, [WAITS.format("save_checkpoint")]),
    "load, allreduce": ("load", "allreduce", 1, [WAITS.format("load_checkpoint")]),
    "switch, end": ("switch", "end", 1, [ENDED.format("switch")]),
    "virtual, end": ("virtual", "end", 1, [ENDED.format("at('virtual')")]),
}
"""Every function against every other and a step: tests/unit/test_together.py."""


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_function_that_one_rank_alone_calls(case: str, tmp_path: Path) -> None:
    alone, what, steps, expected = CASES[case]
    require_mpirun()
    args = alone, what, str(steps), str(tmp_path / "a")
    # Only where nothing else ends it: a rank that is merely late for something else would be ended by it, too.
    limit = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"} if what == "allreduce" else {}
    # After a stall the rank that waited still has something on its way, and the watchdog ends the job.
    output = run_job(["mpirun", "-n", "2"], "tests/mpi/program_together.py", args, env=limit, expect_failure=None)
    for text in expected:
        assert text in output
    assert not (tmp_path / "a").exists()
