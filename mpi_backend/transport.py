"""Transport over a private MPI communicator: CPU tensors in place, CUDA tensors directly or staged through pinned memory.

Importing this module imports `mpi4py.MPI`, which initialises MPI; `import mpi_backend` alone does not import it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Generic, Literal, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.base import Handle, Ready

from .environment import switch

__all__ = ["MPITransport", "Reduction", "cuda_aware"]

T = TypeVar("T")
Reduction = Literal["sum", "min", "max", "product"]

_LARGEST = 2**30
"""Elements in one message. Open MPI 5 has no calls with counts above a C int, so what is larger travels in pieces, or in larger units."""

_REDUCED_BY_MPI = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
_HALVES = (torch.float16, torch.bfloat16)  # MPI has no sum of these that rounds once
_SMALL = (torch.int8, torch.uint8, torch.int16)  # Open MPI's vector code saturates their sums, its scalar code wraps (open-mpi/ompi issue 8045)
_UNITS = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}  # by element size, where nothing is computed
_OPS = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX, "product": MPI.PROD}
_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sum": lambda total, t: total.add_(t),
    "min": lambda total, t: torch.minimum(total, t.to(total.dtype), out=total),
    "max": lambda total, t: torch.maximum(total, t.to(total.dtype), out=total),
    "product": lambda total, t: total.mul_(t),
}


@cache
def _wide_unit(element_size: int, elements: int) -> MPI.Datatype:
    return _UNITS[element_size].Create_contiguous(elements).Commit()


def cuda_aware() -> bool:
    """Whether MPI may be handed CUDA memory: `MPI_BACKEND_CUDA_AWARE` (0 or 1) if set, else what Open MPI says of itself, else no."""
    if os.environ.get("MPI_BACKEND_CUDA_AWARE"):
        return switch("MPI_BACKEND_CUDA_AWARE")
    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (AttributeError, OSError):
        return False


class _Operation(Generic[T]):
    """A started collective: the requests of its first stage, and perhaps a second stage still to be launched.

    `finish` makes the result once all requests are complete; it and `second` hold every buffer that MPI reads or writes.
    """

    def __init__(
        self,
        transport: MPITransport,
        number: int,
        turn: int | None,
        what: str,
        requests: list[MPI.Request],
        finish: Callable[[], T],
        second: Callable[[], list[MPI.Request]] | None,
        statuses: list[MPI.Status] | None,
    ) -> None:
        self.number = number
        self.turn = turn  # among the collectives, equal on all ranks; None: between two ranks
        self.what = what
        self._transport = transport
        self._requests = requests
        self._finish: Callable[[], T] | None = finish
        self._second = second
        self._statuses = statuses
        self._result: T | None = None
        self._error: TransportError | None = None

    def done(self) -> bool:
        if self._finish is not None:
            self._transport.progress()
        return self.quiet()

    def wait(self) -> T:
        if self._finish is not None and self._error is None:
            self._transport.blocked = self
            try:
                self._transport.progress(through=self.number)
                self.complete(block=True)
            finally:
                self._transport.blocked = None
        if self._finish is not None and self._error is None:
            try:
                self._result = self._finish()
            except TransportError as error:
                self._error = error
            self._finish = None
            self._transport.sweep()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by `finish`, whose type is T

    def quiet(self) -> bool:
        """Whether MPI has nothing more to do here. Does not start anything."""
        return self._error is not None or (self._second is None and self.complete(block=False))

    def launch(self, block: bool) -> bool:
        """Start the second stage if the first is complete, or (`block`) as soon as it is. False if it has to come later."""
        if not self.complete(block):
            return False
        second, self._second = self._second, None
        if second is not None and self._error is None:
            try:
                self._requests = second()
            except TransportError as error:
                self._error = error
            except MPI.Exception as error:
                self._fail(error)
        return True

    def complete(self, block: bool) -> bool:
        """Whether the requests of the stage in progress are complete (or have failed)."""
        if not self._requests:
            return True
        try:
            complete = MPI.Request.Waitall(self._requests, self._statuses) if block else MPI.Request.Testall(self._requests, self._statuses)
        except MPI.Exception as error:
            self._fail(error)
            complete = True
        if complete:
            self._requests = []
        return complete

    def _fail(self, error: MPI.Exception) -> None:
        self._error = TransportError(
            f"{self.what} failed in MPI: {error.Get_error_string()}. Every rank must start the same collectives in the same order, with equal "
            "dtypes and matching sizes; a truncated message, or an error in a status, means that another rank sent more than was expected here."
        )


class MPITransport:
    """Collectives over a private duplicate of `comm` (default: all processes), as `hvd_ecsgd.transport.base.Transport` describes them.

    Creating one is collective: every process of `comm` must do so, in the same order. Calls start the communication and return; a handle's `done`
    and `wait` carry it on, for every operation in flight, as does every further call. There is no thread: while a process does none of these, its
    second stages (below) stand still, and so may those who wait for it. A transport is to be used by one thread at a time.

    Tensors are contiguous, of any dtype (`allreduce_` says which it reduces), on the CPU or a CUDA device. CPU tensors are read and written in
    place by MPI. CUDA tensors are handed to MPI directly if `cuda_aware()`, else copied through pinned host memory; the call then waits for
    that copy, and `wait` for the copy back.

    Raises `TransportError` for a tensor that is not dense and contiguous or cannot be reduced, for sizes that cannot be right, and, from the
    handle, for whatever MPI reports. Except where sizes are exchanged, nothing is compared between ranks: this is the fast path.

    Why operations of two stages are safe. Collectives of one communicator must be started in the same order on every rank, and a second stage
    starts when its first is seen to be complete, which is a matter of timing. So second stages have a communicator of their own, and are launched
    in the order in which their operations were started, whatever completes first. Nobody waits for ever: before a rank blocks in an operation it
    launches all second stages up to and including it, so of all operations that somebody is blocked in, the earliest has been launched everywhere.
    """

    rank: int
    size: int
    divisor: int

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        parent = MPI.COMM_WORLD if comm is None else comm
        self._first = parent.Dup()
        self._second = parent.Dup()
        self.rank = self._first.Get_rank()
        self.size = self.divisor = self._first.Get_size()
        self._cuda_aware = cuda_aware()
        self.blocked: _Operation[Any] | None = None
        """What a caller waits for at this moment; others may look."""
        self.user: Callable[[], Any] = lambda: None
        """A reference to the optimizer that this serves, for messages."""
        self._numbers = itertools.count()
        self._turns = 0
        self._abandoned = False
        self._in_flight: deque[_Operation[Any]] = deque()  # in start order; keeps the buffers of handles that were dropped
        self._unlaunched: deque[_Operation[Any]] = deque()  # those with a second stage to come, in start order

    # ---- the protocol

    def allreduce_(self, t: torch.Tensor, name: str, op: Reduction = "sum") -> Handle[torch.Tensor]:
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
        requests = [self._first.Iallreduce(MPI.IN_PLACE, [_memory(piece), piece.numel(), kind], _OPS[op]) for piece in torch.split(work, _LARGEST)]
        return self._start(what, requests, finish)

    def reduce_scatter(self, t: torch.Tensor, counts: Sequence[int], name: str, op: Reduction = "sum") -> Handle[torch.Tensor]:
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
        request = self._first.Ialltoallv(_spec(work, counts, what), _spec(copies, received, what))
        return self._start(what, [request], lambda: self._delivered(_combined(copies, op).to(t.dtype), t, work))

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
        result: list[tuple[torch.Tensor, list[int]]] = []

        def exchange(comm: MPI.Comm, rows: list[int]) -> list[MPI.Request]:
            out = self._incoming(t, sum(rows))
            result.append((out, rows))
            return [comm.Ialltoallv(_spec(work, [s * row for s in splits], what), _spec(out, [r * row for r in rows], what))]

        def finish() -> list[torch.Tensor]:
            out, rows = result[0]
            return list(torch.split(self._delivered(out, t, work), rows))

        if received is not None:
            return self._start(what, exchange(self._first, list(received)), finish)
        tag = _signature(what, t)
        announced = torch.tensor([[s, tag] for s in splits])
        replies = torch.empty_like(announced)
        request = self._first.Ialltoall([_memory(announced), 2, MPI.INT64_T], [_memory(replies), 2, MPI.INT64_T])
        return self._start(what, [request], finish, lambda: exchange(self._second, self._agreed(replies, announced, tag, t, what)))

    def sendrecv(self, t: torch.Tensor, peer: int, name: str) -> Handle[torch.Tensor]:
        """Exchange tensors of one shape and dtype with `peer` (which names this rank as its peer); the result is a new tensor.

        Exchanges between two ranks match in the order in which both start them. If the peer's tensor has another size, `wait` raises.
        """
        what = f"sendrecv {name!r} with rank {peer}"
        flat = self._flat(t, what)
        self._check_rank(peer, "peer", what)
        if peer == self.rank:
            return Ready(t.detach().clone())
        work = self._staged(flat)
        out = self._incoming(t, None)
        unit = _UNITS[t.element_size()]
        pieces = torch.split(out.view(-1), _LARGEST)
        requests = [self._first.Irecv([_memory(piece), piece.numel(), unit], peer) for piece in pieces]
        requests += [self._first.Isend([_memory(piece), piece.numel(), unit], peer) for piece in torch.split(work, _LARGEST)]
        statuses = [MPI.Status() for _ in requests]

        def finish() -> torch.Tensor:
            came = sum(status.Get_count(unit) for status, _ in zip(statuses, pieces, strict=False))
            if came != out.numel():
                raise TransportError(
                    f"{what}: expected {out.numel()} elements of {out.dtype}, as sent, but {came} came; both must pass one shape and dtype."
                )
            return self._delivered(out, t, work)

        return self._start(what, requests, finish, statuses=statuses, collective=False)

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        """Root's values, in place; the result is `t`. Shape and dtype must be equal on every rank."""
        what = f"broadcast_ {name!r} from rank {root}"
        flat = self._flat(t, what)
        self._check_rank(root, "root", what)
        if self.size == 1 or flat.numel() == 0:
            return Ready(t)
        work = self._staged(flat)
        unit = _UNITS[t.element_size()]
        requests = [self._first.Ibcast([_memory(piece), piece.numel(), unit], root) for piece in torch.split(work, _LARGEST)]

        def finish() -> torch.Tensor:
            if work is not flat and root != self.rank:
                flat.copy_(work)
            return t

        return self._start(what, requests, finish)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._start("barrier", [self._first.Ibarrier()], lambda: None).wait()

    def abandon(self) -> None:
        """Something in flight will never be complete: `close` does not wait for it, and its buffers stay, as MPI may write to them until the end."""
        if not self._abandoned:
            self._abandoned = True
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def close(self) -> None:
        """Complete what is in flight and free the communicators; collective. The transport must not be used afterwards."""
        if self._abandoned:
            return
        self.progress(through=next(self._numbers))
        while self._in_flight:
            self._in_flight.popleft().complete(block=True)
        self._first.Free()
        self._second.Free()

    # ---- starting and progress

    def submitted(self) -> int:
        """How many of its collectives, in the order that is equal on all ranks, need no further call of this rank."""
        return next((o.turn for o in list(self._unlaunched) if o.turn is not None), self._turns)

    def started_beyond(self, turn: int) -> str | None:
        """If this rank has started its collective number `turn`, what it is. Another thread may ask."""
        if turn >= self._turns:
            return None
        with contextlib.suppress(RuntimeError):  # the queue changed meanwhile
            for operation in self._in_flight:
                if operation.turn == turn:
                    return operation.what
        return f"collective number {turn}"

    def progress(self, through: int = -1) -> None:
        """Launch second stages in start order: those whose turn has come, and, blocking, those of operations numbered up to `through`."""
        while self._unlaunched and self._unlaunched[0].launch(block=self._unlaunched[0].number <= through):
            self._unlaunched.popleft()

    def sweep(self) -> None:
        """Let go of the operations that MPI is done with, in start order up to the first that it is not."""
        while self._in_flight and self._in_flight[0].quiet():
            self._in_flight.popleft()

    def _start(
        self,
        what: str,
        requests: list[MPI.Request],
        finish: Callable[[], T],
        second: Callable[[], list[MPI.Request]] | None = None,
        statuses: list[MPI.Status] | None = None,
        collective: bool = True,
    ) -> _Operation[T]:
        turn = self._turns if collective else None
        self._turns += collective
        operation = _Operation(self, next(self._numbers), turn, what, requests, finish, second, statuses)
        self._in_flight.append(operation)
        if second is not None:
            self._unlaunched.append(operation)
        self.progress()
        self.sweep()
        return operation

    # ---- parts of the collectives

    def _allreduce_chunks(self, work: torch.Tensor, what: str, op: Reduction, finish: Callable[[], torch.Tensor]) -> Handle[torch.Tensor]:
        pieces: list[tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]] = []
        requests = []
        for piece in torch.split(work, _LARGEST):
            length = -(-piece.numel() // self.size)
            chunks = [max(0, min(length, piece.numel() - r * length)) for r in range(self.size)]
            mine = piece.narrow(0, sum(chunks[: self.rank]), chunks[self.rank])
            copies = piece.new_empty((self.size, mine.numel()))
            requests.append(self._first.Ialltoallv(_spec(piece, chunks, what), _spec(copies, [mine.numel()] * self.size, what)))
            pieces.append((piece, chunks, mine, copies))

        def second() -> list[MPI.Request]:
            requests = []
            for piece, chunks, mine, copies in pieces:
                mine.copy_(_combined(copies, op))
                requests.append(self._second.Iallgatherv(MPI.IN_PLACE, _spec(piece, chunks, what)))
            return requests

        return self._start(what, requests, finish, second)

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
            return [comm.Iallgatherv(MPI.IN_PLACE, _spec(out, [r * row for r in rows], what))]

        def finish() -> T:
            out, rows = result[0]
            return shaped(self._delivered(out, t, flat), rows)

        if sizes is not None:
            return self._start(what, gather(self._first, list(sizes)), finish)
        tag = _signature(what, t)
        announced = torch.tensor([[t.shape[0], tag]])
        replies = torch.empty((self.size, 2), dtype=torch.int64)
        request = self._first.Iallgather([_memory(announced), 2, MPI.INT64_T], [_memory(replies), 2, MPI.INT64_T])
        return self._start(what, [request], finish, lambda: gather(self._second, self._agreed(replies, announced, tag, t, what)))

    def _agreed(self, replies: torch.Tensor, announced: torch.Tensor, tag: int, t: torch.Tensor, what: str) -> list[int]:
        """The rows of the (rows, signature) pairs that came. Everybody's signature went to everybody, so all ranks raise or none.

        Being an argument keeps `announced` alive in the closure that calls this.
        """
        rows, tags = replies.t().tolist()
        others = [r for r in range(self.size) if tags[r] != tag]
        if others:
            raise TransportError(
                f"{what}: rank {self.rank} passed {t.dtype}, shape {tuple(t.shape)}; ranks {others} passed another dtype or another shape beyond the "
                "first dimension, or started another collective here. All ranks must start the same collectives in the same order, with equal names."
            )
        return rows  # type: ignore[no-any-return]

    # ---- memory

    def _flat(self, t: torch.Tensor, what: str) -> torch.Tensor:
        if t.layout != torch.strided or not t.is_contiguous():
            raise TransportError(
                f"{what}: the tensor of shape {tuple(t.shape)} is not dense and contiguous; pass t.contiguous(), or t.to_dense() if sparse."
            )
        return t.detach().view(-1)

    def _check_rank(self, rank: int, role: str, what: str) -> None:
        if not 0 <= rank < self.size:
            raise TransportError(f"{what}: there are {self.size} ranks; expected a {role} from 0 to {self.size - 1}.")

    def _stages(self, t: torch.Tensor) -> bool:
        return t.device.type != "cpu" and not (self._cuda_aware and t.is_cuda)

    def _staged(self, flat: torch.Tensor) -> torch.Tensor:
        """`flat`, or a copy of it that MPI can read. The copy is complete on return: MPI knows nothing of streams."""
        return self._incoming(flat, None).copy_(flat) if self._stages(flat) else flat

    def _incoming(self, t: torch.Tensor, rows: int | None) -> torch.Tensor:
        """Memory that MPI can write, for a tensor like `t`, with another first dimension if `rows` is given."""
        shape = t.shape if rows is None else (rows, *t.shape[1:])
        if self._stages(t):
            return torch.empty(shape, dtype=t.dtype, pin_memory=t.is_cuda)
        return torch.empty(shape, dtype=t.dtype, device=t.device)

    def _delivered(self, out: torch.Tensor, t: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """`out` where the caller works. Being an argument keeps `sent` alive in the closure that calls this."""
        return out.to(t.device)


def _combined(copies: torch.Tensor, op: Reduction) -> torch.Tensor:
    """The rows of `copies` reduced in order, halves in float32."""
    total = copies[0].to(torch.float32 if copies.dtype in _HALVES else copies.dtype, copy=True)
    for copy in copies[1:]:
        _COMBINE[op](total, copy)
    return total


def _memory(t: torch.Tensor) -> MPI.buffer:
    """The memory of a contiguous tensor, on any device: MPI gets its address. Does not keep the tensor alive."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()  # MPI knows nothing of streams: what writes this memory, or still reads it, must be over
    return MPI.buffer.fromaddress(t.data_ptr(), t.numel() * t.element_size())


def _spec(t: torch.Tensor, counts: list[int], what: str) -> list[Any]:
    """`t` as consecutive parts of `counts` elements. The unit grows as needed for counts and displacements to fit MPI's integers."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    unit = _UNITS[t.element_size()]
    if max(t.numel(), *counts) > _LARGEST:
        common = math.gcd(*counts)
        factor = next((common // d for d in range(1, common + 1) if common % d == 0 and common // d <= _LARGEST), 1)
        if t.numel() // factor > _LARGEST:
            raise TransportError(
                f"{what}: parts of {counts} elements exceed what MPI can count ({_LARGEST}) and have no large common factor; "
                "send less at a time, or pad the parts to a multiple of 8 or more."
            )
        unit = _wide_unit(t.element_size(), factor)
        counts, starts = [c // factor for c in counts], [s // factor for s in starts]
    return [_memory(t), (counts, starts), unit]


def _signature(what: str, t: torch.Tensor) -> int:
    text = f"{what}|{t.dtype}|{tuple(t.shape[1:])}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
