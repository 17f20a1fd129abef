"""Root's values on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from hvd_ecsgd.transport.base import Handle

from .. import runtime
from ..engine.negotiation import Request
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced
from .allreduce import allreduce_differentiably
from .arguments import Average, Reduction, check_root, check_tensor, describe, fresh_copy, is_differentiated, work_of, write

if TYPE_CHECKING:
    from ..engine.pending import Pending
    from .arguments import Array

__all__ = ["broadcast", "broadcast_", "broadcast_async", "broadcast_async_"]


@untraced
def broadcast_async_(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Pending[torch.Tensor]:
    """Start to copy root's values into `tensor` on all ranks. `synchronize` gives `tensor`, which must not be touched before.

    `root_rank` is a global rank, also in a process set. Raises ValueError for one that does not belong to it.
    """
    given = check_tensor(tensor, "broadcast_", written=True)
    return _start_broadcast(given, work_of(given), root_rank, name, process_set)


@untraced
def broadcast_async(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Pending[torch.Tensor]:
    """As `broadcast_async_`, into a new tensor."""
    fresh = fresh_copy(check_tensor(tensor, "broadcast"))
    return _start_broadcast(fresh, fresh, root_rank, name, process_set)


@untraced
def broadcast_(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """Copy root's values into `tensor` on all ranks, and return it."""
    return broadcast_async_(tensor, root_rank, name, process_set).wait()


@untraced
def broadcast(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """Root's values, a new tensor on every rank.

    Differentiable as in Horovod: root's gradient is the *average* of all ranks' gradients, the others' is zero.
    """
    given = check_tensor(tensor, "broadcast")
    if is_differentiated([given]):
        name = runtime.channel(process_set).named(name, "broadcast")
        return cast(torch.Tensor, _Broadcast.apply(given, root_rank, name, process_set))  # type: ignore[no-untyped-call]
    return broadcast_async(given, root_rank, name, process_set).wait()


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root_rank: int, name: str, process_set: ProcessSet) -> torch.Tensor:
        ctx.root_rank, ctx.name, ctx.process_set = root_rank, name, process_set
        return broadcast_async(tensor, root_rank, name, process_set).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (mean,) = allreduce_differentiably(gradients, f"{ctx.name}.gradient", Reduction(Average), ctx.process_set)
        if runtime.context().rank != ctx.root_rank:  # still a function of it: all ranks go through its own backward pass
            mean = mean.masked_fill(torch.ones((), dtype=torch.bool, device=mean.device), 0.0)
        return mean, None, None, None


def _start_broadcast(out: torch.Tensor, work: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet) -> Pending[torch.Tensor]:
    channel = runtime.channel(process_set)
    label = channel.named(name, "broadcast")
    root = check_root(root_rank, process_set, f"broadcast {label!r}")
    text = f"broadcast from rank {root_rank} of {describe(work)}, named {label!r}"

    def start(extras: Sequence[Any]) -> Handle[torch.Tensor]:
        return channel.transport.broadcast_(work, root, label)

    return channel.submit(Request(label, text), lambda work: write(work, out), tensors=[work], start=start, kind="broadcast")
