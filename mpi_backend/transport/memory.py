"""What MPI is handed: addresses, units, counts."""

from __future__ import annotations

import ctypes
import os

import torch
from mpi4py import MPI

from ..environment import switch

__all__ = ["LARGEST", "UNITS", "cuda_aware", "memory_of", "unit_of"]

LARGEST = 2**30
"""Elements in one message. Open MPI 5 has no calls with counts above a C int, so what is larger travels in pieces."""
UNITS = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}  # by element size, where nothing is computed


def cuda_aware() -> bool:
    """Whether MPI may be handed CUDA memory: `MPI_BACKEND_CUDA_AWARE` (0 or 1) if set, else what Open MPI says of itself, else no."""
    if os.environ.get("MPI_BACKEND_CUDA_AWARE"):
        return switch("MPI_BACKEND_CUDA_AWARE")
    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (AttributeError, OSError):
        return False


def memory_of(t: torch.Tensor) -> MPI.buffer:
    """The memory of a contiguous tensor, on any device: MPI gets its address. Does not keep the tensor alive."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()  # MPI knows nothing of streams: what writes this memory, or still reads it, must be over
    return MPI.buffer.fromaddress(t.data_ptr(), t.nbytes)


def unit_of(t: torch.Tensor) -> MPI.Datatype:
    """What its elements are to MPI where nothing is computed."""
    return UNITS[t.element_size()]
