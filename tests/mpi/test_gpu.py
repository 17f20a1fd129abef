"""CUDA tensors through MPI: staged in pinned memory, and, where MPI is CUDA-aware, directly."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.ranks import mpirun, require_mpirun

PROGRAM = """
import torch, mpi_backend as hvd
hvd.init()
rank, size = hvd.rank(), hvd.size()
torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
    x = torch.full((1000,), rank + 1, dtype=dtype, device="cuda")
    x.mul_(2)  # still running when it is handed over
    total = hvd.allreduce(x, op=hvd.Sum)
    assert total.is_cuda and (total == size * (size + 1)).all(), (dtype, total[:3])
    assert hvd.allgather(x).view(size, -1)[:, 0].tolist() == [2 * (r + 1) for r in range(size)]
    assert (hvd.broadcast(x, size - 1) == 2 * size).all()
    assert (hvd.reducescatter(x.view(-1, 2), op=hvd.Sum) == size * (size + 1)).all()
    assert hvd.alltoall(x[: 2 * size]).tolist() == [2 * (r + 1) for r in range(size) for _ in range(2)]
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    x = torch.ones(1 << 20, device="cuda")
    for _ in range(50):
        x = x * 1.0 + 0.0
    assert (hvd.allreduce(x, op=hvd.Sum) == size).all(), "a stream of the caller's"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).cuda()
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), hvd.Compression.top_k(8))
for step in range(5):
    optimizer.zero_grad()
    data = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * step + rank)).cuda()
    model(data).square().mean().backward()
    optimizer.step()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
assert all(torch.equal(w, weights) for w in hvd.allgather(weights[None]))
print("ok", rank)
"""


def require_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: CUDA tensors through MPI were not tried")


def test_cuda_tensors_are_staged_through_pinned_memory() -> None:
    require_gpu()
    assert "ok 1" in mpirun(2, PROGRAM, env={"MPI_BACKEND_CUDA_AWARE": "0"})


def test_cuda_tensors_go_straight_to_a_cuda_aware_mpi() -> None:
    require_gpu()
    require_mpirun()
    from mpi4py import MPI

    if not getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", lambda: 0)():
        pytest.skip("this MPI is not CUDA-aware")
    assert "ok 1" in mpirun(2, PROGRAM, env={"MPI_BACKEND_CUDA_AWARE": "1"})


def test_a_pretended_gpu_is_handed_to_an_mpi_that_takes_it() -> None:
    assert "rank 1: handed over, and staged" in mpirun(2, "tests/mpi/program_aware.py", env={"MPI_BACKEND_CUDA_AWARE": ""})


def test_detection_can_be_overridden() -> None:
    code = """
    import os
    from mpi_backend.transport import cuda_aware
    detected = cuda_aware()
    for setting, expected in (("1", True), ("0", False), ("", detected)):
        os.environ["MPI_BACKEND_CUDA_AWARE"] = setting
        assert cuda_aware() is expected, setting
    os.environ["MPI_BACKEND_CUDA_AWARE"] = "yes"
    try:
        cuda_aware()
    except ValueError as error:
        assert "MPI_BACKEND_CUDA_AWARE is 'yes'; expected 0 (off) or 1 (on)." in str(error)
        print("ok", detected)
    """
    assert "ok" in mpirun(1, code)
