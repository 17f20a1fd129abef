"""Messages between two ranks, how what is large is cut, and what is made of them without arithmetic: all-to-all and all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI

from . import memory
from .lanes import Task
from .memory import memory_of

__all__ = ["Messages", "Pace", "exchange_parts"]

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

    @classmethod
    def everybody(cls, comm: MPI.Comm) -> Messages:
        """Among all ranks of `comm`. Collective."""
        assert isinstance(comm, MPI.Intracomm)
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        pace = NEAR if host.Get_size() == comm.Get_size() else FAR
        host.Free()
        return cls(comm, range(comm.Get_size()), pace)

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

    def send(self, t: torch.Tensor, peer: int, tag: int) -> MPI.Request:
        """Start to send a contiguous tensor of less than 2 GiB."""
        return self.comm.Isend(memory_of(t), self.ranks[peer], tag)

    def receive(self, t: torch.Tensor, peer: int, tag: int) -> MPI.Request:
        """Start to receive into a contiguous tensor of less than 2 GiB."""
        return self.comm.Irecv(memory_of(t), self.ranks[peer], tag)


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
            requests = [messages.receive(piece, r, tag) for r, piece in reversed(pieces_in) if piece.numel()]
            yield requests + [messages.send(piece, r, tag) for r, piece in pieces_out if piece.numel()]

    return [lane(tag + k, firsts) for k, firsts in enumerate(messages.lanes(longest, size))]
