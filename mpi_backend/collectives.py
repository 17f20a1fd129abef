"""Horovod's torch collectives over MPI.

Calls are matched between ranks by name, as in Horovod: ranks may submit in different orders, and a collective runs when all ranks of the process
set have submitted it. Without a name it gets a number, so unnamed ones are matched in the order of their submission. Types, shapes and options
under one name must be equal; where they are not, every rank raises `MismatchError`, which says who sent what. What some rank never submits
is reported after a while (see `init`). Asynchronous functions return handles for `poll` and `synchronize`.

Tensors may be of any dense layout and on any device; NumPy arrays are taken for CPU tensors without a copy (in-place functions write to them).
Results are tensors. All functions raise ValueError before init(), for a process set that this rank is not in, for a name that is still being
processed, and for wrong arguments, before anything is sent.
"""

from __future__ import annotations

import math
import numbers
import operator
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch

from hvd_ecsgd import BoundCompression, Compression
from hvd_ecsgd.exchange import HorovodCompressor, is_horovod_compressor
from hvd_ecsgd.transport.base import Handle, Ready

from . import runtime
from .errors import HorovodInternalError
from .negotiation import Reduce, Request
from .process_sets import ProcessSet, global_process_set

if TYPE_CHECKING:
    import numpy as np

    from .engine import Pending

    Array: TypeAlias = torch.Tensor | np.ndarray[Any, Any]

__all__ = [
    "Adasum", "Average", "Max", "Min", "Product", "Sum",
    "allreduce", "allreduce_", "allreduce_async", "allreduce_async_",
    "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_", "sparse_allreduce_async",
    "allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async",
    "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "alltoall", "alltoall_async",
    "reducescatter", "reducescatter_async", "grouped_reducescatter", "grouped_reducescatter_async",
    "barrier", "join", "poll", "synchronize",
]  # fmt: skip

T = TypeVar("T")

_TELL_DROPPED = 1.0
"""Seconds of waiting in `join` after which others are told what they wait for in vain: mostly all ranks join together."""

Average = 0
Sum = 1
Adasum = 2
"""There for scripts that name it; using it raises NotImplementedError."""
Min = 3
Max = 4
Product = 5
_OP_NAMES = {Average: "Average", Sum: "Sum", Min: "Min", Max: "Max", Product: "Product"}
_REDUCTIONS: Any = {Average: "sum", Sum: "sum", Min: "min", Max: "max", Product: "product"}
_REDUCIBLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ---- handles


def poll(handle: Handle[Any]) -> bool:
    """Whether `synchronize(handle)` would return without blocking. Raises ValueError for anything but a handle."""
    return _handle(handle, "poll").done()


def synchronize(handle: Handle[T]) -> T:
    """Wait for an asynchronous operation and return its result; again, it returns the same.

    Raises `HorovodInternalError` when it failed, ValueError for anything but a handle.
    """
    return _handle(handle, "synchronize").wait()


def _handle(handle: Handle[T], what: str) -> Handle[T]:
    if not all(callable(getattr(handle, method, None)) for method in ("done", "wait")):
        raise ValueError(f"{what}: expected a handle, which the functions named …_async return, got {handle!r:.100}.")
    return handle


