"""Horovod's API on torch.distributed."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import mpirun, run_job


def test_what_scripts_use(tmp_path: Path) -> None:
    said = mpirun(2, "tests/torch/program_backend.py", str(tmp_path / "meet"), timeout=90)
    assert all(f"rank {r} of 2: all right" in said for r in range(2))


def test_one_process_needs_no_launcher() -> None:
    program = """
        import torch
        import hvd_ecsgd.torch_backend as hvd

        hvd.init()
        model = torch.nn.Linear(40, 40)
        compression = hvd.Compression.top_k(10).bind(model)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), compression)
        model(torch.ones(1, 40)).sum().backward()
        optimizer.step()
        print(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), compression.traffic.payload > 0)
        hvd.shutdown()
    """
    assert "0 1 0 1 True" in run_job([], program, timeout=60)
