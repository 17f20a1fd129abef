"""All-reduce and reduce-scatter. Elements are combined in the order of ranks, whatever the size, the timing and (but for *mpi*) the algorithm.

*exchange*: everybody sends all to everybody, and everybody adds. It takes the time of one message, and is all that two ranks need; with more of
them it is for what is small.
*direct*: rank r receives the r-th chunks of all, adds, and sends the result to all: the time of two messages, and the bytes of a ring. (A ring would
take 2(n-1) messages' times, add every chunk in another order, and round halves at every rank.)
*mpi*: the MPI library's own all-reduce, which may know a better network than TCP. It takes the types that MPI adds, in an order of its own.
The first two cut what is large into segments, of which several are on their way: while one is added up others arrive, and results leave.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from mpi4py import MPI

from . import memory
from .lanes import Task
from .memory import memory_of, settle
from .messages import Messages

__all__ = ["ALGORITHMS", "REDUCIBLE", "ReduceOp", "allreduce_tasks", "forced_algorithm", "mpi_adds", "reduce_scatter_tasks"]

ReduceOp = Literal["sum", "min", "max", "product"]
ALGORITHMS = ("exchange", "direct", "mpi")

_HALVES = (torch.float16, torch.bfloat16)  # added in float32, rounded once
_BY_MPI = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
"""Not 8 and 16 bit integers: Open MPI's vector code saturates their sums, its scalar code wraps (open-mpi/ompi issue 8045)."""
REDUCIBLE = (*_BY_MPI, *_HALVES, torch.int8, torch.uint8, torch.int16)
_MPI_OPS = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "product": MPI.PROD}
_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {
    "sum": lambda a, b, out: torch.add(a, b, out=out),
    "min": lambda a, b, out: torch.minimum(a, b, out=out),
    "max": lambda a, b, out: torch.maximum(a, b, out=out),
    "product": lambda a, b, out: torch.mul(a, b, out=out),
}
_FEW = 96 * 2**10
"""Bytes that a rank may send to all others together to save a message's time."""


def forced_algorithm(chosen: str | None = None) -> str:
    """One of `ALGORITHMS`, or "" for the best by size: `chosen`, or if None what MPI_BACKEND_ALLREDUCE says. Raises ValueError for anything else."""
    value = os.environ.get("MPI_BACKEND_ALLREDUCE", "") if chosen is None else chosen
    if value not in ("", *ALGORITHMS):
        raise ValueError(f"MPI_BACKEND_ALLREDUCE is {value!r}; expected one of {', '.join(ALGORITHMS)}, or nothing for the best by size.")
    return value


def mpi_adds(t: torch.Tensor) -> bool:
    """Whether the MPI library can reduce this tensor: Open MPI does not reduce CUDA memory without blocking."""
    return t.dtype in _BY_MPI and not t.is_cuda


