"""Messages between two ranks, how what is large is cut, and what is made of them without arithmetic: all-to-all and all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.checksums import checksum

from ..environment import switch
from . import memory
from .lanes import Task
from .memory import memory_of

__all__ = ["CheckedMessages", "DamagedError", "Messages", "Pace", "are_checked", "exchange_parts", "messages_among_all"]

_SCRATCH = 16 * 2**20
"""Bytes for segments of others, in all lanes together: of more ranks they are shorter."""


@dataclass(frozen=True)
class Pace:
    """Bytes of a segment, at most and, where a tensor is as long on all ranks, at least; how many are on their way at once, to and from each rank."""

    bytes: int
    lanes: int
    shortest: int


FAR = Pace(60 * 2**10, 16, 16 * 2**10)
"""Just below what MPIs send over TCP without asking, as a question waits until the other rank looks; as many as a link takes meanwhile."""
NEAR = Pace(2**20, 4, 2**20)
"""In shared memory every message asks, so there are few of them, which caches can hold."""


class Messages:
    """Messages among `ranks` of `comm`, which are numbered anew in that order. All cut what is large alike."""

    def __init__(self, comm: MPI.Comm, ranks: Sequence[int], pace: Pace) -> None:
        self.comm, self.pace = comm, pace
        self.ranks = list(ranks)
        self.rank, self.size = self.ranks.index(comm.Get_rank()), len(self.ranks)
        self.peers = [(self.rank + k) % self.size for k in range(1, self.size)]
        """The other ranks, beginning with the next one, so that not all send to one rank first."""

    def others(self, ranks: Sequence[int], pace: Pace) -> Messages:
        """Messages of the same kind among other ranks of the communicator."""
        return type(self)(self.comm, ranks, pace)

    def segment(self, t: torch.Tensor) -> int:
        """Elements of a segment of what is like `t`."""
        room = _SCRATCH // (self.pace.lanes * self.size)
        return max(1, min(min(self.pace.bytes, room) // t.element_size(), memory.LARGEST))

    def even_segment(self, t: torch.Tensor) -> int:
        """Likewise where it is as long on all ranks: no longer than all lanes need to have one, so that little is left of it when the others end."""
        return min(self.segment(t), max(self.pace.shortest // t.element_size(), -(-t.numel() // self.pace.lanes)))

    def lanes(self, longest: torch.Tensor, size: int) -> list[range]:
        """Where segments of `size` elements begin in tensors of which `longest` is the longest: by lane, each of which takes one after the other."""
        lanes = self.pace.lanes
        return [range(k * size, longest.numel(), lanes * size) for k in range(min(lanes, -(-longest.numel() // size)))]

    def send(self, t: torch.Tensor, peer: int, tag: int) -> list[MPI.Request]:
        """Start to send a contiguous tensor of less than 2 GiB."""
        return [self.comm.Isend(memory_of(t), self.ranks[peer], tag)]

    def receive(self, t: torch.Tensor, peer: int, tag: int) -> list[MPI.Request]:
        """Start to receive into a contiguous tensor of less than 2 GiB."""
        return [self.comm.Irecv(memory_of(t), self.ranks[peer], tag)]

    def checked(self, tasks: list[Task]) -> list[Task]:
        """The tasks, which send and receive by this object, with a look at what has come, where that is looked at."""
        return tasks


class DamagedError(TransportError):
    """What a rank has received is not what was sent to it."""


class CheckedMessages(Messages):
    """After each message travels its checksum, in a message of the same tag, which can arrive after it only."""

    def __init__(self, comm: MPI.Comm, ranks: Sequence[int], pace: Pace) -> None:
        super().__init__(comm, ranks, pace)
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor, int | None]] = {}
        """By the request of a message whose task has not gone on yet: the message, its checksum, and who sends it, if another rank does."""

    def send(self, t: torch.Tensor, peer: int, tag: int) -> list[MPI.Request]:
        total = _packed(checksum(t))
        return self._held(super().send(t, peer, tag) + super().send(total, peer, tag), t, total, None)

    def receive(self, t: torch.Tensor, peer: int, tag: int) -> list[MPI.Request]:
        total = _packed(0)
        return self._held(super().receive(t, peer, tag) + super().receive(total, peer, tag), t, total, peer)

    def _held(self, requests: list[MPI.Request], t: torch.Tensor, total: torch.Tensor, sender: int | None) -> list[MPI.Request]:
        self._sums[id(requests[0])] = t, total, sender
        return requests

    def checked(self, tasks: list[Task]) -> list[Task]:
        return [self._checked(task) for task in tasks]

    def _checked(self, task: Task) -> Task:
        for awaited in task:
            assert isinstance(awaited, Sequence)  # of requests: what is exchanged lies where MPI can read it
            arriving = [self._sums.pop(id(request)) for request in awaited if id(request) in self._sums]
            yield awaited
            for t, total, sender in arriving:
                if sender is not None and _packed(checksum(t)) != total:
                    raise DamagedError(
                        f"what rank {self.ranks[sender]} sent has arrived changed, as its checksum says: the network between them, or the memory of "
                        "a machine, is faulty. Go on from the last checkpoint."
                    )


def _packed(total: int) -> torch.Tensor:
    return torch.tensor([total - 2**64 * (total >= 2**63)], dtype=torch.int64, device="cpu")


def are_checked() -> bool:
    """What MPI_BACKEND_CHECKSUM says. Raises ValueError unless it is 0 or 1."""
    return switch("MPI_BACKEND_CHECKSUM", default=False)


def messages_among_all(comm: MPI.Comm) -> Messages:
    """Among all ranks of `comm`. Collective."""
    assert isinstance(comm, MPI.Intracomm)
    host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    pace = NEAR if host.Get_size() == comm.Get_size() else FAR
    host.Free()
    return (CheckedMessages if are_checked() else Messages)(comm, range(comm.Get_size()), pace)


def exchange_parts(messages: Messages, tag: int, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> list[Task]:
    """Send the r-th of `outgoing` to each other rank r, and receive the r-th of `incoming` from it: flat tensors whose sizes both sides know."""
    if not messages.peers:
        return []
    longest = max((part[r] for part in (outgoing, incoming) for r in messages.peers), key=torch.numel)
    size = messages.segment(longest)

    def lane(tag: int, firsts: range) -> Task:
        for first in firsts:
            pieces_in = [(r, incoming[r][first : first + size]) for r in messages.peers]
            pieces_out = [(r, outgoing[r][first : first + size]) for r in messages.peers]
            requests = [q for r, piece in reversed(pieces_in) if piece.numel() for q in messages.receive(piece, r, tag)]
            yield requests + [q for r, piece in pieces_out if piece.numel() for q in messages.send(piece, r, tag)]

    return messages.checked([lane(tag + k, firsts) for k, firsts in enumerate(messages.lanes(longest, size))])
