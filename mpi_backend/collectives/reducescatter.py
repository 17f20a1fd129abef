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
    OP_NAMES,
    REDUCIBLE,
    REDUCTIONS,
    Average,
    Sum,
    check_factors,
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
    return _start_reducescatter([check_tensor(tensor, "reducescatter")], name, op, process_set, prescale_factor, postscale_factor, only)


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
    given = check_tensors(tensors, "grouped_reducescatter")
    return _start_reducescatter(given, name, op, process_set, prescale_factor, postscale_factor, tuple)


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
    compressed, extras = compress_all(check_tensors(tensors, "reducescatter"), compression, "reducescatter")
    options = op, process_set, prescale_factor, postscale_factor
    if is_differentiated(compressed):
        name = runtime.channel(process_set).named(name, "reducescatter")
        results = cast("tuple[torch.Tensor, ...]", _Reducescatter.apply(name, options, *compressed))  # type: ignore[no-untyped-call]
    else:
        results = _start_reducescatter(compressed, name, *options, tuple).wait()
    return [compression.decompress(t, extra) for t, extra in zip(results, extras, strict=True)]


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, options: tuple[int, ProcessSet, float, float], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name, ctx.options = name, options
        return _start_reducescatter(tensors, name, *options, tuple).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        op, process_set, prescale, postscale = ctx.options
        if op not in (Average, Sum):
            raise ValueError(f"reducescatter: {OP_NAMES[op]} has no gradient here; use Average or Sum, or detach the tensor.")
        factor = prescale * postscale * (runtime.channel(process_set).size if op == Sum else 1)
        return None, None, *grouped_allgather([g * factor for g in gradients], f"{ctx.name}.gradient", process_set)


def _start_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: int,
    process_set: ProcessSet,
    prescale: float,
    postscale: float,
    shaped: Callable[[list[torch.Tensor]], T],
) -> Pending[T]:
    channel = runtime.channel(process_set)
    label, n, op = channel.named(name, "reducescatter"), channel.size, check_op(op, None)
    if any(t.dim() == 0 for t in tensors):
        raise ValueError(f"reducescatter {label!r}: a 0-D tensor has no rows; pass tensor.reshape(1).")
    if wrong := [t.dtype for t in tensors if t.dtype not in REDUCIBLE]:
        raise ValueError(f"reducescatter {label!r}: Tensor type {wrong[0]} is not supported.")
    prescale, postscale = check_factors(prescale, postscale, f"reducescatter {label!r}")
    works = [work_of(t) if prescale == 1.0 else fresh_copy(t) for t in tensors]

    def start(extras: Sequence[Any]) -> Handle[list[torch.Tensor]]:
        handles: list[Handle[torch.Tensor]] = []
        for t in works:
            scale_(t, prescale)
            each, more = divmod(t.shape[0], n)
            row = math.prod(t.shape[1:])
            counts = [(each + (r < more)) * row for r in range(n)]
            handles.append(channel.transport.reduce_scatter(t, counts, label, REDUCTIONS[op]))
        return Together(handles)

    def finish(parts: list[torch.Tensor]) -> T:
        for part in parts:
            finish_(part, n if op == Average else 1, postscale)
        rows = [t.shape[0] // n + (channel.rank < t.shape[0] % n) for t in works]
        return shaped([part.view(r, *t.shape[1:]) for part, r, t in zip(parts, rows, works, strict=True)])

    options = OP_NAMES[op] + (f", scaled by {prescale!r} and {postscale!r}" if (prescale, postscale) != (1.0, 1.0) else "")
    text = f"reducescatter ({options}) of {', '.join(map(describe, works))}, named {label!r}"
    kind = "reducescatter" if len(works) == 1 else "grouped_reducescatter"
    return channel.submit(Request(label, text), finish, tensors=works, start=start, kind=kind)
