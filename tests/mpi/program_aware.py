"""One rank of two: tensors of a pretended GPU through an MPI that takes its memory, and through one that does not."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from mpi4py import MPI

from mpi_backend.transport import MPITransport, cuda_aware, memory
from mpi_backend.transport import collectives as collectives_of
from mpi_backend.transport import messages as messages_of
from mpi_backend.transport import reduction as reduction_of
from tests.pretend import Pretended, on_gpu

RANK, SIZE = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def library(says: int | None) -> Any:
    """An MPI library that says so of CUDA, or that knows no such question."""
    return lambda name: SimpleNamespace() if says is None else SimpleNamespace(MPIX_Query_cuda_support=lambda: says)


def what_mpi_says() -> None:
    """Open MPI's own question, unless the variable answers it."""
    os.environ.pop("MPI_BACKEND_CUDA_AWARE", None)
    for says, expected in ((1, True), (0, False), (None, False)):
        with mock.patch.object(ctypes, "CDLL", library(says)):
            assert cuda_aware() is expected, says
    with mock.patch.object(ctypes, "CDLL", mock.Mock(side_effect=OSError)):
        assert cuda_aware() is False
    with mock.patch.object(ctypes, "CDLL", library(1)), mock.patch.dict(os.environ, MPI_BACKEND_CUDA_AWARE="0"):
        assert cuda_aware() is False


def carried(aware: int) -> tuple[list[torch.Tensor], list[bool], int]:
    """What collectives give on the GPU, whether each memory that MPI was handed is the GPU's, and how many copies were made to the host."""
    handed: list[bool] = []
    copies: list[torch.Tensor] = []

    class Noted(memory.Copy):
        def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
            copies.append(target)
            super().__init__(source, target)

    def noted(t: torch.Tensor) -> Any:
        if t.numel() * t.element_size() >= 1 << 10:  # not what ranks tell each other
            handed.append(t.is_cuda)
        return memory.memory_of(t)

    with mock.patch.object(ctypes, "CDLL", library(aware)), on_gpu(), mock.patch.object(collectives_of, "Copy", Noted):
        for module in (collectives_of, messages_of, reduction_of):
            module_patch = mock.patch.object(module, "memory_of", noted)
            module_patch.start()
        transport = MPITransport()
        found: list[Any] = []
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            mine = Pretended(((torch.arange(1 << 12, device="cpu") * 7 + 3 * RANK) % 11).to(dtype))
            found.append(transport.allreduce_(mine.clone(), "sum").wait())
            found += transport.allgather(mine, "gather").wait()
            found += transport.alltoall(mine, [mine.numel() // SIZE] * SIZE, "swap").wait()
            found.append(transport.broadcast_(mine.clone(), SIZE - 1, "broadcast").wait())
        assert all(t.is_cuda for t in found)
        torch.cuda.current_stream().synchronize()  # what was copied back late is there
        transport.close()
        mock.patch.stopall()
    return [t.held for t in found], handed, len(copies)


def memory_is_handed_over() -> None:
    """Of a GPU to an MPI that takes it, with no copy on the host; through the host's memory to another one (control); the results are the same."""
    directly, handed, copies = carried(aware=1)
    assert handed and all(handed) and copies == 0, (handed, copies)
    staged, handed, copies = carried(aware=0)
    assert handed and not any(handed) and copies > 0, (handed, copies)
    assert all(torch.equal(a, b) for a, b in zip(directly, staged, strict=True))
    expected = sum(((torch.arange(1 << 12) * 7 + 3 * r) % 11).float() for r in range(SIZE))
    assert torch.equal(directly[0], expected)  # type: ignore[arg-type]


what_mpi_says()
memory_is_handed_over()
print(f"rank {RANK}: handed over, and staged")
