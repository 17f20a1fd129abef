"""The sum, mean, minimum … over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from hvd_ecsgd import Compression
from hvd_ecsgd.exchange import HorovodCompressor

from .. import runtime
from ..engine.negotiation import Reduce, Request
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced
from .arguments import (
    REDUCTIONS,
    Average,
    Reduction,
    check_op,
    check_tensor,
    check_tensors,
    compress_all,
    describe,
    fresh_copy,
    is_differentiated,
    only,
    work_of,
    write,
)

if TYPE_CHECKING:
    from ..engine.pending import Pending
    from .arguments import Array

__all__ = [
    "allreduce", "allreduce_", "allreduce_async", "allreduce_async_", "allreduce_differentiably",
    "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_",
]  # fmt: skip

T = TypeVar("T")


@untraced
def allreduce_async_(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending[torch.Tensor]:
    """Start to reduce `tensor` over all ranks, in place. `synchronize` gives `tensor`, which must not be touched before.

    `op` is Average (default), Sum, Min, Max or Product; `average` is its deprecated form. The tensor is multiplied by `prescale_factor` before
    and `postscale_factor` after: floats in their own precision (fp16 and bf16 in float32, rounded once), integers in float64, truncated
    towards zero. The sum of fp16 and bf16 is formed in float32 and rounded once; the average is that, divided, and truncated for integers. It
    divides exactly, where Horovod multiplies by 1/n (and makes 0 of 49 ones on 49 ranks).

    Small all-reduces that are ready at the same time run as one. With three or more ranks the order of additions, and so the last bit of a
    float, may depend on that; HOROVOD_FUSION_THRESHOLD=0 prevents it. All ranks always receive the same bits.

    Raises ValueError for a wrong `op`, and for a dtype that has no sum (bool, complex); NotImplementedError for Adasum.
    """
    reduction = Reduction(check_op(op, average), prescale_factor, postscale_factor)
    given = check_tensor(tensor, "allreduce_", written=True)
    return _start_allreduce([given], [work_of(given)], name, reduction, process_set, only)


@untraced
def allreduce_async(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending[torch.Tensor]:
    """As `allreduce_async_`, into a new tensor."""
    reduction = Reduction(check_op(op, average), prescale_factor, postscale_factor)
    fresh = fresh_copy(check_tensor(tensor, "allreduce"))
    return _start_allreduce([fresh], [fresh], name, reduction, process_set, only)


@untraced
def allreduce_(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce `tensor` over all ranks, in place, and return it; arguments as for `allreduce_async_`."""
    return allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set).wait()


@untraced
def allreduce(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    compression: HorovodCompressor = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The reduction of `tensor` over all ranks, a new tensor; arguments as for `allreduce_async_`.

    With `compression` that of what `compression.compress` makes of it, decompressed: it must be something whose sum means something.
    Differentiable for Average and Sum: the gradient is reduced likewise.
    """
    return grouped_allreduce([tensor], average, name, compression, op, prescale_factor, postscale_factor, process_set)[0]


@untraced
def grouped_allreduce_async_(
    tensors: Sequence[Array],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending[tuple[torch.Tensor, ...]]:
    """As `allreduce_async_`, for several tensors, perhaps of different types, that run when all of them were submitted on all ranks."""
    reduction = Reduction(check_op(op, average), prescale_factor, postscale_factor)
    given = check_tensors(tensors, "grouped_allreduce_", written=True)
    return _start_allreduce(given, [work_of(t) for t in given], name, reduction, process_set, tuple)


@untraced
def grouped_allreduce_async(
    tensors: Sequence[Array],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending[tuple[torch.Tensor, ...]]:
    """As `grouped_allreduce_async_`, into new tensors."""
    reduction = Reduction(check_op(op, average), prescale_factor, postscale_factor)
    fresh = [fresh_copy(t) for t in check_tensors(tensors, "grouped_allreduce")]
    return _start_allreduce(fresh, fresh, name, reduction, process_set, tuple)


@untraced
def grouped_allreduce_(
    tensors: Sequence[Array],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> tuple[torch.Tensor, ...]:
    """Reduce several tensors over all ranks, in place, and return them; see `grouped_allreduce_async_`."""
    return grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set).wait()


@untraced
def grouped_allreduce(
    tensors: Sequence[Array],
    average: bool | None = None,
    name: str | None = None,
    compression: HorovodCompressor = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """As `allreduce`, for several tensors; see `grouped_allreduce_async_`."""
    reduction = Reduction(check_op(op, average), prescale_factor, postscale_factor)
    compressed, extras = compress_all(check_tensors(tensors, "allreduce"), compression, "allreduce")
    results = allreduce_differentiably(compressed, name, reduction, process_set)
    return [compression.decompress(t, extra) for t, extra in zip(results, extras, strict=True)]


def _allreduce_fresh(tensors: Sequence[torch.Tensor], name: str | None, reduction: Reduction, of: ProcessSet) -> tuple[torch.Tensor, ...]:
    fresh = [fresh_copy(t) for t in tensors]
    return _start_allreduce(fresh, fresh, name, reduction, of, tuple).wait()


def allreduce_differentiably(tensors: Sequence[torch.Tensor], name: str | None, reduction: Reduction, of: ProcessSet) -> tuple[torch.Tensor, ...]:
    """In a backward pass too, for gradients of gradients."""
    if not is_differentiated(tensors):
        return _allreduce_fresh(tensors, name, reduction, of)
    name = runtime.channel(of).named(name, "allreduce")
    return cast("tuple[torch.Tensor, ...]", _Allreduce.apply(name, reduction, of, *tensors))  # type: ignore[no-untyped-call]


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, reduction: Reduction, of: ProcessSet, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name, ctx.reduction, ctx.of = name, reduction, of
        return _allreduce_fresh(tensors, name, reduction, of)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.reduction.check_gradient("allreduce")
        return None, None, None, *allreduce_differentiably(gradients, f"{ctx.name}.gradient", ctx.reduction, ctx.of)


def _start_allreduce(
    outs: Sequence[torch.Tensor],
    works: Sequence[torch.Tensor],
    name: str | None,
    reduction: Reduction,
    process_set: ProcessSet,
    shaped: Callable[[list[torch.Tensor]], T],
) -> Pending[T]:
    """Reduce `works` in place and write them to `outs`, of which they may be views, or copies."""
    channel = runtime.channel(process_set)
    name = channel.named(name, "allreduce")
    by = reduction.of(works, f"allreduce {name!r}")
    reduce = Reduce(REDUCTIONS[by.op], by.op == Average, by.prescale, by.postscale, tuple((t.dtype, t.numel()) for t in works))
    text = f"allreduce ({by}) of {', '.join(map(describe, works))}, named {name!r}"

    def finish(nothing: None) -> T:
        return shaped([write(work, out) for work, out in zip(works, outs, strict=True)])

    return channel.submit(Request(name, text, reduce=reduce), finish, tensors=works, kind="allreduce" if len(works) == 1 else "grouped_allreduce")
