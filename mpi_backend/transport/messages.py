"""Messages between two ranks, of any size, and what is made of them without arithmetic: all-to-all and all-gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from mpi4py import MPI

from . import memory
from .memory import memory_of
from .operation import Task

__all__ = ["LANES", "exchange_parts", "lanes", "peers", "receive", "segment", "send"]

LANES = 16
"""Segments of a collective that are on their way at once, to and from each rank: what a link takes while the ranks do not look."""
_BYTES = 60 * 2**10
"""Of a message, where what is large is cut: just below what MPIs send over TCP without asking, as a question waits until the other rank looks."""
_SCRATCH = 16 * 2**20
"""Bytes for segments of others in all lanes together: of more ranks they are shorter."""


def segment(t: torch.Tensor, n: int) -> int:
    """Elements of a message, where what is large is cut, among n ranks: alike on all of them."""
    return max(1, min(min(_BYTES, _SCRATCH // (LANES * n)) // t.element_size(), memory.LARGEST))


def lanes(longest: int, size: int) -> list[range]:
    """Where segments of `size` elements begin in what has at most `longest`: by lane, each of which takes one after the other."""
    return [range(k * size, longest, LANES * size) for k in range(min(LANES, -(-longest // size)))]


def peers(comm: MPI.Comm) -> Iterator[int]:
    """The other ranks, beginning with the next one, so that not all send to one rank first."""
    rank, size = comm.Get_rank(), comm.Get_size()
    return ((rank + k) % size for k in range(1, size))


def send(comm: MPI.Comm, t: torch.Tensor, peer: int, tag: int) -> MPI.Request:
    """Start to send a contiguous tensor of less than 2 GiB."""
    return comm.Isend(memory_of(t), peer, tag)


def receive(comm: MPI.Comm, t: torch.Tensor, peer: int, tag: int) -> MPI.Request:
    """Start to receive into a contiguous tensor of less than 2 GiB."""
    return comm.Irecv(memory_of(t), peer, tag)


def exchange_parts(comm: MPI.Comm, tag: int, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> list[Task]:
    """Send the r-th of `outgoing` to each other rank r, and receive the r-th of `incoming` from it: flat tensors whose sizes both sides know."""
    n = comm.Get_size()
    longest = max(max(outgoing[r].numel(), incoming[r].numel()) for r in peers(comm))
    size = segment(incoming[0], n)

    def lane(k: int, firsts: range) -> Task:
        for first in firsts:
            pieces_in = [(r, incoming[r][first : first + size]) for r in peers(comm)]
            pieces_out = [(r, outgoing[r][first : first + size]) for r in peers(comm)]
            requests = [receive(comm, piece, r, tag + k) for r, piece in reversed(pieces_in) if piece.numel()]
            yield requests + [send(comm, piece, r, tag + k) for r, piece in pieces_out if piece.numel()]

    return [lane(k, firsts) for k, firsts in enumerate(lanes(longest, size))]
