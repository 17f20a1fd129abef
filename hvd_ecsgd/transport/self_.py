"""One process: every collective is the identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import TransportError
from .base import Handle, Ready

__all__ = ["SelfTransport"]


class SelfTransport:
    """A group of one worker."""

    rank = 0
    size = 1
    divisor = 1

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        return Ready(t)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        return Ready([t])

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        if list(splits) != [t.shape[0]]:
            raise TransportError(f"all-to-all '{name}': splits {list(splits)} must be 1 number that adds up to {t.shape[0]} rows.")
        return Ready([t])

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        if root != 0:
            raise TransportError(f"broadcast '{name}': there is no rank {root} in a group of one.")
        return Ready(t)
