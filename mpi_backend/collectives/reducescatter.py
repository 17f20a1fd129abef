"""Each rank's rows of a reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from hvd_ecsgd import Compression
from hvd_ecsgd.exchange import HorovodCompressor
from hvd_ecsgd.transport.base import Handle

from .. import runtime
from ..engine.arithmetic import finish_, scale_
from ..engine.negotiation import Request
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced
from .allgather import grouped_allgather
from .arguments import (
    REDUCTIONS,
    Average,
    Reduction,
    Sum,
    check_op,
    check_tensor,
    check_tensors,
    compress_all,
    describe,
    fresh_copy,
    is_differentiated,
    only,
    work_of,
)
from .handles import Together

if TYPE_CHECKING:
    from ..engine.pending import Pending
    from .arguments import Array

__all__ = ["grouped_reducescatter", "grouped_reducescatter_async", "reducescatter", "reducescatter_async"]

T = TypeVar("T")


@untraced
def reducescatter_async(
    tensor: Array,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending[torch.Tensor]:
    """Start to reduce `tensor` over all ranks and give each rank its rows. `synchronize` gives them, a new tensor.

    The first dimension is divided; the first ranks have a row more where it does not come out even. `op`, factors and precision as for
    `allreduce_async_`; the additions are done in rank order. Raises ValueError for a 0-D tensor.
    """
    reduction = Reduction(check_op(op, None), prescale_factor, postscale_factor)
    return _start_reducescatter([check_tensor(tensor, "reducescatter")], name, reduction, process_set, only)


@untraced
def reducescatter(
    tensor: Array,
    name: str | None = None,
    compression: HorovodCompressor = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """This rank's rows of the reduction of `tensor` over all ranks; see `reducescatter_async`, and `allreduce` for `compression`.

    Differentiable for Average and Sum, as in Horovod: the gradient is everybody's gradients, gathered, times the factors, and for Sum times
    the number of ranks.
    """
    return grouped_reducescatter([tensor], name, compression, op, process_set, prescale_factor, postscale_factor)[0]


@untraced
def grouped_reducescatter_async(
    tensors: Sequence[Array],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending[tuple[torch.Tensor, ...]]:
    """As `reducescatter_async`, for several tensors, which run when all of them were submitted on all ranks."""
    reduction = Reduction(check_op(op, None), prescale_factor, postscale_factor)
    return _start_reducescatter(check_tensors(tensors, "grouped_reducescatter"), name, reduction, process_set, tuple)


@untraced
def grouped_reducescatter(
    tensors: Sequence[Array],
    name: str | None = None,
    compression: HorovodCompressor = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """As `reducescatter`, for several tensors."""
    reduction = Reduction(check_op(op, None), prescale_factor, postscale_factor)
    compressed, extras = compress_all(check_tensors(tensors, "reducescatter"), compression, "reducescatter")
    if is_differentiated(compressed):
        name = runtime.channel(process_set).named(name, "reducescatter")
        results = cast("tuple[torch.Tensor, ...]", _Reducescatter.apply(name, reduction, process_set, *compressed))  # type: ignore[no-untyped-call]
    else:
        results = _start_reducescatter(compressed, name, reduction, process_set, tuple).wait()
    return [compression.decompress(t, extra) for t, extra in zip(results, extras, strict=True)]


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, reduction: Reduction, process_set: ProcessSet, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name, ctx.reduction, ctx.process_set = name, reduction, process_set
        return _start_reducescatter(tensors, name, reduction, process_set, tuple).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        by: Reduction = ctx.reduction
        by.check_gradient("reducescatter")
        factor = by.prescale * by.postscale * (runtime.channel(ctx.process_set).size if by.op == Sum else 1)
        return None, None, None, *grouped_allgather([g * factor for g in gradients], f"{ctx.name}.gradient", ctx.process_set)


def _start_reducescatter(
    tensors: Sequence[torch.Tensor], name: str | None, reduction: Reduction, process_set: ProcessSet, shaped: Callable[[list[torch.Tensor]], T]
) -> Pending[T]:
    channel = runtime.channel(process_set)
    label, n = channel.named(name, "reducescatter"), channel.size
    if any(t.dim() == 0 for t in tensors):
        raise ValueError(f"reducescatter {label!r}: a 0-D tensor has no rows; pass tensor.reshape(1).")
    by = reduction.of(tensors, f"reducescatter {label!r}")
    works = [work_of(t) if by.prescale == 1.0 else fresh_copy(t) for t in tensors]

    def start(extras: Sequence[Any]) -> Handle[list[torch.Tensor]]:
        handles: list[Handle[torch.Tensor]] = []
        for t in works:
            scale_(t, by.prescale)
            each, more = divmod(t.shape[0], n)
            row = math.prod(t.shape[1:])
            counts = [(each + (r < more)) * row for r in range(n)]
            handles.append(channel.transport.reduce_scatter(t, counts, label, REDUCTIONS[by.op]))
        return Together(handles)

    def finish(parts: list[torch.Tensor]) -> T:
        for part in parts:
            finish_(part, n if by.op == Average else 1, by.postscale)
        rows = [t.shape[0] // n + (channel.rank < t.shape[0] % n) for t in works]
        return shaped([part.view(r, *t.shape[1:]) for part, r, t in zip(parts, rows, works, strict=True)])

    text = f"reducescatter ({by}) of {', '.join(map(describe, works))}, named {label!r}"
    kind = "reducescatter" if len(works) == 1 else "grouped_reducescatter"
    return channel.submit(Request(label, text), finish, tensors=works, start=start, kind=kind)
