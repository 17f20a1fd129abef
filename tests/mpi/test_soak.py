"""Random faults one after the other, each followed by another start from the last checkpoint, end with the weights of the run without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import Jobs, grown, local, soak, went
from tests.ranks import LIMIT, require_mpirun

MIB = 1024
BOUND = {"KiB": 24 * MIB, "threads": 2, "files": 4}
"""What may grow on a rank from its tenth step on: allocators keep some memory; what each of many steps left behind would be more."""


@pytest.mark.parametrize(("steps", "distance", "seed"), [(40, 5, 130), pytest.param(2000, 100, 1, marks=pytest.mark.full)], ids=["short", "full"])
def test_a_training_among_faults_ends_with_the_weights_of_one_without(steps: int, distance: int, seed: int, tmp_path: Path) -> None:
    """Every step's weights are compared, on every rank; and memory, threads and open files do not grow."""
    require_mpirun()
    faults, most = soak(Jobs(tmp_path, limit=LIMIT if steps < 100 else 1500), steps, seed, distance=distance)
    assert set(faults) == {"kill", "stop", "damage"}
    assert set(most) == set(BOUND) and all(most[what] <= bound for what, bound in BOUND.items()), most


def test_what_each_step_leaves_behind_is_more_than_the_bound(tmp_path: Path) -> None:
    """The control: a mebibyte, a thread and an open file a step."""
    require_mpirun()
    jobs = Jobs(tmp_path, limit=LIMIT)
    output = jobs.start(local(2), folder=str(tmp_path), backend="two_pass", steps=45, every=10, record=True, watch=True, leak=True)
    assert went(output) == 2, output
    assert all(grown(output)[what] > bound for what, bound in BOUND.items()), output
