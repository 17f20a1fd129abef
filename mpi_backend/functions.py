"""Horovod's torch functions over MPI: collectives on tensors, and on Python objects.

Every function that communicates is collective: all ranks call the same functions in the same order (unlike in Horovod, where names alone match
calls), with equal names, dtypes and shapes. All of that is compared before any data travels; where it differs, every rank raises
`hvd_ecsgd.errors.DisagreementError`, which says which rank sent what. Asynchronous functions return handles for `poll` and `synchronize`; without
a thread of its own the package carries operations on inside its functions only.

Tensors may be of any dense layout and on any device; NumPy arrays are taken for CPU tensors (in-place functions write to them). Results are tensors.
Calling anything before init() raises ValueError.
"""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast

import torch

from hvd_ecsgd.transport.base import Handle, Ready

from .runtime import context

if TYPE_CHECKING:
    import numpy as np

    from .negotiation import Pending

    Array: TypeAlias = torch.Tensor | np.ndarray[Any, Any]

__all__ = [
    "Average", "Max", "Min", "Product", "Sum",
    "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "is_homogeneous",
    "ccl_built", "cuda_built", "ddl_built", "gloo_built", "gloo_enabled", "mpi_built", "mpi_enabled", "mpi_threads_supported", "nccl_built",
    "rocm_built",
    "allreduce", "allreduce_", "allreduce_async", "allreduce_async_", "allgather", "allgather_async", "alltoall", "alltoall_async",
    "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "barrier", "poll", "synchronize",
    "allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters",
]  # fmt: skip

T = TypeVar("T")

Average = 0
Sum = 1
Min = 3
Max = 4
Product = 5
_OP_NAMES = {Average: "Average", Sum: "Sum", Min: "Min", Max: "Max", Product: "Product"}
_REDUCTIONS: Any = {Average: "sum", Sum: "sum", Min: "min", Max: "max", Product: "product"}


class Compressor(Protocol):
    """What `compression=` of `allreduce` must offer: Horovod's two functions, on a class or an object."""

    def compress(self, tensor: torch.Tensor, /) -> tuple[torch.Tensor, Any]: ...

    def decompress(self, tensor: torch.Tensor, context: Any, /) -> torch.Tensor: ...


# ---- who am I


def rank() -> int:
    """The rank of this process, from 0."""
    return context().rank


def size() -> int:
    """The number of processes."""
    return context().size


def local_rank() -> int:
    """The rank of this process among those on its host."""
    return context().local_rank


def local_size() -> int:
    """The number of processes on this host."""
    return context().local_size


def cross_rank() -> int:
    """The rank of this host among those that have a process of this local rank."""
    return context().cross_rank


def cross_size() -> int:
    """The number of hosts that have a process of this local rank."""
    return context().cross_size


def is_homogeneous() -> bool:
    """Whether every host has the same number of processes."""
    return context().homogeneous


def mpi_threads_supported() -> bool:
    """Whether MPI runs with support for calls from several threads at once."""
    context()
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def mpi_built() -> bool:
    """True: this is MPI."""
    return True


def mpi_enabled() -> bool:
    """True: this is MPI."""
    return True


def gloo_built() -> bool:
    """False: nothing here uses Gloo."""
    return False


def gloo_enabled() -> bool:
    """False: nothing here uses Gloo."""
    return False


def nccl_built() -> int:
    """0: nothing here uses NCCL; CUDA tensors travel through MPI."""
    return 0


def ddl_built() -> bool:
    """False: nothing here uses DDL."""
    return False


def ccl_built() -> bool:
    """False: nothing here uses oneCCL."""
    return False


def cuda_built() -> bool:
    """Whether this PyTorch has CUDA, which is all that CUDA tensors need here."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether this PyTorch has ROCm, which is all that its tensors need here."""
    return torch.version.hip is not None


# ---- handles


def poll(handle: Pending[Any]) -> bool:
    """Whether `synchronize(handle)` would return without blocking."""
    return handle.done()


