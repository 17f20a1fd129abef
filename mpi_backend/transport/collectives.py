"""Transport over a private MPI communicator: CPU tensors in place, CUDA tensors directly or staged through pinned memory.

Importing this module imports `mpi4py.MPI`, which initialises MPI; `import mpi_backend` alone does not import it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.base import Handle, Ready

from . import memory
from .link import Link
from .memory import cuda_aware, memory_of, unit_of
from .parts import start_allgather, start_alltoall

__all__ = ["MPITransport", "ReduceOp"]

T = TypeVar("T")
ReduceOp = Literal["sum", "min", "max", "product"]

_REDUCED_BY_MPI = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
_HALVES = (torch.float16, torch.bfloat16)  # MPI has no sum of these that rounds once
_SMALL = (torch.int8, torch.uint8, torch.int16)  # Open MPI's vector code saturates their sums, its scalar code wraps (open-mpi/ompi issue 8045)
_OPS = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "product": MPI.PROD}
_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sum": lambda total, t: total.add_(t),
    "min": lambda total, t: torch.minimum(total, t.to(total.dtype), out=total),
    "max": lambda total, t: torch.maximum(total, t.to(total.dtype), out=total),
    "product": lambda total, t: total.mul_(t),
}


class MPITransport:
    """Collectives over a private duplicate of `comm` (default: all processes), as `hvd_ecsgd.transport.base.Transport` describes them.

    Creating one is collective, unless the `link` of one that is used no more is given: every process of `comm` must do so, in the same order.
    Calls start the communication and return; a handle's `done` and `wait` carry it on, for every operation in flight, as does every further call.
    There is no thread: while a process does none of these, its second stages (see `Operations`) stand still, and so may those who wait for it.
    A transport is to be used by one thread at a time.

    Tensors are contiguous, of any dtype (`allreduce_` says which it reduces), on the CPU or a CUDA device. CPU tensors are read and written in
    place by MPI. CUDA tensors are handed to MPI directly if `cuda_aware()`, else copied through pinned host memory; the call then waits for
    that copy, and `wait` for the copy back.

    Raises `TransportError` for a tensor that is not dense and contiguous or cannot be reduced, for sizes that cannot be right, and, from the
    handle, for whatever MPI reports. Except where sizes are exchanged, nothing is compared between ranks: this is the fast path.
    """

    rank: int
    size: int
    divisor: int

    def __init__(self, comm: MPI.Comm | None = None, link: Link | None = None) -> None:
        self.link = Link(MPI.COMM_WORLD if comm is None else comm) if link is None else link
        self._first, self._second, self._operations = self.link.first, self.link.second, self.link.operations
        self.rank = self._first.Get_rank()
        self.size = self.divisor = self._first.Get_size()
        self._cuda_aware = cuda_aware()

    # ---- the protocol

    def allreduce_(self, t: torch.Tensor, name: str, op: ReduceOp = "sum") -> Handle[torch.Tensor]:
        """Reduce over ranks, in place; the result is `t`. Shape and dtype must be equal on every rank; every rank receives the same bits.

        fp32, fp64, int32 and int64 go through MPI's all-reduce. The MPI standard only recommends that all ranks get the same bits; Open MPI's
        non-blocking algorithms do it, down to the bits of NaNs (verified by `tests/mpi`). The order of the additions is MPI's own there.
        fp16, bf16, 8 and 16 bit integers (they wrap), and CUDA tensors, which Open MPI cannot reduce without blocking, travel as equal chunks:
        all-to-all, reduction of one's own chunk in rank order (halves in float32, rounded once), all-gather. That is as many bytes as a ring's.
        """
        what = f"allreduce_ {name!r}"
        flat = self._flat(t, what)
        known_types = (*_REDUCED_BY_MPI, *_HALVES, *_SMALL)
        if t.dtype not in known_types:
            known = ", ".join(map(str, known_types))
            raise TransportError(f"{what}: {t.dtype} cannot be reduced; expected one of {known}. Convert it first.")
        if self.size == 1 or flat.numel() == 0:
            return Ready(t)
        work = self._staged(flat)

        def finish() -> torch.Tensor:
            if work is not flat:
                flat.copy_(work)
            return t

        if t.dtype not in _REDUCED_BY_MPI or work.is_cuda:
            return self._allreduce_chunks(work, what, op, finish)
        kind = _REDUCED_BY_MPI[t.dtype]
        pieces = torch.split(work, memory.LARGEST)
        requests = [self._first.Iallreduce(MPI.IN_PLACE, [memory_of(piece), piece.numel(), kind], _OPS[op]) for piece in pieces]
        return self._operations.start(what, requests, finish)

    def reduce_scatter(self, t: torch.Tensor, counts: Sequence[int], name: str, op: ReduceOp = "sum") -> Handle[torch.Tensor]:
        """Reduce over ranks; rank r gets the r-th part of `counts[r]` elements, a new 1-D tensor. Reduced in rank order, halves in float32.

        Shape and dtype must be equal on every rank; the dtypes are those of `allreduce_`. `t` is only read.
        """
        what = f"reduce_scatter {name!r}"
        flat, counts = self._flat(t, what), list(counts)
        if len(counts) != self.size or min(counts) < 0 or sum(counts) != flat.numel():
            raise TransportError(f"{what}: parts of {counts} elements do not fit {self.size} ranks and a tensor of {flat.numel()} elements.")
        if self.size == 1:
            return Ready(flat.clone())
        work = self._staged(flat)
        copies = self._incoming(work, self.size * counts[self.rank]).view(self.size, counts[self.rank])
        received = [counts[self.rank]] * self.size
        requests, deliver = start_alltoall(self._first, work, counts, copies, received)

        def finish() -> torch.Tensor:
            deliver()
            return _combined(copies, op).to(t.dtype).to(t.device)

        return self._operations.start(what, requests, finish, keep=[work])

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        """Everybody's tensor, by rank. First dimensions may differ; give `sizes` (first dimension by rank) when they are known, to save a round.

        At least 1-D. dtype and further dimensions must be equal; when sizes have to be exchanged that and the name are checked, on every rank.
        The results are views of one tensor.
        """
        return self._allgather(t, name, sizes, lambda rows, counts: list(torch.split(rows, counts)))

    def allgather_concatenated(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[torch.Tensor]:
        """As `allgather`, with everybody's rows, in rank order, in one tensor."""
        return self._allgather(t, name, sizes, lambda rows, counts: rows)

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        """Rows `splits[r]` of `t` go to rank r; the result is what came, by rank. Give `received` (rows by rank) when known, to save a round.

        At least 1-D; `splits` has one entry per rank and adds up to the first dimension. dtype and further dimensions must be equal; when sizes
        have to be exchanged that and the name are checked, on every rank. The results are views of one tensor.
        """
        what = f"alltoall {name!r}"
        flat, splits = self._flat(t, what), list(splits)
        if t.dim() == 0 or len(splits) != self.size or min(splits) < 0 or sum(splits) != t.shape[0]:
            raise TransportError(
                f"{what}: splits {splits} do not fit a tensor of shape {tuple(t.shape)} and {self.size} ranks; "
                "expected one non-negative number of rows per rank, adding up to the first dimension."
            )
        if received is not None and (len(received) != self.size or min(received) < 0 or received[self.rank] != splits[self.rank]):
            raise TransportError(
                f"{what}: received {list(received)} does not fit splits {splits} of rank {self.rank}; pass None to have it exchanged."
            )
        if self.size == 1:
            return Ready([t.detach().clone()])
        work = self._staged(flat)
        row = math.prod(t.shape[1:])
        result: list[tuple[torch.Tensor, list[int], Callable[[], None]]] = []

        def exchange(comm: MPI.Comm, rows: list[int]) -> list[MPI.Request]:
            out = self._incoming(t, sum(rows))
            requests, deliver = start_alltoall(comm, work, [s * row for s in splits], out, [r * row for r in rows])
            result.append((out, rows, deliver))
            return requests

        def finish() -> list[torch.Tensor]:
            out, rows, deliver = result[0]
            deliver()
            return list(torch.split(out.to(t.device), rows))

        if received is not None:
            return self._operations.start(what, exchange(self._first, list(received)), finish, keep=[work])
        tag = _signature(what, t)
        announced = torch.tensor([[s, tag] for s in splits], dtype=torch.int64, device="cpu")
        replies = torch.empty_like(announced)
        request = self._first.Ialltoall([memory_of(announced), 2, MPI.INT64_T], [memory_of(replies), 2, MPI.INT64_T])
        second = partial(self._after_agreeing, exchange, replies, tag, t, what)
        return self._operations.start(what, [request], finish, second, keep=[work, announced, replies])

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        """Root's values, in place; the result is `t`. Shape and dtype must be equal on every rank."""
        what = f"broadcast_ {name!r} from rank {root}"
        flat = self._flat(t, what)
        if not 0 <= root < self.size:
            raise TransportError(f"{what}: there are {self.size} ranks; expected a root from 0 to {self.size - 1}.")
        if self.size == 1 or flat.numel() == 0:
            return Ready(t)
        work = self._staged(flat)
        unit = unit_of(t)
        requests = [self._first.Ibcast([memory_of(piece), piece.numel(), unit], root) for piece in torch.split(work, memory.LARGEST)]

        def finish() -> torch.Tensor:
            if work is not flat and root != self.rank:
                flat.copy_(work)
            return t

        return self._operations.start(what, requests, finish)

    def abandon(self) -> None:
        """Something in flight will never be complete: `close` does not wait for it."""
        self.link.abandon()

    def close(self) -> None:
        """Complete what is in flight and free the communicators; collective. The transport must not be used afterwards."""
        self.link.close()

    # ---- parts of the collectives

    def _allreduce_chunks(self, work: torch.Tensor, what: str, op: ReduceOp, finish: Callable[[], torch.Tensor]) -> Handle[torch.Tensor]:
        pieces: list[tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor, Callable[[], None]]] = []
        requests = []
        for piece in torch.split(work, memory.LARGEST):
            length = -(-piece.numel() // self.size)
            chunks = [max(0, min(length, piece.numel() - r * length)) for r in range(self.size)]
            mine = piece.narrow(0, sum(chunks[: self.rank]), chunks[self.rank])
            copies = piece.new_empty((self.size, mine.numel()))
            some, deliver = start_alltoall(self._first, piece, chunks, copies, [mine.numel()] * self.size)
            requests += some
            pieces.append((piece, chunks, mine, copies, deliver))

        def second() -> list[MPI.Request]:
            requests = []
            for piece, chunks, mine, copies, deliver in pieces:
                deliver()
                mine.copy_(_combined(copies, op))
                requests += start_allgather(self._second, piece, chunks)
            return requests

        return self._operations.start(what, requests, finish, second, keep=[work])

    def _allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None, shaped: Callable[[torch.Tensor, list[int]], T]) -> Handle[T]:
        what = f"allgather {name!r}"
        flat = self._flat(t, what)
        if t.dim() == 0:
            raise TransportError(f"{what}: a 0-D tensor has no rows to gather; pass t.reshape(1).")
        if sizes is not None and (len(sizes) != self.size or min(sizes) < 0 or sizes[self.rank] != t.shape[0]):
            raise TransportError(
                f"{what}: sizes {list(sizes)} do not fit {self.size} ranks and the {t.shape[0]} rows of rank {self.rank}; "
                "pass None to have them exchanged."
            )
        if self.size == 1:
            return Ready(shaped(t.detach().clone(), [t.shape[0]]))
        row = math.prod(t.shape[1:])
        result: list[tuple[torch.Tensor, list[int]]] = []

        def gather(comm: MPI.Comm, rows: list[int]) -> list[MPI.Request]:
            out = self._incoming(t, sum(rows))
            out.view(-1).narrow(0, sum(rows[: self.rank]) * row, flat.numel()).copy_(flat)
            result.append((out, rows))
            return start_allgather(comm, out, [r * row for r in rows])

        def finish() -> T:
            out, rows = result[0]
            return shaped(out.to(t.device), rows)

        if sizes is not None:
            return self._operations.start(what, gather(self._first, list(sizes)), finish)
        tag = _signature(what, t)
        announced = torch.tensor([[t.shape[0], tag]], dtype=torch.int64, device="cpu")
        replies = torch.empty((self.size, 2), dtype=torch.int64, device="cpu")
        request = self._first.Iallgather([memory_of(announced), 2, MPI.INT64_T], [memory_of(replies), 2, MPI.INT64_T])
        second = partial(self._after_agreeing, gather, replies, tag, t, what)
        return self._operations.start(what, [request], finish, second, keep=[announced, replies])

    def _after_agreeing(
        self, start: Callable[[MPI.Comm, list[int]], list[MPI.Request]], replies: torch.Tensor, tag: int, t: torch.Tensor, what: str
    ) -> list[MPI.Request]:
        """Start the second stage with the rows of the (rows, signature) pairs that came. Everybody's signature went to everybody, so all ranks raise
        or none."""
        rows, tags = replies.t().tolist()
        others = [r for r in range(self.size) if tags[r] != tag]
        if others:
            raise TransportError(
                f"{what}: rank {self.rank} passed {t.dtype}, shape {tuple(t.shape)}; ranks {others} passed another dtype or another shape beyond the "
                "first dimension, or started another collective here. All ranks must start the same collectives in the same order, with equal names."
            )
        return start(self._second, rows)

    # ---- memory

    def _flat(self, t: torch.Tensor, what: str) -> torch.Tensor:
        if t.layout != torch.strided or not t.is_contiguous():
            raise TransportError(
                f"{what}: the tensor of shape {tuple(t.shape)} is not dense and contiguous; pass t.contiguous(), or t.to_dense() if sparse."
            )
        return t.detach().view(-1)

    def _stages(self, t: torch.Tensor) -> bool:
        return t.device.type != "cpu" and not (self._cuda_aware and t.is_cuda)

    def _staged(self, flat: torch.Tensor) -> torch.Tensor:
        """`flat`, or a copy of it that MPI can read. The copy is complete on return: MPI knows nothing of streams."""
        return self._incoming(flat, None).copy_(flat) if self._stages(flat) else flat

    def _incoming(self, t: torch.Tensor, rows: int | None) -> torch.Tensor:
        """Memory that MPI can write, for a tensor like `t`, with another first dimension if `rows` is given."""
        shape = t.shape if rows is None else (rows, *t.shape[1:])
        if self._stages(t):
            return torch.empty(shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda)
        return torch.empty(shape, dtype=t.dtype, device=t.device)


def _combined(copies: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """The rows of `copies` reduced in order, halves in float32."""
    total = copies[0].to(torch.float32 if copies.dtype in _HALVES else copies.dtype, copy=True)
    for copy in copies[1:]:
        _COMBINE[op](total, copy)
    return total


def _signature(what: str, t: torch.Tensor) -> int:
    text = f"{what}|{t.dtype}|{tuple(t.shape[1:])}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