def join(device: int = -1) -> int:
    """Say that this rank has no more data, and wait until all ranks have said so; returns the rank that did last.

    Meanwhile this rank contributes zeros to the all-reduces (Average, which still divides by the size, and Sum) that the others submit; other
    collectives fail. It takes part in the steps of their DistributedOptimizers with gradients of zero, and gets their parameters, optimizer state
    and hyper-parameters in the end (see `join` of `hvd_ecsgd.DistributedOptimizer`'s result): unlike with Horovod nothing need be broadcast, but
    for buffers (batch-norm statistics) and schedulers that step by batch: `broadcast_object(scheduler.state_dict(), root_rank=last)`. What
    needs all ranks fails while some have joined: SyncBatchNorm, new optimizers, checkpoints, `compression.switch`.
    `device`: accepted as Horovod's; the zeros are made on the CPU.

    Raises `HorovodInternalError` when a rank leaves without joining, or when ranks hold different optimizers; `CompressionError` between a backward
    pass and its `step()`, and on every rank when one that took no step has not attached the GradScaler that the others use. Where others step an
    optimizer that this rank has dropped (`del`), which they would wait for in vain, the job ends on all ranks, and that optimizer is named. Without
    MPI_THREAD_MULTIPLE optimizers do not go on without a rank, and a warning says so.
    """
    here, optimizers = runtime.context(), runtime.optimizers()
    for optimizer in optimizers.values():
        optimizer.check_join()  # before the others hear of it
    joining = runtime.channel(global_process_set).join()
    if here.size > 1 and here.engine.threaded:
        return _join_steps(joining, optimizers)
    if here.size > 1 and optimizers:
        warnings.warn(
            "join(): without MPI_THREAD_MULTIPLE a DistributedOptimizer of mpi_backend waits for all ranks in every step; join only after equal "
            "numbers of steps on all ranks (drop the last batches, or repeat some).",
            RuntimeWarning,
            stacklevel=2,
        )
    return joining.wait()


def _join_steps(joining: Pending[int], optimizers: Mapping[int, Any]) -> int:
    """Wait, and take part in the steps of all optimizers: in a thread for each, as the others may step them in any order, and at once."""
    given_up, told_at = threading.Event(), time.monotonic() + _TELL_DROPPED
    start = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    pool = ThreadPoolExecutor(max(1, len(optimizers)), "join", *start)
    try:
        parts = [pool.submit(optimizer.join, given_up.is_set) for optimizer in optimizers.values()]
        while not joining.done() and not any(part.done() and part.exception() for part in parts):
            time.sleep(1e-3)
            if time.monotonic() > told_at:
                told_at = math.inf
                runtime.tell_dropped(True)
        for part in parts:
            if part.done():
                part.result()  # raises what it raised
        last = joining.wait()
        # Everybody is here now. An optimizer that lives on some ranks only would be waited for in vain.
        everyones = _tell_all("join", sorted(optimizers))
        if any(held != everyones[0] for held in everyones):
            raise HorovodInternalError(
                "join: ranks hold different DistributedOptimizers; make and drop each of them on all ranks. In the order in which they were made, "
                f"by rank: {', '.join(map(str, everyones))}."
            )
        for part in parts:
            part.result()
        return last
    except BaseException:
        for optimizer in optimizers.values():
            if hasattr(transport := optimizer.compression.transport, "abandon"):
                transport.abandon()  # others may never take part in what was begun
        raise
    finally:
        given_up.set()
        pool.shutdown(wait=False)
        if told_at == math.inf:
            runtime.tell_dropped(False)


