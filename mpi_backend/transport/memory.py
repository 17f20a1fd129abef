"""What MPI is handed: addresses, units, counts."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from functools import cache
from typing import Any

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError

from ..environment import switch

__all__ = ["LARGEST", "UNITS", "cuda_aware", "memory_of", "parts_of"]

LARGEST = 2**30
"""Elements in one message. Open MPI 5 has no calls with counts above a C int, so what is larger travels in pieces, or in larger units."""
UNITS = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}  # by element size, where nothing is computed


@cache
def _wide_unit(element_size: int, elements: int) -> MPI.Datatype:
    return UNITS[element_size].Create_contiguous(elements).Commit()


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
    return MPI.buffer.fromaddress(t.data_ptr(), t.numel() * t.element_size())


def parts_of(t: torch.Tensor, counts: list[int], what: str) -> list[Any]:
    """`t` as consecutive parts of `counts` elements. The unit grows as needed for counts and displacements to fit MPI's integers."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    unit = UNITS[t.element_size()]
    if max(t.numel(), *counts) > LARGEST:
        common = math.gcd(*counts)
        factor = next((common // d for d in range(1, common + 1) if common % d == 0 and common // d <= LARGEST), 1)
        if t.numel() // factor > LARGEST:
            raise TransportError(
                f"{what}: parts of {counts} elements exceed what MPI can count ({LARGEST}) and have no large common factor; "
                "send less at a time, or pad the parts to a multiple of 8 or more."
            )
        unit = _wide_unit(t.element_size(), factor)
        counts, starts = [c // factor for c in counts], [s // factor for s in starts]
    return [memory_of(t), (counts, starts), unit]
