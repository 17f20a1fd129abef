"""FSDP2's hook, on four real ranks over gloo."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import mpirun


def test_two_replicas_of_two_shards(tmp_path: Path) -> None:
    """Bits of torch's own without compression, of simulated workers with it; checkpoints, accumulation, infs, and wrong use."""
    said = mpirun(4, "tests/torch/program_fsdp.py", str(tmp_path / "meet"), timeout=200)
    assert all(f"rank {r} of 4: all right" in said for r in range(4))