def _tell_all(name: str, value: object) -> Sequence[Any]:
    """Everybody's `value`, by rank."""
    request = Request(f"{name}.values", name, extra=value)
    done: Sequence[Any] = runtime.channel(global_process_set).submit(request, lambda extras: extras, start=lambda extras: Ready(extras)).wait()
    return done


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the process set has called it."""
    channel = runtime.channel(process_set)
    channel.submit(Request(channel.automatic_name(), "barrier"), lambda nothing: None, start=lambda extras: Ready(None)).wait()


# ---- all-reduce


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
    reduction = _op(op, average)
    given = _tensor(tensor, "allreduce_", written=True)
    return _start_allreduce([given], [_work(given)], name, reduction, prescale_factor, postscale_factor, process_set, _only)


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
    reduction = _op(op, average)
    fresh = _fresh(_tensor(tensor, "allreduce"))
    return _start_allreduce([fresh], [fresh], name, reduction, prescale_factor, postscale_factor, process_set, _only)


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
    reduction = _op(op, average)
    given = _tensors(tensors, "grouped_allreduce_", written=True)
    return _start_allreduce(given, [_work(t) for t in given], name, reduction, prescale_factor, postscale_factor, process_set, tuple)


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
    reduction = _op(op, average)
    fresh = [_fresh(t) for t in _tensors(tensors, "grouped_allreduce")]
    return _start_allreduce(fresh, fresh, name, reduction, prescale_factor, postscale_factor, process_set, tuple)


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
    reduction = _op(op, average)
    compressed, extras = _compressed(_tensors(tensors, "allreduce"), compression, "allreduce")
    options = reduction, prescale_factor, postscale_factor, process_set
    results = _allreduce_differentiably(compressed, name, *options)
    return [compression.decompress(t, extra) for t, extra in zip(results, extras, strict=True)]


def _allreduce_fresh(tensors: Sequence[torch.Tensor], name: str | None, op: int, pre: float, post: float, of: ProcessSet) -> tuple[torch.Tensor, ...]:
    fresh = [_fresh(t) for t in tensors]
    return _start_allreduce(fresh, fresh, name, op, pre, post, of, tuple).wait()


def _allreduce_differentiably(
    tensors: Sequence[torch.Tensor], name: str | None, op: int, pre: float, post: float, of: ProcessSet
) -> tuple[torch.Tensor, ...]:
    """In a backward pass too, for gradients of gradients."""
    if not _differentiated(tensors):
        return _allreduce_fresh(tensors, name, op, pre, post, of)
    name = runtime.channel(of).named(name, "allreduce")
    return cast("tuple[torch.Tensor, ...]", _Allreduce.apply(name, (op, pre, post, of), *tensors))  # type: ignore[no-untyped-call]


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, options: tuple[int, float, float, ProcessSet], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name, ctx.options = name, options
        return _allreduce_fresh(tensors, name, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        op = ctx.options[0]
        if op not in (Average, Sum):
            raise ValueError(f"allreduce: {_OP_NAMES[op]} has no gradient here; use Average or Sum, or detach the tensor.")
        return None, None, *_allreduce_differentiably(gradients, f"{ctx.name}.gradient", *ctx.options)


def _start_allreduce(
    outs: Sequence[torch.Tensor],
    works: Sequence[torch.Tensor],
    name: str | None,
    op: int,
    prescale: float,
    postscale: float,
    process_set: ProcessSet,
    shaped: Callable[[list[torch.Tensor]], T],
) -> Pending[T]:
    """Reduce `works` in place and write them to `outs`, of which they may be views, or copies."""
    channel = runtime.channel(process_set)
    name = channel.named(name, "allreduce")
    for t in works:
        if t.dtype not in _REDUCIBLE:
            known = ", ".join(str(d).removeprefix("torch.") for d in _REDUCIBLE)
            raise ValueError(f"allreduce {name!r}: Tensor type {t.dtype} is not supported. Expected one of {known}; convert it first.")
    prescale, postscale = _factors(prescale, postscale, f"allreduce {name!r}")
    reduce = Reduce(_REDUCTIONS[op], op == Average, prescale, postscale, tuple((t.dtype, t.numel()) for t in works))
    options = _OP_NAMES[op] + (f", scaled by {prescale!r} and {postscale!r}" if (prescale, postscale) != (1.0, 1.0) else "")
    text = f"allreduce ({options}) of {', '.join(map(describe, works))}, named {name!r}"

    def finish(nothing: None) -> T:
        return shaped([_write(work, out) for work, out in zip(works, outs, strict=True)])

    return channel.submit(Request(name, text, reduce=reduce), finish, tensors=works)


def _factors(prescale: object, postscale: object, what: str) -> tuple[float, float]:
    if not all(isinstance(f, numbers.Real) for f in (prescale, postscale)):
        raise ValueError(f"{what}: prescale_factor and postscale_factor must be numbers, got {prescale!r} and {postscale!r}.")
    return float(cast(float, prescale)), float(cast(float, postscale))


def _op(op: int | None, average: bool | None) -> int:
    if average is not None:
        if op is not None:
            raise ValueError("allreduce: op supersedes average; give op only.")
        if hasattr(average, "__array__"):
            raise ValueError("allreduce: average is a tensor, expected True or False; several tensors go to grouped_allreduce([…]).")
        warnings.warn("allreduce: average is deprecated; use op=Average or op=Sum.", DeprecationWarning, stacklevel=3)
        return Average if average else Sum
    if op is None:
        return Average
    if not isinstance(op, numbers.Integral) or op not in {*_OP_NAMES, Adasum}:
        raise ValueError(f"allreduce: op is {op!r:.100}; expected one of {', '.join(_OP_NAMES.values())}.")
    if op == Adasum:
        raise NotImplementedError("Adasum is not implemented; use op=Average, or Horovod itself.")
    return op


class _Sparse:
    """The handle of a sparse all-reduce: callable, as Horovod's, and good for `poll` and `synchronize`."""

    def __init__(self, indices: Pending[torch.Tensor], values: Pending[torch.Tensor], size: torch.Size, divisor: int) -> None:
        self._indices, self._values, self._size, self._divisor = indices, values, size, divisor

    def done(self) -> bool:
        return self._indices.done() and self._values.done()

    def wait(self) -> torch.Tensor:
        values = self._values.wait()
        values = values / self._divisor if self._divisor > 1 else values
        return torch.sparse_coo_tensor(self._indices.wait().t(), values, self._size, check_invariants=False)

    def __call__(self) -> torch.Tensor:
        return self.wait()


