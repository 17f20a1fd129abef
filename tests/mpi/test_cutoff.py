"""Training with a straggler cutoff on real ranks; program_cutoff.py does it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.ranks import SOON, mpirun

PROGRAM = "tests/mpi/program_cutoff.py"


@pytest.mark.parametrize("ranks", [1, 3])
def test_steps_go_on_without_who_is_late(ranks: int, tmp_path: Path) -> None:
    output = mpirun(ranks, PROGRAM, str(tmp_path))
    assert output.count("all well") == ranks, output


def test_a_dead_worker_ends_the_job_and_is_named(tmp_path: Path) -> None:
    """Without the launcher's help: the others wait for it, as with a cap of 0, or go on to `finish`."""
    when = tmp_path / "when"
    output = mpirun(2, PROGRAM, str(tmp_path), "1", str(when), expect_failure=True, bare=True)
    assert time.time() - float(when.read_text()) < SOON, output
    assert "rank 1" in output and "signal 9" in output, output
