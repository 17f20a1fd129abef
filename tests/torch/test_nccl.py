"""torch.distributed's transport on GPUs over NCCL, both of which are pretended; what is real of it runs in launch/gpu_check.sh."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import mpirun


def test_payloads_stay_on_the_device_until_nccl_takes_them(tmp_path: Path) -> None:
    """Every collective, and methods of each kind, beside gloo's bits; gloo with tensors of a GPU is an error."""
    said = mpirun(2, "tests/torch/program_nccl.py", str(tmp_path / "meet"))
    assert all(f"rank {r} of 2: all right" in said for r in range(2))
