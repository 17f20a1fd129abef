"""One process: every collective is the identity."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from ..errors import TransportError
from .base import Handle, Ready

__all__ = ["SelfTransport", "alone"]

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "HOROVOD_SIZE", "WORLD_SIZE")
"""How launchers tell a process how many they have started."""


def alone(what: str) -> SelfTransport:
    """The transport where `what` was given none. Warns where a launcher has started several processes, each of which would train by itself."""
    for variable in _SIZES:
        if (processes := os.environ.get(variable, "")).isdecimal() and int(processes) > 1:
            warnings.warn(
                f"{what} was given no transport, so this process trains by itself; it is one of {processes} ({variable}), and their gradients are "
                "not averaged. Pass mpi_backend.transport.MPITransport() or hvd_ecsgd.transport.torch_dist.TorchTransport(), after the backend's "
                "init(), or use the DistributedOptimizer of mpi_backend or hvd_ecsgd.torch_backend, which does so. If each is meant to train by "
                "itself: transport=hvd_ecsgd.transport.SelfTransport().",
                UserWarning,
                stacklevel=3,
            )
            break
    return SelfTransport()


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
