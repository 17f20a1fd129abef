"""Transport over a private MPI communicator: CPU tensors in place, CUDA tensors directly or staged through pinned memory.

Importing this module imports `mpi4py.MPI`, which initialises MPI; `import mpi_backend` alone does not import it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.base import Handle, Ready
from hvd_ecsgd.transport.devices import marks_of, wait_for

from . import memory
from .lanes import Stages, Task, after
from .link import Link
from .memory import Copy, Staging, memory_of, settle, unit_of
from .messages import Messages, exchange_parts
from .reduction import REDUCIBLE, ReduceOp, allreduce_tasks, forced_algorithm, mpi_adds, reduce_scatter_tasks

__all__ = ["MPITransport", "ReduceOp"]

T = TypeVar("T")


class MPITransport:
    """Collectives over a private duplicate of `comm` (default: all processes), as `hvd_ecsgd.transport.base.Transport` describes them.

    Creating one is collective, unless the `link` of one that is used no more is given: every process of `comm` must do so, in the same order.
    Calls start the communication and return; a handle's `done` and `wait` carry it on, for every operation in flight on any transport of the process.
    There is no thread: while a process does none of these, its operations stand still, and so may those who wait for it.
    A transport is to be used by one thread at a time.

    Tensors are contiguous, of any dtype (`allreduce_` says which it reduces), on the CPU or a CUDA device. CPU tensors are read and written in
    place by MPI. CUDA tensors are handed to MPI directly if `cuda_aware()`, else copied through pinned host memory, in a stream of their own: nobody
    waits for the copy but the collective (a broadcast does), and what `wait` gives is being copied back in the current stream.

    Raises `TransportError` for a tensor that is not dense and contiguous or cannot be reduced, for sizes that cannot be right, and, from the
    handle, for whatever MPI reports. Except where sizes are exchanged, nothing is compared between ranks: this is the fast path.
    """

    rank: int
    size: int
    divisor: int
    link: Link

    def __init__(self, comm: MPI.Comm | None = None, link: Link | None = None, algorithm: str | None = None) -> None:
        self._staging = Staging()
        self._algorithm = forced_algorithm(algorithm)
        self.be_on(Link(MPI.COMM_WORLD if comm is None else comm) if link is None else link)

    def be_on(self, link: Link) -> None:
        """Go on on another link, whose ranks may be fewer. What is in flight on the one before stays there."""
        self.link, self._operations = link, link.operations
        self._be_among(link.messages)

    def _be_among(self, messages: Messages) -> None:
        """Whose collectives these are."""
        self._messages = messages
        self.rank = messages.rank
        self.size = self.divisor = messages.size

    # ---- the protocol

    def allreduce_(self, t: torch.Tensor, name: str, op: ReduceOp = "sum") -> Handle[torch.Tensor]:
        """Reduce over ranks, in place; the result is `t`. Shape and dtype must be equal on every rank.

        Types: `reduction.REDUCIBLE`. Elements are combined in the order of ranks, so every rank receives the same bits, down to those of NaNs, and
        they depend neither on timing nor on where in a tensor an element is. Halves are added in float32 and rounded once; small integers wrap.
        How: `reduction`; MPI_BACKEND_ALLREDUCE forces an algorithm. A type that it cannot reduce is a `TransportError`.
        """
        what = f"allreduce_ {name!r}"
        flat = self._flat(t, what)
        self._check_reducible(t, what)
        if self.size == 1 or flat.numel() == 0:
            return Ready(t)
        work, copy = self._staging.readable(flat)
        if self._algorithm == "mpi" and not mpi_adds(work):
            raise TransportError(
                f"{what}: the MPI library, which MPI_BACKEND_ALLREDUCE=mpi forces, cannot reduce {t.dtype} on {work.device.type}. "
                "Unset the variable on all ranks, or set it to direct."
            )

        def finish() -> torch.Tensor:
            if work is not flat:
                flat.copy_(work, non_blocking=True)
            return t

        if copy is not None and self._algorithm == "mpi":
            copy.wait()  # MPI matches collectives of its own by their order
            copy = None
        return self._operations.start(what, lambda tag: after(copy, lambda: self._reduce_stages(tag, work, op)), finish)

    def reduce_scatter(self, t: torch.Tensor, counts: Sequence[int], name: str, op: ReduceOp = "sum") -> Handle[torch.Tensor]:
        """Reduce over ranks; rank r gets the r-th part of `counts[r]` elements, a new 1-D tensor. The bits are those of `allreduce_`.

        Shape and dtype must be equal on every rank; the dtypes are those of `allreduce_`. `t` is only read.
        """
        what = f"reduce_scatter {name!r}"
        flat, counts = self._flat(t, what), list(counts)
        self._check_reducible(t, what)
        if len(counts) != self.size or min(counts) < 0 or sum(counts) != flat.numel():
            raise TransportError(f"{what}: parts of {counts} elements do not fit {self.size} ranks and a tensor of {flat.numel()} elements.")
        if self.size == 1:
            return Ready(flat.clone())
        work, copy = self._staging.readable(flat)
        parts = torch.split(work, counts)
        out = torch.empty_like(parts[self.rank])
        return self._operations.start(
            what,
            lambda tag: after(copy, lambda: iter([reduce_scatter_tasks(self._messages, tag, parts, out, op)])),
            lambda: out.to(t.device, non_blocking=True),
            keep=parts,
        )

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
        row = math.prod(t.shape[1:])

        def outgoing(mine: torch.Tensor) -> tuple[Sequence[torch.Tensor], Copy | None]:
            work, copy = self._staging.readable(flat)
            return torch.split(work, [s * row for s in splits]), copy

        return self._exchange(what, t, splits, received, outgoing, lambda out, rows: list(torch.split(out, rows)))

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        """Root's values, in place; the result is `t`. Shape and dtype must be equal on every rank."""
        what = f"broadcast_ {name!r} from rank {root}"
        flat = self._flat(t, what)
        if not 0 <= root < self.size:
            raise TransportError(f"{what}: there are {self.size} ranks; expected a root from 0 to {self.size - 1}.")
        if self.size == 1 or flat.numel() == 0:
            return Ready(t)
        work, copy = self._staging.readable(flat)
        if copy is not None:
            copy.wait()  # MPI matches collectives of its own by their order
        unit = unit_of(t)

        def task() -> Task:
            world = self._root(root)
            yield [self._messages.comm.Ibcast([memory_of(piece), piece.numel(), unit], world) for piece in torch.split(work, memory.LARGEST)]

        def finish() -> torch.Tensor:
            if work is not flat and root != self.rank:
                flat.copy_(work, non_blocking=True)
            return t

        return self._operations.start(what, lambda tag: iter([[task()]]), finish)

    def abandon(self) -> None:
        """Something in flight will never be complete: `close` does not wait for it."""
        self.link.abandon()

    def close(self) -> None:
        """Complete what is in flight and free the communicators; collective. The transport must not be used afterwards."""
        self.link.close()

    # ---- parts of the collectives

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

        def outgoing(mine: torch.Tensor) -> tuple[Sequence[torch.Tensor], Copy | None]:
            copy = Copy(flat, mine) if self._staging.needed(flat) else None
            if copy is None:
                mine.copy_(flat)
            return [mine] * self.size, copy

        return self._exchange(what, t, [t.shape[0]] * self.size, sizes, outgoing, shaped)

    def _exchange(
        self,
        what: str,
        t: torch.Tensor,
        told: Sequence[int],
        sizes: Sequence[int] | None,
        outgoing: Callable[[torch.Tensor], tuple[Sequence[torch.Tensor], Copy | None]],
        shaped: Callable[[torch.Tensor, list[int]], T],
    ) -> Handle[T]:
        """Receive `sizes[r]` rows like those of `t` from rank r, which has been told so, or (None) is told `told[r]`.

        `outgoing`: the flat parts that are sent, by rank, of which this rank's own may be the place that it is given, and the copy after which they
        are there. `shaped` makes the result.
        """
        result: list[tuple[torch.Tensor, list[int]]] = []
        given = marks_of([t])

        def exchange(tag: int, rows: list[int]) -> Stages:
            wait_for(given)  # another thread may have come here
            out = self._staging.writable(t, sum(rows))
            result.append((out, rows))
            row = math.prod(t.shape[1:])
            incoming = torch.split(out.view(-1), [r * row for r in rows])
            mine = incoming[self.rank]
            parts, copy = outgoing(mine)

            def stages() -> Stages:
                if parts[self.rank] is not mine:
                    mine.copy_(parts[self.rank])
                settle(mine)
                return self._exchange_stages(tag, parts, incoming)

            return after(copy, stages)

        def agree(tag: int) -> Stages:
            signature = _signature(what, t)
            announced = torch.tensor([[n, signature] for n in told], dtype=torch.int64, device="cpu")
            replies = announced.clone()
            yield self._messages.checked([self._tell(tag, announced, replies)])
            yield from exchange(tag + 1, self._agreed(replies, signature, t, what))

        def finish() -> T:
            out, rows = result[0]
            return shaped(out.to(t.device, non_blocking=True), rows)

        return self._operations.start(what, lambda tag: agree(tag) if sizes is None else exchange(tag, list(sizes)), finish)

    def _reduce_stages(self, tag: int, t: torch.Tensor, op: ReduceOp) -> Stages:
        return iter([allreduce_tasks(self._messages, tag, t, op, self._algorithm)])

    def _exchange_stages(self, tag: int, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> Stages:
        return iter([exchange_parts(self._messages, tag, outgoing, incoming)])

    def _tell(self, tag: int, announced: torch.Tensor, replies: torch.Tensor) -> Task:
        requests = [q for r in self._messages.peers for q in self._messages.receive(replies[r], r, tag)]
        yield requests + [q for r in self._messages.peers for q in self._messages.send(announced[r], r, tag)]

    def _root(self, root: int) -> int:
        """Its rank in the communicator."""
        return root

    def _agreed(self, replies: torch.Tensor, signature: int, t: torch.Tensor, what: str) -> list[int]:
        """The rows of the (rows, signature) pairs that came. Everybody's signature went to everybody, so all ranks raise or none."""
        rows, signatures = replies.t().tolist()
        others = [r for r in range(self.size) if signatures[r] != signature]
        if others:
            raise TransportError(
                f"{what}: rank {self.rank} passed {t.dtype}, shape {tuple(t.shape)}; ranks {others} passed another dtype or another shape beyond the "
                "first dimension, or started another collective here. All ranks must start the same collectives in the same order, with equal names."
            )
        return rows  # type: ignore[no-any-return]

    def _check_reducible(self, t: torch.Tensor, what: str) -> None:
        if t.dtype not in REDUCIBLE:
            known = ", ".join(map(str, REDUCIBLE))
            raise TransportError(f"{what}: {t.dtype} cannot be reduced; expected one of {known}. Convert it first.")

    def _flat(self, t: torch.Tensor, what: str) -> torch.Tensor:
        if t.layout != torch.strided or not t.is_contiguous():
            raise TransportError(
                f"{what}: the tensor of shape {tuple(t.shape)} is not dense and contiguous; pass t.contiguous(), or t.to_dense() if sparse."
            )
        return t.detach().view(-1)


def _signature(what: str, t: torch.Tensor) -> int:
    text = f"{what}|{t.dtype}|{tuple(t.shape[1:])}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
