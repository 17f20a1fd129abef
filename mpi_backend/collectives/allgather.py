"""Everybody's rows, in rank order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from hvd_ecsgd.transport.base import Handle

from .. import runtime
from ..engine.negotiation import Request
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced
from .allreduce import allreduce_differentiably
from .arguments import Average, Reduction, check_tensor, check_tensors, describe, is_differentiated, work_of
from .handles import Together

if TYPE_CHECKING:
    from ..engine.pending import Pending
    from .arguments import Array

__all__ = ["allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async", "start_allgather"]

T = TypeVar("T")


@untraced
def allgather_async(tensor: Array, name: str | None = None, process_set: ProcessSet = global_process_set) -> Pending[torch.Tensor]:
    """Start to gather everybody's rows. `synchronize` gives one new tensor: the tensors of all ranks, in rank order, along the first dimension.

    At least 1-D; dtype and all dimensions but the first must be equal. Raises ValueError for a 0-D tensor.
    """
    return start_allgather([check_tensor(tensor, "allgather")], name, process_set, lambda gathered, rows: gathered[0])


@untraced
def allgather(tensor: Array, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """The tensors of all ranks, in rank order, along the first dimension; see `allgather_async`.

    Differentiable as in Horovod: the gradient is this rank's rows of the *average* of all ranks' gradients.
    """
    return grouped_allgather([tensor], name, process_set)[0]


@untraced
def grouped_allgather_async(
    tensors: Sequence[Array], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Pending[tuple[torch.Tensor, ...]]:
    """As `allgather_async`, for several tensors, which run when all of them were submitted on all ranks."""
    return start_allgather(check_tensors(tensors, "grouped_allgather"), name, process_set, lambda gathered, rows: tuple(gathered))


@untraced
def grouped_allgather(tensors: Sequence[Array], name: str | None = None, process_set: ProcessSet = global_process_set) -> tuple[torch.Tensor, ...]:
    """As `allgather`, for several tensors."""
    given = check_tensors(tensors, "allgather")
    if is_differentiated(given):
        name = runtime.channel(process_set).named(name, "allgather")
        return cast("tuple[torch.Tensor, ...]", _Allgather.apply(name, process_set, *given))  # type: ignore[no-untyped-call]
    return grouped_allgather_async(given, name, process_set).wait()


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, process_set: ProcessSet, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gathered, rows = start_allgather(tensors, name, process_set, lambda gathered, rows: (tuple(gathered), rows)).wait()
        ctx.name, ctx.process_set = name, process_set
        first = runtime.channel(process_set).rank
        ctx.mine = [(sum(counts[i] for counts in rows[:first]), t.shape[0]) for i, t in enumerate(tensors)]
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        means = allreduce_differentiably(gradients, f"{ctx.name}.gradient", Reduction(Average), ctx.process_set)
        return None, None, *(mean.narrow(0, first, rows) for mean, (first, rows) in zip(means, ctx.mine, strict=True))


def start_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    process_set: ProcessSet,
    shaped: Callable[[list[torch.Tensor], Sequence[list[int]]], T],
    what: str = "allgather",
) -> Pending[T]:
    """`shaped`: the result, from the gathered tensors and, by rank, the rows of each. `what`: the call, as ranks compare it."""
    channel = runtime.channel(process_set)
    label = channel.named(name, "allgather")
    if any(t.dim() == 0 for t in tensors):
        raise ValueError(f"allgather {label!r}: a 0-D tensor has no rows to gather; pass tensor.reshape(1).")
    works = [work_of(t) for t in tensors]
    everyones: list[list[int]] = []

    def start(extras: Sequence[list[int]]) -> Handle[list[torch.Tensor]]:
        everyones.extend(extras)
        return Together([channel.transport.allgather_concatenated(t, label, [rows[i] for rows in extras]) for i, t in enumerate(works)])

    text = f"{what} of {', '.join(describe(t, rows=True) for t in works)}, named {label!r}"
    request, kind = Request(label, text, [t.shape[0] for t in works]), "allgather" if len(works) == 1 else "grouped_allgather"
    return channel.submit(request, lambda out: shaped(out, everyones), tensors=works, start=start, kind=kind)
