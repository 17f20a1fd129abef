"""The examples as a user runs them, on real ranks."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from tests.ranks import REPO, horovodrun, mpirun, require_horovod, run_job

EXAMPLES = Path(__file__).parents[2] / "examples"
SEVERAL = "tests/several.py"
QUICKSTART = f"{EXAMPLES / 'quickstart.py'} --out"
"""For `SEVERAL`, whose ranks are forked where torch has been imported."""


def test_quickstart_prints_the_table_and_saves_the_plot(tmp_path: Path) -> None:
    printed = mpirun(2, SEVERAL, f"{QUICKSTART} {tmp_path} --epochs 6")
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
    (tmp_path / "file").touch()
    printed = mpirun(2, SEVERAL, f"{QUICKSTART} {tmp_path / 'file'}", expect_failure=True)
    assert printed.count("error: results cannot be saved in") == 1 and "--out" in printed and "step/s" not in printed, printed
    assert "expected at least 1" in mpirun(1, SEVERAL, f"{QUICKSTART} {tmp_path} --epochs 0", expect_failure=True)


def weights(printed: str) -> str:
    found = re.search(r"weights ([0-9a-f]{16})", printed)
    assert found, printed
    return found.group(1)


@pytest.mark.full
@pytest.mark.parametrize("method", ["none", "double_squeeze"])
def test_the_same_script_gives_the_same_weights_on_horovod_and_on_mpi(method: str) -> None:
    """Random blocks are in tests/launch/test_launchers.py, the control of the hashes in tests/torch/test_ddp.py; double_squeeze is in
    tests/launch/test_slurm.py, too."""
    require_horovod()
    arguments = ("--method", method, "--epochs", "2", "--ratio", "16")
    over_mpi = weights(mpirun(2, EXAMPLES / "digits.py", *arguments))
    assert over_mpi == weights(horovodrun(2, EXAMPLES / "digits.py", "--backend", "horovod", *arguments))


def test_asynchronous_workers_learn_at_their_own_pace() -> None:
    """One of two takes 5 ms longer for each of 180 batches. On a busy machine gradients are staler; a model that learns nothing stays near .1."""
    env = {"MPI_BACKEND_SERVERS": "1"}
    printed = mpirun(3, EXAMPLES / "async_digits.py", "--epochs", "4", "--slow", "0.005", "--tau-max", "400", env=env)
    found = re.search(r"2 workers: test accuracy (\S+), compression (\S+)x, seconds by worker (\S+) (\S+)", printed)
    assert found, printed
    accuracy, ratio, slow, _ = map(float, found.groups())
    assert accuracy > 0.5 and ratio > 20 and slow > 180 * 0.005, printed


def test_examples_end_in_a_table_and_a_plot(tmp_path: Path) -> None:
    """Several in one job: a language model, sparse logistic regression, and a loop in NumPy."""
    runs = {
        "bytes_lm": "--method none top_k --steps 10 --batch 1",
        "logistic_regression": "--steps 120",
        "numpy_loop": "--epochs 3 --ratio 50",
    }
    commands = [f"{EXAMPLES / name}.py {arguments} --out {tmp_path}" for name, arguments in runs.items()]
    printed = mpirun(2, SEVERAL, *commands)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in runs}
    for name in runs:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and f"Plot: {tmp_path / name}.png" in printed, name

    dense, top_k = found["bytes_lm"]["none"], found["bytes_lm"]["top_k"]
    assert dense["losses"][-1] < dense["losses"][0] - 0.1 and top_k["weights_hash"] != dense["weights_hash"]
    assert top_k["ratio"] > 20 and dense["ratio"] == pytest.approx(1) and top_k["megabytes"][-1] < dense["megabytes"][-1] / 20
    distance = {method: result["distances"][-1] for method, result in found["logistic_regression"].items()}
    assert distance["I − ηH"] < distance["error feedback"] / 3 < distance["rounded, no feedback"] / 9, distance
    assert min(found["numpy_loop"]["none"][-1], found["numpy_loop"]["top_k"][-1]) > 0.85, found["numpy_loop"]


@pytest.mark.parametrize(("script", "needs", "method"), [("hf_trainer", "transformers", "top_k"), ("lightning_ddp", "lightning", "detached")])
def test_frameworks_train_through_ddps_hook(script: str, needs: str, method: str, tmp_path: Path) -> None:
    """Not among what launch/test.sh installs: 300 MB, and many seconds of imports."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: pip install '.[frameworks]'")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    arguments = ("--method", "none", method, "--steps", "10", "--batch", "1", "--out", str(tmp_path))
    printed = run_job(torchrun, REPO / "examples" / f"{script}.py", arguments)
    losses = json.loads((tmp_path / f"{script}.json").read_text())
    assert losses["none"][-1] < losses["none"][0] and losses[method] != losses["none"], losses
    ratio = float(re.search(rf"{method} .* (\S+)x ", printed)[1])  # type: ignore[index]
    assert ratio > 10 and (tmp_path / f"{script}.png").stat().st_size > 10_000
