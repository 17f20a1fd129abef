"""The examples as a user runs them, on real ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ranks import horovodrun, mpirun, require_horovod

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart_prints_the_table_and_saves_the_plot(tmp_path: Path) -> None:
    printed = mpirun(2, EXAMPLES / "quickstart.py", "--epochs", "12", "--out", str(tmp_path), timeout=240)
    assert "All 2 workers hold the same bits" in printed
    results = json.loads((tmp_path / "quickstart.json").read_text())
    accuracy = {name: r["accuracy"] for name, r in results.items()}
    names = list(accuracy)
    assert len(names) == 5 and all(name in printed for name in names)
    dense, no_feedback, feedback, detached, double_squeeze = (accuracy[name] for name in names)
    assert no_feedback < min(feedback, detached, double_squeeze) - 0.05, "error feedback must be visibly better than none"
    assert min(detached, double_squeeze) > dense - 0.05
    assert all(r["ratio"] > 20 for name, r in results.items() if name != "dense")
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_quickstart_says_before_it_trains_that_it_cannot_save(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    printed = mpirun(2, EXAMPLES / "quickstart.py", "--out", str(tmp_path / "a file"), timeout=60, expect_failure=True)
    assert printed.count("error: results cannot be saved in") == 1 and "--out" in printed and "step/s" not in printed, printed
    assert "expected at least 1" in mpirun(1, EXAMPLES / "quickstart.py", "--epochs", "0", timeout=60, expect_failure=True)


def weights(printed: str) -> str:
    found = re.search(r"weights ([0-9a-f]{16})", printed)
    assert found, printed
    return found.group(1)


@pytest.mark.full
@pytest.mark.parametrize("method", ["none", "double_squeeze"])
def test_the_same_script_gives_the_same_weights_on_horovod_and_on_mpi(method: str) -> None:
    """Random blocks, and the control of the hashes, are in tests/launch/test_launchers.py; double_squeeze is in tests/launch/test_slurm.py, too."""
    require_horovod()
    arguments = ("--method", method, "--epochs", "2", "--ratio", "16")
    over_mpi = weights(mpirun(2, EXAMPLES / "digits.py", *arguments))
    assert over_mpi == weights(horovodrun(2, EXAMPLES / "digits.py", "--backend", "horovod", *arguments))


def test_asynchronous_workers_learn_at_their_own_pace() -> None:
    """One of two takes 5 ms longer for each of 180 batches."""
    env = {"MPI_BACKEND_SERVERS": "1"}
    printed = mpirun(3, EXAMPLES / "async_digits.py", "--epochs", "4", "--slow", "0.005", "--tau-max", "400", timeout=150, env=env)
    found = re.search(r"2 workers: test accuracy (\S+), compression (\S+)x, seconds by worker (\S+) (\S+)", printed)
    assert found, printed
    accuracy, ratio, slow, _ = map(float, found.groups())
    assert accuracy > 0.8 and ratio > 20 and slow > 180 * 0.005, printed