def allreduce_tasks(messages: Messages, tag: int, t: torch.Tensor, op: ReduceOp, algorithm: str) -> list[Task]:
    """Reduce the flat tensor `t` over ranks, in place. `algorithm`: one of `ALGORITHMS`, or "" for the best by size; alike on all ranks."""
    if algorithm == "mpi":
        return [_by_mpi(messages.comm, t, op)]
    n = messages.size
    if not algorithm:
        algorithm = "exchange" if n == 2 or (n - 1) * t.nbytes <= _FEW else "direct"
    if algorithm == "exchange":
        return messages.checked([_exchange(messages, tag + k, t, _Rows(messages, t, op), firsts) for k, firsts in enumerate(_lanes(messages, t))])
    length = -(-t.numel() // n)
    chunks = [t[r * length : (r + 1) * length] for r in range(n)]
    lanes = enumerate(_lanes(messages, chunks[0]))
    return messages.checked([_direct(messages, tag + 2 * k, chunks, _Rows(messages, chunks[0], op), firsts) for k, firsts in lanes])


def reduce_scatter_tasks(messages: Messages, tag: int, parts: Sequence[torch.Tensor], out: torch.Tensor, op: ReduceOp) -> list[Task]:
    """Reduce over ranks; rank r gets the r-th part in `out`. The parts are flat, and only read."""
    longest = max(parts, key=torch.numel)
    lanes = enumerate(_lanes(messages, longest))
    return messages.checked([_reduce_scatter(messages, tag + k, parts, out, _Rows(messages, longest, op), firsts) for k, firsts in lanes])


def _lanes(messages: Messages, longest: torch.Tensor) -> list[range]:
    return messages.lanes(longest, messages.even_segment(longest))


def _by_mpi(comm: MPI.Comm, t: torch.Tensor, op: ReduceOp) -> Task:
    kind = _BY_MPI[t.dtype]
    yield [comm.Iallreduce(MPI.IN_PLACE, [memory_of(p), p.numel(), kind], _MPI_OPS[op]) for p in torch.split(t, memory.LARGEST)]


def _exchange(messages: Messages, tag: int, t: torch.Tensor, rows: _Rows, firsts: range) -> Task:
    for first in firsts:
        mine = t[first : first + rows.size]
        yield [*rows.receive(mine, tag), *(q for r in messages.peers for q in messages.send(mine, r, tag))]
        rows.combine(mine, mine)


def _direct(messages: Messages, tag: int, chunks: Sequence[torch.Tensor], rows: _Rows, firsts: range) -> Task:
    for first in firsts:
        parts = [chunk[first : first + rows.size] for chunk in chunks]
        mine, others = parts[messages.rank], [(r, parts[r]) for r in messages.peers if parts[r].numel()]
        # What is sent is waited for, too: results are received where it is read.
        yield [*rows.receive(mine, tag), *(q for r, part in others for q in messages.send(part, r, tag))]
        rows.combine(mine, mine)
        receives = [q for r, part in reversed(others) for q in messages.receive(part, r, tag + 1)]
        yield receives + ([q for r in messages.peers for q in messages.send(mine, r, tag + 1)] if mine.numel() else [])


def _reduce_scatter(messages: Messages, tag: int, parts: Sequence[torch.Tensor], out: torch.Tensor, rows: _Rows, firsts: range) -> Task:
    for first in firsts:
        mine = parts[messages.rank][first : first + rows.size]
        others = [(r, parts[r][first : first + rows.size]) for r in messages.peers]
        yield [*rows.receive(mine, tag), *(q for r, part in others if part.numel() for q in messages.send(part, r, tag))]
        rows.combine(mine, out[first : first + rows.size])


class _Rows:
    """Memory for a segment of each rank, and the sum of them. `size`: the elements of a segment of the tensors like `like`, which is the longest."""

    def __init__(self, messages: Messages, like: torch.Tensor, op: ReduceOp) -> None:
        self._messages = messages
        self.size = messages.even_segment(like)
        self._longest = min(self.size, like.numel())
        self._rows: list[torch.Tensor] = list(like.new_empty((messages.size, self._longest)).unbind())  # this rank's own row is for sums
        self._combine = _COMBINE[op]

    def _row(self, r: int, length: int) -> torch.Tensor:
        return self._rows[r] if length == self._longest else self._rows[r][:length]

    def receive(self, mine: torch.Tensor, tag: int) -> list[MPI.Request]:
        """Start to receive what the others have for `mine`."""
        if mine.numel() == 0:
            return []
        return [q for r in reversed(self._messages.peers) for q in self._messages.receive(self._row(r, mine.numel()), r, tag)]

    def combine(self, mine: torch.Tensor, out: torch.Tensor) -> None:
        """What was received, and `mine`, in the order of ranks; halves in float32. `out` may be `mine`."""
        if mine.numel() == 0:
            return
        rank = self._messages.rank
        rows = [mine if r == rank else self._row(r, mine.numel()) for r in range(self._messages.size)]
        if mine.dtype in _HALVES:
            total = rows[0].float()
            for row in rows[1:]:
                self._combine(total, row, total)  # which computes in float32
            out.copy_(total)
            settle(out)
            return
        total, spare = rows[0], self._row(rank, mine.numel())
        for row in rows[1:-1]:
            self._combine(total, row, spare)
            total = spare
        self._combine(total, rows[-1], out)
        settle(out)
