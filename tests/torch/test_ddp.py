"""The hook of torch's DistributedDataParallel, on real ranks over gloo."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.ranks import REPO, mpirun, run_job

PROGRAM = "tests/torch/program_ddp.py"


@pytest.mark.parametrize(
    ("n", "what"),
    [
        pytest.param(2, ["covering"], id="2"),
        pytest.param(2, ["all"], id="2-all", marks=pytest.mark.full),
        pytest.param(3, ["none", "random_block", "top_k", "detached", "double_squeeze", "power_sgd", "use"], id="3"),
    ],
)
def test_the_bits_are_those_of_our_optimizer_over_the_same_network(n: int, what: list[str], tmp_path: Path) -> None:
    """Weights and state of the methods that stand for all (with --full: of all), with a schedule and an undone step, and however DDP forms its
    buckets; then what scripts do with it."""
    said = mpirun(n, PROGRAM, str(tmp_path / "meet"), *what)
    assert all(f"rank {r} of {n}: all right" in said for r in range(n))


def hashes_of(said: str) -> list[str]:
    found = re.findall(r"test accuracy (0\.\d+), .* weights (\w+)", said)
    assert all(float(accuracy) > 0.5 for accuracy, _ in found), said
    return [digest for _, digest in found]


def test_a_script_started_by_torchrun_gives_the_weights_of_the_one_started_by_mpirun() -> None:
    """DDP's hook, and `torch_backend` in the script that Horovod and MPI run, too. The control is another method."""
    ddp, digits = (f"{REPO / 'examples' / name}.py --epochs 1 --method" for name in ("ddp", "digits"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    of_hook, of_torch = hashes_of(run_job(torchrun, "tests/several.py", (f"{ddp} double_squeeze", f"{digits} double_squeeze --backend torch")))
    of_mpi, other = hashes_of(mpirun(2, "tests/several.py", f"{digits} double_squeeze", f"{digits} one_bit"))
    assert of_hook == of_torch == of_mpi != other
