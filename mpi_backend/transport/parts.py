"""All-to-all and all-gather of parts of any size: what exceeds MPI's counts travels in pieces, between the two ranks or by broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI

from . import memory
from .memory import memory_of, parts_of, unit_of

__all__ = ["start_allgather", "start_alltoall"]

_TAG = 1
"""Of pieces, apart from other messages between two ranks."""


@dataclass(frozen=True)
class Delivery:
    """What is left to do when all requests of an all-to-all are complete. Call it then, and keep it until then."""

    parts: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    """Where a part belongs, and the copy of it that MPI writes."""
    sent: torch.Tensor | None = None
    """The copy that MPI reads."""

    def __call__(self) -> None:
        for target, part in self.parts:
            target.copy_(part)


def start_alltoall(
    comm: MPI.Comm, sent: torch.Tensor, counts: Sequence[int], out: torch.Tensor, received: Sequence[int]
) -> tuple[list[MPI.Request], Delivery]:
    """Start to send consecutive parts of `counts` elements, and to receive such of `received` elements into `out`; what is left to do in the end.

    Counts and displacements of MPI are C ints. So a part of more than its share of the largest message travels by itself, in pieces: that is known
    to the two ranks that it concerns, and need not be to others. The rest travels as ever; out of a tensor that is too long to count, as a copy.
    Both tensors, and what is returned, are to be kept until it has been called.
    """
    n, rank = comm.Get_size(), comm.Get_rank()
    share = -(-memory.LARGEST // n)
    sent, out = sent.view(-1), out.view(-1)
    if max(*counts, *received) <= share and max(sent.numel(), out.numel()) <= n * share:
        return [comm.Ialltoallv(parts_of(sent, counts), parts_of(out, received))], Delivery()
    unit, requests = unit_of(sent), []
    outgoing, incoming = torch.split(sent, list(counts)), torch.split(out, list(received))
    for peer in range(n):
        if peer == rank and counts[rank] > share:
            incoming[rank].copy_(outgoing[rank])
            continue
        if received[peer] > share:
            requests += [comm.Irecv([memory_of(piece), piece.numel(), unit], peer, _TAG) for piece in torch.split(incoming[peer], memory.LARGEST)]
        if counts[peer] > share:
            requests += [comm.Isend([memory_of(piece), piece.numel(), unit], peer, _TAG) for piece in torch.split(outgoing[peer], memory.LARGEST)]
    few = [0 if c > share else c for c in counts]
    few_in = [0 if c > share else c for c in received]
    short = torch.cat([part for part, c in zip(outgoing, few, strict=True) if c] or [sent[:0]])
    short_in = out.new_empty(sum(few_in))
    requests.append(comm.Ialltoallv(parts_of(short, few), parts_of(short_in, few_in)))

    parts = [(target, part) for target, part in zip(incoming, torch.split(short_in, few_in), strict=True) if part.numel()]
    return requests, Delivery(parts, short)


def start_allgather(comm: MPI.Comm, out: torch.Tensor, counts: Sequence[int]) -> list[MPI.Request]:
    """Start to gather consecutive parts of `counts` elements, equal on all ranks, in `out`, where this rank's own part is already."""
    out = out.view(-1)
    if out.numel() <= memory.LARGEST:
        return [comm.Iallgatherv(MPI.IN_PLACE, parts_of(out, counts))]
    unit = unit_of(out)
    pieces = [(r, piece) for r, part in enumerate(torch.split(out, list(counts))) if part.numel() for piece in torch.split(part, memory.LARGEST)]
    return [comm.Ibcast([memory_of(piece), piece.numel(), unit], root) for root, piece in pieces]
