"""What all ranks do together begins in the same way, so that all see where some do something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_ecsgd import Compression, DisagreementError, load_checkpoint, save_checkpoint
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import Case
from tests.unit.test_state import Setup

CASES = [
    Case("local_momentum", lambda: Compression.local_momentum(4, dense_below=0)),
    Case("local steps", lambda: Compression.detached(4, period=2, dense_below=0)),
]


def virtual(setup: Setup, folder: Path) -> None:
    with setup.compression.at("virtual"):
        pass


ACTS: dict[str, Callable[[Setup, Path], Any]] = {
    "a training step": lambda setup, folder: setup.train(7, 9),  # in one of which something is exchanged
    "save_checkpoint": lambda setup, folder: save_checkpoint(folder, setup.model, setup.optimizer, setup.compression),
    "load_checkpoint": lambda setup, folder: load_checkpoint(folder, setup.model, setup.optimizer, setup.compression),
    "switch": lambda setup, folder: setup.compression.switch(setup.case.make()),
    "at('virtual')": virtual,
}
PAIRS = [(a, b) for a in ACTS for b in ACTS if a < b]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers of other tests have their first step to come for ever, so first steps would wait here for as long as they do in a script."""
    monkeypatch.setattr("hvd_ecsgd.core.agreement._PATIENCE", 0.2)


@pytest.mark.parametrize("steps", [0, 3], ids=["before the first step", "later"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("one", "others"), PAIRS, ids=lambda name: name)
def test_ranks_that_do_different_things_are_told_so(one: str, others: str, case: Case, steps: int, tmp_path: Path) -> None:
    """All of them, by the first collective of what they do. Where all do the same, it is done (control)."""
    if steps == 0 and "switch" in (one, others):
        pytest.skip("before the first step a switch is a setting like others")

    def worker(transport: Transport) -> str:
        setup = Setup(case, transport)
        setup.train(0, steps)
        save_checkpoint(tmp_path, setup.model, setup.optimizer, setup.compression)
        for act in (one, others):
            if act != "a training step" or steps:
                ACTS[act](setup, tmp_path)
        with pytest.raises(DisagreementError) as error:
            ACTS[one if transport.rank == 1 else others](setup, tmp_path)
        return str(error.value)

    first, *rest = run_simulated(3, worker)
    assert all(text == first for text in rest)
    for what, ranks in ((one, "rank 1"), (others, "ranks 0, 2")):
        step = what == "a training step"
        assert (f"Meanwhile {what} began on {ranks}." if step else f"{what} was called on {ranks} only; call it on every rank.") in first
