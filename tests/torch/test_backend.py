"""Horovod's API on torch.distributed."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.ranks import mpirun, run_job


def test_what_scripts_use(tmp_path: Path) -> None:
    said = mpirun(2, "tests/torch/program_backend.py", str(tmp_path / "meet"))
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
    assert "0 1 0 1 True" in run_job([], program)


@pytest.mark.parametrize("end", ["", "dist.destroy_process_group()"], ids=["", "destroys"])
def test_a_process_that_ends_just_after_an_exchange_is_not_aborted(end: str) -> None:
    """gloo's threads let go of what was sent, now and then after whoever waited has gone on. The first time that they do takes half a second."""
    program = """
        import threading
        import time

        import torch
        import torch.distributed as dist

        from hvd_ecsgd.transport.torch_dist import TorchTransport

        seen = []

        class Slow(torch.Tensor):
            def __del__(self):
                if threading.current_thread() is not threading.main_thread():
                    seen.append("gloo lets go of it")
                    time.sleep(0.5)

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        transport = TorchTransport()
        while not seen:
            transport.allgather(torch.ones(1 << 22).as_subclass(Slow), "last", [1 << 22]).wait()
    """
    run_job([], textwrap.dedent(program) + end)


def test_a_forked_process_ends_too() -> None:
    """It has none of gloo's threads, for which the end of a group waits."""
    program = """
        import os

        import torch

        import hvd_ecsgd.torch_backend as hvd

        hvd.init()
        hvd.allreduce(torch.ones(3))
        if os.fork():
            print("the child ended with", os.wait()[1])
    """
    assert "the child ended with 0" in run_job([], program, bare=True)