def sparse_allreduce_async(tensor: torch.Tensor, name: str, op: int, process_set: ProcessSet = global_process_set) -> _Sparse:
    """Start to reduce a sparse COO tensor (Average or Sum): everybody's entries are gathered. Calling the handle gives the result, uncoalesced.

    Sizes must be equal on all ranks.
    """
    name = runtime.channel(process_set).named(name, "sparse_allreduce_async")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"sparse_allreduce_async {name!r}: expected a sparse COO tensor, got {type(tensor).__name__}.")
    if not isinstance(op, int) or op not in (Average, Sum):
        raise ValueError(f"sparse_allreduce_async {name!r}: op is {op!r:.100}; expected Average or Sum.")
    if tensor.layout != torch.sparse_coo:
        raise ValueError(f"sparse_allreduce_async {name!r}: expected a sparse COO tensor, not layout {tensor.layout}; use allreduce.")
    what = f"sparse_allreduce_async of size {tuple(tensor.size())}"  # which the entries do not tell: compared as a part of the request
    indices = _start_allgather([tensor._indices().t()], f"{name}.indices", process_set, lambda gathered, rows: gathered[0], what)
    values = allgather_async(tensor._values(), f"{name}.values", process_set)
    return _Sparse(indices, values, tensor.size(), runtime.channel(process_set).size if op == Average else 1)


# ---- all-gather


def allgather_async(tensor: Array, name: str | None = None, process_set: ProcessSet = global_process_set) -> Pending[torch.Tensor]:
    """Start to gather everybody's rows. `synchronize` gives one new tensor: the tensors of all ranks, in rank order, along the first dimension.

    At least 1-D; dtype and all dimensions but the first must be equal. Raises ValueError for a 0-D tensor.
    """
    return _start_allgather([_tensor(tensor, "allgather")], name, process_set, lambda gathered, rows: gathered[0])


