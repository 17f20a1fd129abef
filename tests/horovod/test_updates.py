"""Methods that apply the update themselves, on an unmodified Horovod optimizer: two ranks, three, and a single process."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.ranks import horovodrun, mpirun

NUMBERS, OTHERS = ("the_simulation", "statistics"), ("resume", "an_undone_step", "a_grad_scaler", "mistakes")


@pytest.mark.parametrize(("launch", "n"), [(horovodrun, 1), (horovodrun, 2), (mpirun, 3)], ids=["1", "horovodrun-2", "mpirun-3"])
def test_the_update_is_applied_by_the_method(launch: Callable[..., str], n: int) -> None:
    """Tied, frozen and unused parameters; local steps; points of evaluation; batch-norm statistics; resuming; NaN; mistakes. On three ranks what is
    averaged, of which sums of three are another matter than sums of two."""
    names = [*NUMBERS, *([] if n > 2 else OTHERS)]
    said = launch(n, "tests/horovod/program_updates.py", *names)
    assert re.findall(r"^passed (\S+)$", said, re.MULTILINE) == names
