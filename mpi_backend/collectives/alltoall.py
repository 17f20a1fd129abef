"""Rows from every rank to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from hvd_ecsgd.arguments import as_integer
from hvd_ecsgd.transport.base import Handle

from .. import runtime
from ..engine.negotiation import Request
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced
from .arguments import check_tensor, describe, is_differentiated, work_of

if TYPE_CHECKING:
    from ..engine.pending import Pending
    from .arguments import Array

__all__ = ["alltoall", "alltoall_async"]


@untraced
def alltoall_async(
    tensor: Array, splits: Sequence[int] | Array | None = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Pending[tuple[torch.Tensor, torch.Tensor]]:
    """Start to send rows of `tensor` to every rank. `synchronize` gives two new tensors: what came, in rank order, and how many rows from each rank.

    `splits[r]` rows go to rank r, consecutively from the first; by default all rows, in equal parts. The received splits are int32 (or of the
    dtype of a `splits` tensor) on the CPU. dtype and all dimensions but the first must be equal on all ranks.
    Raises ValueError for splits that do not fit the tensor and the number of ranks.
    """
    channel = runtime.channel(process_set)
    n, label = channel.size, channel.named(name, "alltoall")
    work = work_of(check_tensor(tensor, f"alltoall {label!r}"))
    rows = work.shape[0] if work.dim() else 0
    if splits is None:
        if work.dim() == 0 or rows % n:
            raise ValueError(f"alltoall {label!r}: a tensor of shape {tuple(work.shape)} has no equal parts for {n} ranks; give splits.")
        counts = [rows // n] * n
    else:
        counts = _splits(splits, f"alltoall {label!r}")
        if work.dim() == 0 or len(counts) != n or min(counts) < 0 or sum(counts) > rows:
            raise ValueError(
                f"alltoall {label!r}: splits {counts} do not fit a tensor of shape {tuple(work.shape)} and {n} ranks; "
                "expected one non-negative number of rows per rank, together at most the first dimension."
            )
    work = work.narrow(0, 0, sum(counts))  # consecutive rows of what is contiguous
    dtype = splits.dtype if isinstance(splits, torch.Tensor) else torch.int32

    def start(extras: Sequence[Any]) -> Handle[list[torch.Tensor]]:
        return channel.transport.alltoall(work, counts, label)

    def finish(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(parts), torch.tensor([p.shape[0] for p in parts], dtype=dtype, device="cpu")

    text = f"alltoall of {describe(work, rows=True)}, named {label!r}"
    return channel.submit(Request(label, text), finish, tensors=[work], start=start, kind="alltoall")


@untraced
def alltoall(
    tensor: Array, splits: Sequence[int] | Array | None = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Send rows of `tensor` to every rank; see `alltoall_async`. Returns what came and, if `splits` was given, how many rows from each rank.

    Differentiable: gradients go back the way the rows came.
    """
    given = check_tensor(tensor, "alltoall")
    out, received = _alltoall_differentiably(given, splits, name, process_set)
    return out if splits is None else (out, received)


def _alltoall_differentiably(
    tensor: torch.Tensor, splits: Sequence[int] | Array | None, name: str | None, process_set: ProcessSet
) -> tuple[torch.Tensor, torch.Tensor]:
    if not is_differentiated([tensor]):
        return alltoall_async(tensor, splits, name, process_set).wait()
    name = runtime.channel(process_set).named(name, "alltoall")
    return cast("tuple[torch.Tensor, torch.Tensor]", _Alltoall.apply(tensor, splits, name, process_set))  # type: ignore[no-untyped-call]


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, splits: Sequence[int] | Array | None, name: str, process_set: ProcessSet
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, ctx.received = alltoall_async(tensor, splits, name, process_set).wait()
        ctx.rows, ctx.name, ctx.process_set = tensor.shape[0], name, process_set
        ctx.mark_non_differentiable(ctx.received)
        return out, ctx.received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        back, _ = _alltoall_differentiably(gradients[0], ctx.received, f"{ctx.name}.gradient", ctx.process_set)
        unsent = back.new_zeros((ctx.rows - back.shape[0], *back.shape[1:]))  # rows beyond the sum of splits went nowhere
        return torch.cat([back, unsent]), None, None, None


def _splits(splits: object, what: str) -> list[int]:
    """One-dimensional, and integers: others would be rounded without a word."""
    try:
        given = splits.tolist() if hasattr(splits, "tolist") else list(cast(Any, splits))
        numbers = [as_integer(s) for s in given]
    except (TypeError, ValueError, RuntimeError):  # a sparse tensor has no list
        numbers = [None]
    whole = [number for number in numbers if number is not None]
    if len(whole) < len(numbers):
        raise ValueError(f"{what}: splits must be a list, or 1-D array or tensor, of integers, rows for each rank; got {splits!r:.100}.")
    return whole
