"""On an unmodified Horovod: a function that all ranks call together, called on one rank only."""

from __future__ import annotations

from pathlib import Path

import pytest

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
FUNCTIONS = {"save": "save_checkpoint", "load": "load_checkpoint", "switch": "switch", "virtual": "at('virtual')"}
PROGRAM = "tests/horovod/program_together.py"


def test_ranks_that_begin_different_things_are_told_so(tmp_path: Path) -> None:
    """All of them, also where `synchronize()` is called by hand. What all do together is done (control)."""
    output = horovodrun(2, PROGRAM, "step", str(tmp_path))
    for case, text in CASES.items():
        for rank in (0, 1):
            assert f"{case}: rank {rank}: DisagreementError: {text}" in output
    for rank in (0, 1):
        assert f"all: rank {rank}: nothing was raised" in output


@pytest.mark.parametrize("what", ["allreduce", "end"])
def test_a_rank_that_waits_alone_says_what_for(what: str, tmp_path: Path) -> None:
    """While the other is in a collective of Horovod's: a warning, and an error after the limit. When it ends: what Horovod raises, with the name."""
    limit = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "1.5"} if what == "allreduce" else {}
    output = horovodrun(2, PROGRAM, what, str(tmp_path), env=limit)
    for name, function in FUNCTIONS.items():
        assert f"rank 0 has waited 0.1 s for other ranks to call {function}, too." in output
        if what == "allreduce":
            assert f"allreduce, {name}: rank 0: TransportError: {function} was called on rank 0, and for 1.5 s" in output
        else:
            assert f"end, {name}: rank 0: HorovodInternalError: {function} (call it on every rank): " in output