def synchronize(handle: Pending[T]) -> T:
    """Wait for an asynchronous operation and return its result; again, it returns the same."""
    return handle.wait()


def barrier() -> None:
    """Return when every rank has called it."""
    _agree("barrier")


# ---- all-reduce


def allreduce_async_(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending[torch.Tensor]:
    """Start to reduce `tensor` over all ranks, in place. `synchronize` gives `tensor`, which must not be touched before.

    `op` is Average (default), Sum, Min, Max or Product; `average` is its deprecated form. The tensor is multiplied by `prescale_factor` before
    and `postscale_factor` after. The sum of fp16 and bf16 is formed in float32 and rounded once; the average is that, divided. With integers
    scaling and averaging truncate towards zero, as in Horovod; but the average divides exactly, where Horovod multiplies by 1/n (and makes 0 of
    49 ones on 49 ranks).

    Raises ValueError for a wrong `op`; through the handle `TransportError` for a dtype that has no sum (bool, complex).
    """
    reduction = _op(op, average)
    name = name or context().negotiator.automatic_name("allreduce")
    given = _tensor(tensor, f"allreduce {name!r}")
    return _start_allreduce(given, given.detach().contiguous(), name, reduction, prescale_factor, postscale_factor)


def allreduce_async(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending[torch.Tensor]:
    """As `allreduce_async_`, into a new tensor."""
    reduction = _op(op, average)
    name = name or context().negotiator.automatic_name("allreduce")
    fresh = _tensor(tensor, f"allreduce {name!r}").detach().clone(memory_format=torch.contiguous_format)
    return _start_allreduce(fresh, fresh, name, reduction, prescale_factor, postscale_factor)


def allreduce_(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce `tensor` over all ranks, in place, and return it; arguments as for `allreduce_async_`."""
    return allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor).wait()


def allreduce(
    tensor: Array,
    average: bool | None = None,
    name: str | None = None,
    compression: Compressor | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """The reduction of `tensor` over all ranks, a new tensor; arguments as for `allreduce_async_`.

    With `compression` that of what `compression.compress` makes of it, decompressed: it must be something whose sum means something.
    Differentiable for Average and Sum: the gradient is reduced likewise.
    """
    reduction = _op(op, average)
    given, extra = _tensor(tensor, "allreduce"), None
    if compression is not None:
        given, extra = compression.compress(given)
    arguments = (name, reduction, prescale_factor, postscale_factor)
    if given.requires_grad and torch.is_grad_enabled():
        result = cast(torch.Tensor, _Allreduce.apply(given, *arguments))  # type: ignore[no-untyped-call]
    else:
        result = allreduce_async(given, None, *arguments).wait()
    return result if compression is None else compression.decompress(result, extra)


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str | None, op: int, prescale: float, postscale: float) -> torch.Tensor:
        ctx.arguments = op, prescale, postscale
        return allreduce_async(tensor, None, name, op, prescale, postscale).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        op, prescale, postscale = ctx.arguments
        if op not in (Average, Sum):
            raise ValueError(f"allreduce: {_OP_NAMES[op]} has no gradient here; use Average or Sum, or detach the tensor.")
        return allreduce(gradients[0], op=op, prescale_factor=prescale, postscale_factor=postscale), None, None, None, None


def _start_allreduce(out: torch.Tensor, work: torch.Tensor, name: str, op: int, prescale: float, postscale: float) -> Pending[torch.Tensor]:
    """Reduce `work` in place and write it to `out`, of which it may be a view, or a copy."""
    negotiator, n = context().negotiator, context().size

    def start(rows: list[int]) -> Handle[torch.Tensor]:
        _scale_(work, prescale)
        return negotiator.transport.allreduce_(work, name, _REDUCTIONS[op])

    def finish(reduced: torch.Tensor) -> torch.Tensor:
        if op == Average and work.is_floating_point():
            work.div_(n)
        elif op == Average:
            work.copy_(torch.div(work, n, rounding_mode="trunc"))
        _scale_(work, postscale)
        return _write(work, out)

    options = _OP_NAMES[op] + (f", scaled by {prescale!r} and {postscale!r}" if (prescale, postscale) != (1.0, 1.0) else "")
    return negotiator.submit(f"allreduce ({options}) of {_describe(work)}, named {name!r}", 0, start, finish)


def _scale_(t: torch.Tensor, factor: float) -> None:
    if factor != 1.0:
        t.copy_(t.double().mul_(factor)) if not t.is_floating_point() else t.mul_(factor)


def _op(op: int | None, average: bool | None) -> int:
    if average is not None:
        if op is not None:
            raise ValueError("allreduce: both op and average were given; give op only.")
        warnings.warn("allreduce: average is deprecated; use op=Average or op=Sum.", DeprecationWarning, stacklevel=3)
        return Average if average else Sum
    if op is None:
        return Average
    if op not in _OP_NAMES:
        raise ValueError(f"allreduce: op is {op!r}; expected one of {', '.join(_OP_NAMES.values())}.")
    return op


# ---- all-gather


def allgather_async(tensor: Array, name: str | None = None) -> Pending[torch.Tensor]:
    """Start to gather everybody's rows. `synchronize` gives one new tensor: the tensors of all ranks, in rank order, along the first dimension.

    At least 1-D; dtype and all dimensions but the first must be equal. Raises ValueError for a 0-D tensor.
    """
    return _start_allgather(tensor, name, lambda gathered, rows: gathered)


def allgather(tensor: Array, name: str | None = None) -> torch.Tensor:
    """The tensors of all ranks, in rank order, along the first dimension; see `allgather_async`.

    Differentiable as in Horovod: the gradient is this rank's rows of the *average* of all ranks' gradients.
    """
    given = _tensor(tensor, "allgather")
    if given.requires_grad and torch.is_grad_enabled():
        return cast(torch.Tensor, _Allgather.apply(given, name))  # type: ignore[no-untyped-call]
    return allgather_async(given, name).wait()


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str | None) -> torch.Tensor:
        gathered, ctx.rows = _start_allgather(tensor, name, lambda gathered, rows: (gathered, rows)).wait()
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        r = rank()
        return allreduce(gradients[0], op=Average).narrow(0, sum(ctx.rows[:r]), ctx.rows[r]), None


def _start_allgather(tensor: Array, name: str | None, shaped: Callable[[torch.Tensor, list[int]], T]) -> Pending[T]:
    negotiator = context().negotiator
    label = name or negotiator.automatic_name("allgather")
    work = _tensor(tensor, f"allgather {label!r}").detach().contiguous()
    if work.dim() == 0:
        raise ValueError(f"allgather {label!r}: a 0-D tensor has no rows to gather; pass tensor.reshape(1).")
    counts: list[int] = []

    def start(rows: list[int]) -> Handle[torch.Tensor]:
        counts.extend(rows)
        return negotiator.transport.allgather_concatenated(work, label, rows)

    return negotiator.submit(f"allgather of {_describe(work, rows=True)}, named {label!r}", work.shape[0], start, lambda out: shaped(out, counts))


# ---- broadcast


def broadcast_async_(tensor: Array, root_rank: int, name: str | None = None) -> Pending[torch.Tensor]:
    """Start to copy root's values into `tensor` on all ranks. `synchronize` gives `tensor`, which must not be touched before.

    Raises ValueError for a `root_rank` that does not exist.
    """
    name = name or context().negotiator.automatic_name("broadcast")
    given = _tensor(tensor, f"broadcast {name!r}")
    return _start_broadcast(given, given.detach().contiguous(), root_rank, name)


def broadcast_async(tensor: Array, root_rank: int, name: str | None = None) -> Pending[torch.Tensor]:
    """As `broadcast_async_`, into a new tensor."""
    name = name or context().negotiator.automatic_name("broadcast")
    fresh = _tensor(tensor, f"broadcast {name!r}").detach().clone(memory_format=torch.contiguous_format)
    return _start_broadcast(fresh, fresh, root_rank, name)


def broadcast_(tensor: Array, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Copy root's values into `tensor` on all ranks, and return it."""
    return broadcast_async_(tensor, root_rank, name).wait()


def broadcast(tensor: Array, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Root's values, a new tensor on every rank.

    Differentiable as in Horovod: root's gradient is the *average* of all ranks' gradients, the others' is zero.
    """
    given = _tensor(tensor, "broadcast")
    if given.requires_grad and torch.is_grad_enabled():
        return cast(torch.Tensor, _Broadcast.apply(given, root_rank, name))  # type: ignore[no-untyped-call]
    return broadcast_async(given, root_rank, name).wait()


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None) -> torch.Tensor:
        ctx.root_rank = root_rank
        return broadcast_async(tensor, root_rank, name).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        mean = allreduce(gradients[0], op=Average)
        return mean if rank() == ctx.root_rank else torch.zeros_like(mean), None, None


def _start_broadcast(out: torch.Tensor, work: torch.Tensor, root_rank: int, name: str) -> Pending[torch.Tensor]:
    negotiator = context().negotiator
    _check_root(root_rank, f"broadcast {name!r}")
    request = f"broadcast from rank {root_rank} of {_describe(work)}, named {name!r}"
    return negotiator.submit(request, 0, lambda rows: negotiator.transport.broadcast_(work, root_rank, name), lambda work: _write(work, out))


# ---- all-to-all


def alltoall_async(
    tensor: Array, splits: Sequence[int] | torch.Tensor | None = None, name: str | None = None
) -> Pending[tuple[torch.Tensor, torch.Tensor]]:
    """Start to send rows of `tensor` to every rank. `synchronize` gives two new tensors: what came, in rank order, and how many rows from each rank.

    `splits[r]` rows go to rank r, consecutively from the first; by default all rows, in equal parts. The received splits are int32 (or of the
    dtype of a `splits` tensor) on the CPU. dtype and all dimensions but the first must be equal on all ranks.
    Raises ValueError for splits that do not fit the tensor and the number of ranks.
    """
    negotiator, n = context().negotiator, context().size
    label = name or negotiator.automatic_name("alltoall")
    work = _tensor(tensor, f"alltoall {label!r}").detach().contiguous()
    rows = work.shape[0] if work.dim() else 0
    if splits is None:
        if work.dim() == 0 or rows % n:
            raise ValueError(f"alltoall {label!r}: a tensor of shape {tuple(work.shape)} has no equal parts for {n} ranks; give splits.")
        counts = [rows // n] * n
    else:
        counts = [int(s) for s in splits]
        if work.dim() == 0 or len(counts) != n or min(counts) < 0 or sum(counts) > rows:
            raise ValueError(
                f"alltoall {label!r}: splits {counts} do not fit a tensor of shape {tuple(work.shape)} and {n} ranks; "
                "expected one non-negative number of rows per rank, together at most the first dimension."
            )
    work = work.narrow(0, 0, sum(counts))
    dtype = splits.dtype if isinstance(splits, torch.Tensor) else torch.int32

    def finish(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(parts), torch.tensor([p.shape[0] for p in parts], dtype=dtype)

    request = f"alltoall of {_describe(work, rows=True)}, named {label!r}"
    return negotiator.submit(request, 0, lambda _: negotiator.transport.alltoall(work, counts, label), finish)


def alltoall(
    tensor: Array, splits: Sequence[int] | torch.Tensor | None = None, name: str | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Send rows of `tensor` to every rank; see `alltoall_async`. Returns what came and, if `splits` was given, how many rows from each rank.

    Differentiable: gradients go back the way the rows came.
    """
    given = _tensor(tensor, "alltoall")
    if given.requires_grad and torch.is_grad_enabled():
        out, received = cast(tuple[torch.Tensor, torch.Tensor], _Alltoall.apply(given, splits, name))  # type: ignore[no-untyped-call]
    else:
        out, received = alltoall_async(given, splits, name).wait()
    return out if splits is None else (out, received)


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, splits: Sequence[int] | torch.Tensor | None, name: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        out, ctx.received = alltoall_async(tensor, splits, name).wait()
        ctx.rows = tensor.shape[0]
        ctx.mark_non_differentiable(ctx.received)
        return out, ctx.received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        back, _ = alltoall_async(gradients[0], ctx.received).wait()
        unsent = back.new_zeros((ctx.rows - back.shape[0], *back.shape[1:]))  # rows beyond the sum of splits went nowhere
        return torch.cat([back, unsent]), None, None


# ---- objects and training state


def broadcast_object(obj: T, root_rank: int = 0, name: str | None = None) -> T:
    """Root's object on every rank: pickled there, with cloudpickle (if installed) what pickle cannot. Root returns `obj` itself.

    Unpickling runs code: it is for the job's own processes, which trust each other.
    """
    name = name or context().negotiator.automatic_name("broadcast_object")
    _check_root(root_rank, f"broadcast_object {name!r}")
    root = rank() == root_rank
    content = _pickled(obj, name) if root else torch.empty(0, dtype=torch.uint8)
    length = broadcast_(torch.tensor([content.numel()]), root_rank, f"{name}.sz")
    content = broadcast_(content if root else content.new_empty(int(length)), root_rank, f"{name}.t")
    return obj if root else cast(T, pickle.loads(content.numpy().tobytes()))


def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """The objects of all ranks, in rank order; pickled as by `broadcast_object`."""
    name = name or context().negotiator.automatic_name("allgather_object")
    contents, rows = _start_allgather(_pickled(obj, name), name, lambda gathered, rows: (gathered, rows)).wait()
    return [pickle.loads(part.numpy().tobytes()) for part in torch.split(contents, rows)]


def broadcast_parameters(params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor], root_rank: int) -> None:
    """Copy root's values into all tensors of a dict (a module's `state_dict()`), or of (name, tensor) pairs (`named_parameters()`), or of tensors.

    A dict goes in the order of its sorted names. Raises ValueError for anything but tensors, `DisagreementError` on every rank
    when ranks hold different tensors.
    """
    if isinstance(params, Mapping):
        pairs: list[tuple[str, Any]] = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor | str):
        pairs = [p if isinstance(p, tuple) else (f"parameter.{i}", p) for i, p in enumerate(params)]
    else:
        raise ValueError(f"broadcast_parameters: params is of type {type(params).__name__}; expected a dict, (name, tensor) pairs or tensors.")
    for name, p in pairs:
        if not isinstance(p, torch.Tensor):
            raise ValueError(f"broadcast_parameters: {name!r} is of type {type(p).__name__}, expected a tensor; send it by broadcast_object.")
    _agree(f"broadcast_parameters of {len(pairs)} tensors")  # which ones is compared tensor by tensor
    for handle in [broadcast_async_(p, root_rank, name) for name, p in pairs]:
        handle.wait()


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor where an optimizer's state is sent as an object."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: object = None) -> None:
    """Make the state and the options (learning rate …) of all groups equal to root's, bit for bit, in place.

    Ranks may hold any state before, or none: what root has is created where it is missing, on the device of its parameter (on the CPU where root
    has it on the CPU), and what root does not have is dropped. No training step is run. Works for every optimizer whose state is made of tensors,
    picklable values, and dicts, lists and tuples of them. `model` is not needed, and accepted because Horovod's function has it.

    Raises `DisagreementError` on every rank when the optimizers have different types, groups or parameters.
    """
    groups = optimizer.param_groups
    params: list[torch.Tensor] = [p for group in groups for p in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    shapes = [tuple(p.shape) for p in params]
    _agree(f"broadcast_optimizer_state of {type(optimizer).__name__} from rank {root_rank}, parameters per group {sizes}, shapes {shapes}")
    index = {id(p): i for i, p in enumerate(params)}
    tensors: list[torch.Tensor] = []
    skeleton: tuple[dict[Any, Any], list[dict[str, Any]]] = {}, []
    if rank() == root_rank:
        state = {index.get(id(key), key): value for key, value in optimizer.state.items()}
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        skeleton = _without_tensors((state, options), tensors)
    new_state, new_options = broadcast_object(skeleton, root_rank, "optimizer_state")
    if rank() != root_rank:
        filled: dict[Any, Any] = {}
        for i, value in new_state.items():
            key = params[i] if isinstance(i, int) else i
            device = key.device if isinstance(key, torch.Tensor) else torch.device("cpu")
            filled[key] = _with_tensors(value, optimizer.state.get(key), device, tensors)
        for group, options_of in zip(groups, new_options, strict=True):
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            group.update({k: _with_tensors(v, group.get(k), device, tensors) for k, v in options_of.items()})
        optimizer.state.clear()
        optimizer.state.update(filled)
    for handle in [broadcast_async_(t, root_rank, f"optimizer_state.{i}") for i, t in enumerate(tensors)]:
        handle.wait()


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with a slot in place of each tensor; those are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Slot(tuple(value.shape), value.dtype, value.device.type == "cpu")
    if isinstance(value, dict):
        return {k: _without_tensors(v, tensors) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(v, tensors) for v in value)
    return value


def _with_tensors(value: Any, current: Any, device: torch.device, tensors: list[torch.Tensor]) -> Any:
    """The inverse: slots are filled by the tensors at the same place in `current` where they fit, else by new ones, all appended to `tensors`."""
    if isinstance(value, _Slot):
        where = torch.device("cpu") if value.on_cpu else device
        fits = isinstance(current, torch.Tensor) and (tuple(current.shape), current.dtype, current.device) == (value.shape, value.dtype, where)
        tensors.append(current if fits else torch.empty(value.shape, dtype=value.dtype, device=where))
        return tensors[-1]
    if isinstance(value, dict):
        return {k: _with_tensors(v, current.get(k) if isinstance(current, dict) else None, device, tensors) for k, v in value.items()}
    if type(value) in (list, tuple):
        old = current if isinstance(current, list | tuple) and len(current) == len(value) else [None] * len(value)
        return type(value)(_with_tensors(v, o, device, tensors) for v, o in zip(value, old, strict=True))
    return value


# ---- parts


def _agree(request: str) -> None:
    """Return when every rank has called it; raise `DisagreementError` on every rank when requests differ."""
    context().negotiator.submit(request, 0, lambda rows: Ready(None), lambda nothing: None).wait()


def _tensor(array: Array, what: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        if array.layout != torch.strided:
            raise ValueError(f"{what}: a tensor of layout {array.layout} is not supported; pass tensor.to_dense().")
        return array
    if hasattr(array, "__array__"):
        return torch.as_tensor(array)  # shares memory
    raise ValueError(f"{what}: expected a tensor or a NumPy array, not {type(array).__name__}; pass torch.as_tensor(…), or use the object functions.")


def _describe(t: torch.Tensor, rows: bool = False) -> str:
    shape = ", ".join(["rows", *map(str, t.shape[1:])] if rows else map(str, t.shape))
    return f"{str(t.dtype).removeprefix('torch.')} ({shape})"


def _write(work: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, with the values of `work`, which may share its memory."""
    if work.data_ptr() != out.data_ptr():
        out.detach().copy_(work)
    elif not out.is_inference():
        # MPI wrote behind torch's back; autograd, and methods that keep a copy of the parameters, look at the version. On root too: all alike.
        torch.autograd.graph.increment_version(out)
    return out


def _check_root(root_rank: int, what: str) -> None:
    if not 0 <= root_rank < size():
        raise ValueError(f"{what}: root_rank is {root_rank}; there are {size()} ranks, expected 0 to {size() - 1}.")


def _pickled(obj: object, name: str) -> torch.Tensor:
    try:
        content = pickle.dumps(obj)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        try:
            content = importlib.import_module("cloudpickle").dumps(obj)
        except ImportError:
            raise ValueError(f"{name!r}: cannot pickle an object of type {type(obj).__name__} ({error}); cloudpickle may, if installed.") from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
