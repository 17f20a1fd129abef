"""On an unmodified Horovod: a function that all ranks call together, called on one rank only."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import horovodrun

STEP = "Meanwhile a training step began on {}."
CASES = {
    "first": f"save_checkpoint was called on rank 0 only; call it on every rank. {STEP.format('rank 1')}",
    "save": f"save_checkpoint was called on rank 0 only; call it on every rank. {STEP.format('rank 1')}",
    "by hand": f"save_checkpoint was called on rank 0 only; call it on every rank. {STEP.format('rank 1')}",
    "load": f"load_checkpoint was called on rank 1 only; call it on every rank. {STEP.format('rank 0')}",
    "switch": f"switch was called on rank 0 only; call it on every rank. {STEP.format('rank 1')}",
    "virtual": f"at('virtual') was called on rank 0 only; call it on every rank. {STEP.format('rank 1')}",
    "first virtual": "at('virtual') was called on rank 0 only; call it on every rank. load_checkpoint was called on rank 1 only; call it on every",
    "both": "save_checkpoint was called on rank 0 only; call it on every rank. load_checkpoint was called on rank 1 only; call it on every rank.",
}
PROGRAM = "tests/horovod/program_together.py"


def test_ranks_that_begin_different_things_are_told_so(tmp_path: Path) -> None:
    """All of them, also where `synchronize()` is called by hand. What all do together is done (control)."""
    output = horovodrun(2, PROGRAM, "step", str(tmp_path), timeout=60)
    for case, text in CASES.items():
        for rank in (0, 1):
            assert f"{case}: rank {rank}: DisagreementError: {text}" in output
    for rank in (0, 1):
        assert f"all: rank {rank}: nothing was raised" in output


def test_a_rank_that_waits_alone_says_what_for(tmp_path: Path) -> None:
    """While the other is in a collective of Horovod's: a warning, and an error after the limit."""
    limit = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
    output = horovodrun(2, PROGRAM, "allreduce", str(tmp_path), timeout=60, env=limit)
    assert "rank 0 has waited 0.5 s for other ranks to call save_checkpoint, too." in output
    assert "allreduce: rank 0: TransportError: save_checkpoint was called on rank 0, and for 2 s" in output


def test_a_rank_that_waits_for_one_that_has_ended_says_what_for(tmp_path: Path) -> None:
    output = horovodrun(2, PROGRAM, "end", str(tmp_path), timeout=60)
    assert "end: rank 0: HorovodInternalError: save_checkpoint (call it on every rank): " in output
