"""One process that stands for many: whatever it sends comes back as if every worker had sent the same. It keeps a list of what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import Handle, Ready

__all__ = ["EchoTransport", "Sent"]


@dataclass(frozen=True)
class Sent:
    """A collective: `allreduce`, `allgather`, `alltoall` or `broadcast`, and the bytes of this worker's tensor."""

    operation: str
    bytes: int


class EchoTransport:
    """Worker `rank` of `size`, and no others: what compressing and decoding cost without a network. The sum of an all-reduce is left to be this
    worker's, as adding is the network's work; where others would send another number of rows, these are zeros. `sent` grows."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.divisor = size
        self.sent: list[Sent] = []

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        self.sent.append(Sent("allreduce", t.nbytes))
        return Ready(t)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        self.sent.append(Sent("allgather", t.nbytes))
        return Ready(_of_lengths(t, [t.shape[0]] * self.size if sizes is None else sizes))

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        self.sent.append(Sent("alltoall", t.nbytes))
        mine = torch.split(t, list(splits))[self.rank]
        return Ready(_of_lengths(mine, [mine.shape[0]] * self.size if received is None else received))

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        self.sent.append(Sent("broadcast", t.nbytes))
        return Ready(t)


def _of_lengths(t: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    return [t if n == t.shape[0] else t.new_zeros((n, *t.shape[1:])) for n in lengths]
