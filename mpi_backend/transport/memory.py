"""What MPI is handed: addresses, units, counts."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from mpi4py import MPI

from ..environment import switch

__all__ = ["LARGEST", "UNITS", "Copy", "Staging", "cuda_aware", "memory_of", "settle", "unit_of"]

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


class Copy:
    """A copy out of a GPU's memory that is on its way: `source` must stay as it is until then."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Start it, in a stream of its own, so that what the caller's stream is given next does not wait for it."""
        self._source: torch.Tensor | None = source
        stream = _stream_of(source.device)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    @property
    def over(self) -> bool:
        """Whether the target holds it. The host does not wait."""
        if self._source is not None and self._event.query():  # type: ignore[no-untyped-call]
            self._source = None
        return self._source is None

    def wait(self) -> None:
        """Let the host wait."""
        self._event.synchronize()


_streams: dict[torch.device, Any] = {}


def _stream_of(device: torch.device) -> Any:
    """For copies out of this GPU."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def settle(t: torch.Tensor) -> None:
    """Of memory on a GPU that MPI, which knows nothing of streams, or a thread with another stream is to look at next: wait until it is written."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()


def memory_of(t: torch.Tensor) -> MPI.buffer:
    """The memory of a contiguous tensor, on any device: MPI gets its address. Does not keep the tensor alive."""
    settle(t)  # what writes this memory, or still reads it
    return MPI.buffer.fromaddress(t.data_ptr(), t.nbytes)


def unit_of(t: torch.Tensor) -> MPI.Datatype:
    """What its elements are to MPI where nothing is computed."""
    return UNITS[t.element_size()]


class Staging:
    """Memory that MPI reads and writes: that of tensors themselves, or, of a GPU's where MPI is not CUDA-aware, pinned memory beside it."""

    def __init__(self) -> None:
        self._cuda_aware = cuda_aware()

    def needed(self, t: torch.Tensor) -> bool:
        """Whether a tensor like this must be copied."""
        return t.device.type != "cpu" and not (self._cuda_aware and t.is_cuda)

    def readable(self, flat: torch.Tensor) -> tuple[torch.Tensor, Copy | None]:
        """`flat`, or memory that MPI can read and the copy after which it holds the same."""
        if not self.needed(flat):
            settle(flat)
            return flat, None
        work = self.writable(flat, None)
        return work, Copy(flat, work)

    def writable(self, t: torch.Tensor, rows: int | None) -> torch.Tensor:
        """Memory that MPI can write, for a tensor like `t`, with another first dimension if `rows` is given."""
        shape = t.shape if rows is None else (rows, *t.shape[1:])
        if self.needed(t):
            return torch.empty(shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda)
        return torch.empty(shape, dtype=t.dtype, device=t.device)