def allgather(tensor: Array, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """The tensors of all ranks, in rank order, along the first dimension; see `allgather_async`.

    Differentiable as in Horovod: the gradient is this rank's rows of the *average* of all ranks' gradients.
    """
    return grouped_allgather([tensor], name, process_set)[0]


def grouped_allgather_async(
    tensors: Sequence[Array], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Pending[tuple[torch.Tensor, ...]]:
    """As `allgather_async`, for several tensors, which run when all of them were submitted on all ranks."""
    return _start_allgather(_tensors(tensors, "grouped_allgather"), name, process_set, lambda gathered, rows: tuple(gathered))


def grouped_allgather(tensors: Sequence[Array], name: str | None = None, process_set: ProcessSet = global_process_set) -> tuple[torch.Tensor, ...]:
    """As `allgather`, for several tensors."""
    given = _tensors(tensors, "allgather")
    if _differentiated(given):
        name = runtime.channel(process_set).named(name, "allgather")
        return cast("tuple[torch.Tensor, ...]", _Allgather.apply(name, process_set, *given))  # type: ignore[no-untyped-call]
    return grouped_allgather_async(given, name, process_set).wait()


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, process_set: ProcessSet, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gathered, rows = _start_allgather(tensors, name, process_set, lambda gathered, rows: (tuple(gathered), rows)).wait()
        ctx.name, ctx.process_set = name, process_set
        first = runtime.channel(process_set).rank
        ctx.mine = [(sum(counts[i] for counts in rows[:first]), t.shape[0]) for i, t in enumerate(tensors)]
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        means = _allreduce_differentiably(gradients, f"{ctx.name}.gradient", Average, 1.0, 1.0, ctx.process_set)
        return None, None, *(mean.narrow(0, first, rows) for mean, (first, rows) in zip(means, ctx.mine, strict=True))


def _start_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    process_set: ProcessSet,
    shaped: Callable[[list[torch.Tensor], Sequence[list[int]]], T],
    what: str = "allgather",
) -> Pending[T]:
    channel = runtime.channel(process_set)
    label = channel.named(name, "allgather")
    if any(t.dim() == 0 for t in tensors):
        raise ValueError(f"allgather {label!r}: a 0-D tensor has no rows to gather; pass tensor.reshape(1).")
    works = [_work(t) for t in tensors]
    everyones: list[list[int]] = []

    def start(extras: Sequence[list[int]]) -> Handle[list[torch.Tensor]]:
        everyones.extend(extras)
        return _Together([channel.transport.allgather_concatenated(t, label, [rows[i] for rows in extras]) for i, t in enumerate(works)])

    text = f"{what} of {', '.join(describe(t, rows=True) for t in works)}, named {label!r}"
    return channel.submit(Request(label, text, [t.shape[0] for t in works]), lambda out: shaped(out, everyones), tensors=works, start=start)


class _Together:
    """Several handles as one."""

    def __init__(self, handles: Sequence[Handle[Any]]) -> None:
        self._handles = handles

    def done(self) -> bool:
        return all(handle.done() for handle in self._handles)

    def wait(self) -> list[Any]:
        return [handle.wait() for handle in self._handles]


# ---- broadcast


def broadcast_async_(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Pending[torch.Tensor]:
    """Start to copy root's values into `tensor` on all ranks. `synchronize` gives `tensor`, which must not be touched before.

    `root_rank` is a global rank, also in a process set. Raises ValueError for one that does not belong to it.
    """
    given = _tensor(tensor, "broadcast_", written=True)
    return _start_broadcast(given, _work(given), root_rank, name, process_set)


def broadcast_async(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Pending[torch.Tensor]:
    """As `broadcast_async_`, into a new tensor."""
    fresh = _fresh(_tensor(tensor, "broadcast"))
    return _start_broadcast(fresh, fresh, root_rank, name, process_set)


def broadcast_(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """Copy root's values into `tensor` on all ranks, and return it."""
    return broadcast_async_(tensor, root_rank, name, process_set).wait()


def broadcast(tensor: Array, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """Root's values, a new tensor on every rank.

    Differentiable as in Horovod: root's gradient is the *average* of all ranks' gradients, the others' is zero.
    """
    given = _tensor(tensor, "broadcast")
    if _differentiated([given]):
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
        (mean,) = _allreduce_differentiably(gradients, f"{ctx.name}.gradient", Average, 1.0, 1.0, ctx.process_set)
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

    return channel.submit(Request(label, text), lambda work: _write(work, out), tensors=[work], start=start)


# ---- all-to-all


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
    work = _work(_tensor(tensor, f"alltoall {label!r}"))
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
        return torch.cat(parts), torch.tensor([p.shape[0] for p in parts], dtype=dtype)

    return channel.submit(Request(label, f"alltoall of {describe(work, rows=True)}, named {label!r}"), finish, tensors=[work], start=start)


def _splits(splits: object, what: str) -> list[int]:
    """One-dimensional, and integers: others would be rounded without a word."""
    try:
        given = splits.tolist() if hasattr(splits, "tolist") else list(cast(Any, splits))
        if any(isinstance(s, bool) for s in given):
            raise TypeError
        return [operator.index(s) for s in given]
    except (TypeError, ValueError, RuntimeError):  # a sparse tensor has no list
        raise ValueError(f"{what}: splits must be a list, or 1-D array or tensor, of integers, rows for each rank; got {splits!r:.100}.") from None


def alltoall(
    tensor: Array, splits: Sequence[int] | Array | None = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Send rows of `tensor` to every rank; see `alltoall_async`. Returns what came and, if `splits` was given, how many rows from each rank.

    Differentiable: gradients go back the way the rows came.
    """
    given = _tensor(tensor, "alltoall")
    out, received = _alltoall_differentiably(given, splits, name, process_set)
    return out if splits is None else (out, received)


def _alltoall_differentiably(
    tensor: torch.Tensor, splits: Sequence[int] | Array | None, name: str | None, process_set: ProcessSet
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _differentiated([tensor]):
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


# ---- reduce-scatter


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
    return _start_reducescatter([_tensor(tensor, "reducescatter")], name, op, process_set, prescale_factor, postscale_factor, _only)


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


def grouped_reducescatter_async(
    tensors: Sequence[Array],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending[tuple[torch.Tensor, ...]]:
    """As `reducescatter_async`, for several tensors, which run when all of them were submitted on all ranks."""
    given = _tensors(tensors, "grouped_reducescatter")
    return _start_reducescatter(given, name, op, process_set, prescale_factor, postscale_factor, tuple)


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
    compressed, extras = _compressed(_tensors(tensors, "reducescatter"), compression, "reducescatter")
    options = op, process_set, prescale_factor, postscale_factor
    if _differentiated(compressed):
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
            raise ValueError(f"reducescatter: {_OP_NAMES[op]} has no gradient here; use Average or Sum, or detach the tensor.")
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
    from .engine import finish_, scale_

    channel = runtime.channel(process_set)
    label, n, op = channel.named(name, "reducescatter"), channel.size, _op(op, None)
    if any(t.dim() == 0 for t in tensors):
        raise ValueError(f"reducescatter {label!r}: a 0-D tensor has no rows; pass tensor.reshape(1).")
    if wrong := [t.dtype for t in tensors if t.dtype not in _REDUCIBLE]:
        raise ValueError(f"reducescatter {label!r}: Tensor type {wrong[0]} is not supported.")
    prescale, postscale = _factors(prescale, postscale, f"reducescatter {label!r}")
    works = [_work(t) if prescale == 1.0 else _fresh(t) for t in tensors]

    def start(extras: Sequence[Any]) -> Handle[list[torch.Tensor]]:
        handles: list[Handle[torch.Tensor]] = []
        for t in works:
            scale_(t, prescale)
            each, more = divmod(t.shape[0], n)
            row = math.prod(t.shape[1:])
            counts = [(each + (r < more)) * row for r in range(n)]
            handles.append(channel.transport.reduce_scatter(t, counts, label, _REDUCTIONS[op]))
        return _Together(handles)

    def finish(parts: list[torch.Tensor]) -> T:
        for part in parts:
            finish_(part, n if op == Average else 1, postscale)
        rows = [t.shape[0] // n + (channel.rank < t.shape[0] % n) for t in works]
        return shaped([part.view(r, *t.shape[1:]) for part, r, t in zip(parts, rows, works, strict=True)])

    options = _OP_NAMES[op] + (f", scaled by {prescale!r} and {postscale!r}" if (prescale, postscale) != (1.0, 1.0) else "")
    text = f"reducescatter ({options}) of {', '.join(map(describe, works))}, named {label!r}"
    return channel.submit(Request(label, text), finish, tensors=works, start=start)


# ---- parts


def describe(t: torch.Tensor, rows: bool = False) -> str:
    """Type and shape (`rows`: without the first dimension), as ranks compare them."""
    shape = ", ".join(["rows", *map(str, t.shape[1:])] if rows else map(str, t.shape))
    return f"{str(t.dtype).removeprefix('torch.')} ({shape})" + (f" on {t.device.type}" if t.device.type != "cpu" else "")


def check_root(root_rank: int, process_set: ProcessSet, what: str) -> int:
    """The rank of `root_rank` within the process set."""
    ranks = runtime.members(process_set).ranks
    try:
        root = -1 if isinstance(root_rank, bool) else operator.index(root_rank)
    except TypeError:
        root = -1
    if root not in ranks:
        expected = f"0 to {len(ranks) - 1}" if ranks == tuple(range(len(ranks))) else f"one of {', '.join(map(str, ranks))}"
        raise ValueError(f"{what}: root_rank is {root_rank!r}; there are {len(ranks)} ranks, expected {expected}.")
    return ranks.index(root)


def _tensor(array: Array, what: str, written: bool = False) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        if array.is_nested:
            raise ValueError(f"{what}: a nested tensor is not supported; pass its parts, or one of torch.nested.to_padded_tensor.")
        if array.layout != torch.strided:
            raise ValueError(f"{what}: a tensor of layout {array.layout} is not supported; pass tensor.to_dense().")
        if array.is_meta:
            raise ValueError(f"{what}: a tensor of shape {tuple(array.shape)} on the meta device has no values to send; give it some first.")
        if array.is_quantized:
            raise ValueError(f"{what}: a quantised tensor ({array.dtype}) is not supported, as its scale would not travel; pass tensor.dequantize().")
        if written and any(stride == 0 and n > 1 for stride, n in zip(array.stride(), array.shape, strict=True)):
            raise ValueError(f"{what}: elements of the tensor of shape {tuple(array.shape)} share memory, and would be written; pass tensor.clone().")
        return array
    if hasattr(array, "__array__"):
        if written and not getattr(getattr(array, "flags", None), "writeable", True):  # MPI would write there all the same, or crash in a mapped file
            raise ValueError(f"{what}: the NumPy array is read-only, and the result would be written there; pass array.copy().")
        try:
            return torch.as_tensor(array)  # shares memory
        except TypeError as error:
            raise ValueError(f"{what}: a NumPy array of type {array.dtype} is no tensor ({error}); use the object functions.") from None
    raise ValueError(f"{what}: expected a tensor or a NumPy array, not {type(array).__name__}; pass torch.as_tensor(…), or use the object functions.")


def _tensors(arrays: Iterable[Array], what: str, written: bool = False) -> list[torch.Tensor]:
    if isinstance(arrays, torch.Tensor | str | Mapping) or hasattr(arrays, "__array__") or not isinstance(arrays, Iterable):
        raise ValueError(f"{what}: expected a list of tensors, got one {type(arrays).__name__}; pass [tensor].")
    return [_tensor(array, what, written) for array in arrays]


def _work(t: torch.Tensor) -> torch.Tensor:
    """What the communication thread works on: `t` itself if it may, else a copy. A view that is lazily conjugated or negated has other values
    than its memory."""
    return _fresh(t) if t.is_inference() else t.detach().contiguous().resolve_conj().resolve_neg()


def _fresh(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # an inference tensor can only be written to in a thread that is in inference mode
        return t.detach().clone(memory_format=torch.contiguous_format)


def _write(work: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, with the values of `work`, which may share its memory."""
    if work.data_ptr() != out.data_ptr():
        out.detach().copy_(work)
    elif not out.is_inference():
        # MPI wrote behind torch's back; autograd, and methods that keep a copy of the parameters, look at the version. On root too: all alike.
        torch.autograd.graph.increment_version(out)
    return out


def _only(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _differentiated(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _compressed(tensors: Sequence[torch.Tensor], compression: HorovodCompressor, what: str) -> tuple[list[torch.Tensor], list[Any]]:
    if isinstance(compression, BoundCompression):
        raise ValueError(f"{what}: {compression!r} belongs to the gradients of a DistributedOptimizer; pass Compression.none or .fp16 here.")
    if not is_horovod_compressor(compression):
        raise ValueError(f"{what}: compression is {compression!r:.100}; expected Compression.none or .fp16, or what has compress and decompress.")
    pairs = [compression.compress(t) for t in tensors]
    return [t for t, _ in pairs], [extra for _, extra in pairs]
