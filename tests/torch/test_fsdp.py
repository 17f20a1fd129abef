"""FSDP2's hook, on four real ranks over gloo."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch.distributed.fsdp

from tests.ranks import mpirun


def test_two_replicas_of_two_shards(tmp_path: Path) -> None:
    """Bits of torch's own without compression, of simulated workers with it; checkpoints, accumulation, infs, and wrong use."""
    said = mpirun(4, "tests/torch/program_fsdp.py", str(tmp_path / "meet"))
    assert all(f"rank {r} of 4: all right" in said for r in range(4))


def test_a_torch_without_fsdp2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp, "FSDPModule")
    monkeypatch.delitem(sys.modules, "hvd_ecsgd.fsdp", raising=False)
    with pytest.raises(ImportError, match=r"hvd_ecsgd.fsdp needs FSDP2, .* of torch 2.6 or newer, and this is torch"):
        importlib.import_module("hvd_ecsgd.fsdp")
