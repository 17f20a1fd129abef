"""Python objects, parameters and optimizer state between ranks."""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from hvd_ecsgd.checkpoint.save_load import EXTRA_STATE

from . import runtime
from .basics import rank
from .collectives import allgather, broadcast_, broadcast_async_
from .collectives.arguments import check_root, describe
from .process_sets import ProcessSet, global_process_set
from .tracing import untraced

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]

T = TypeVar("T")


@untraced
def broadcast_object(obj: T, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set) -> T:
    """Root's object on every rank: pickled there, with cloudpickle (if installed) what pickle cannot. Root returns `obj` itself.

    Unpickling runs code: it is for the job's own processes, which trust each other. Raises ValueError on every rank when root's object cannot be
    pickled, and on a rank where it cannot be unpickled.
    """
    channel = runtime.channel(process_set)
    name = channel.named(name, "broadcast_object")
    what = f"broadcast_object {name!r}"
    check_root(root_rank, process_set, what)
    root = rank() == root_rank
    packed = _pickled(obj) if root else _Packed(torch.empty(0, dtype=torch.uint8, device="cpu"))
    size = int(broadcast_(torch.tensor([packed.size], dtype=torch.int64, device="cpu"), root_rank, f"{name}.sz", process_set))
    content = broadcast_(packed.content if root else packed.content.new_empty(abs(size)), root_rank, f"{name}.t", process_set)
    if size < 0:
        raise ValueError(f"{what}: rank {root_rank}, the root, {_text(content)}") from packed.error
    return obj if root else cast(T, _unpickled(content, root_rank, what))


@untraced
def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """The objects of all ranks, in rank order; pickled as by `broadcast_object`.

    Raises ValueError on every rank when the object of some cannot be pickled, and on a rank where one cannot be unpickled.
    """
    name = runtime.channel(global_process_set).named(name, "allgather_object")
    what = f"allgather_object {name!r}"
    mine = _pickled(obj)
    sizes = allgather(torch.tensor([mine.size], dtype=torch.int64, device="cpu"), f"{name}.sz").tolist()
    contents = torch.split(allgather(mine.content, f"{name}.t"), [abs(size) for size in sizes])
    if failed := [f"rank {r} {_text(content)}" for r, (size, content) in enumerate(zip(sizes, contents, strict=True)) if size < 0]:
        raise ValueError(f"{what}: {' '.join(failed)}") from mine.error
    return [_unpickled(content, r, what) for r, content in enumerate(contents)]


@untraced
def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor], root_rank: int) -> None:
    """Copy root's values into all tensors of a dict (a module's `state_dict()`), or of (name, tensor) pairs (`named_parameters()`), or of tensors.

    What a module's `get_extra_state` has in a dict (`…_extra_state`) may be any object that `broadcast_object` takes, of another kind on each rank.
    It is copied into a tensor that fits, and else replaced in the dict: the module has it after `model.load_state_dict(params)`, which a warning says
    on every rank where it was different.

    Raises ValueError for anything else but tensors, for a name that is no string or there twice, and on every rank for an extra state that cannot be
    pickled; `MismatchError` on every rank when ranks hold different tensors.
    """
    if isinstance(params, Mapping):
        pairs: list[Any] = list(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor | torch.nn.Module | str):
        pairs = [p if isinstance(p, tuple) else (f"parameter.{i}", p) for i, p in enumerate(params)]
    else:
        how = "; pass model.state_dict()" if isinstance(params, torch.nn.Module) else ""
        raise ValueError(f"broadcast_parameters: params is of type {type(params).__name__}; expected a dict, (name, tensor) pairs or tensors{how}.")
    names: set[str] = set()
    extra: list[str] = []
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"broadcast_parameters: expected pairs of a name (a string) and a tensor, got {pair!r:.100}.")
        name, p = pair
        if isinstance(params, MutableMapping) and name.rpartition(".")[2] == EXTRA_STATE:
            extra.append(name)
        elif not isinstance(p, torch.Tensor):
            raise ValueError(f"broadcast_parameters: {name!r} is of type {type(p).__name__}, expected a tensor; send it by broadcast_object.")
        if name in names:
            raise ValueError(f"broadcast_parameters: two tensors are named {name!r}; give them different names.")
        names.add(name)
    if isinstance(params, Mapping):
        pairs.sort()
    check_root(root_rank, global_process_set, "broadcast_parameters")
    pairs = [(name, p) for name, p in pairs if name not in extra]
    contents = ", ".join([*(f"{name}: {describe(p)}" for name, p in pairs), *(f"{name}: extra state" for name in sorted(extra))])
    runtime.agree(f"broadcast_parameters of {len(pairs)} tensors ({contents}) from rank {root_rank}")  # else ranks wait for names others lack
    for handle in [broadcast_async_(p, root_rank, name) for name, p in pairs]:
        handle.wait()
    if isinstance(params, MutableMapping) and extra:
        _broadcast_extra_state(params, sorted(extra), root_rank)


def _broadcast_extra_state(params: MutableMapping[str, Any], names: list[str], root_rank: int) -> None:
    """Give the entries `names` of `params` root's values. Collective."""
    before = {name: params[name].detach().cpu() if isinstance(params[name], torch.Tensor) else params[name] for name in names}
    after = broadcast_object(before, root_rank, "broadcast_parameters.extra_state")
    if rank() == root_rank:
        return
    replaced = []
    for name in names:
        old, new = params[name], after[name]
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype):
            old.detach().copy_(new)
            continue
        params[name] = new
        if not torch.equal(_pickled(before[name]).content, _pickled(new).content):
            replaced.append(name)
    if replaced:
        warnings.warn(
            f"broadcast_parameters: {', '.join(map(repr, replaced))} of rank {rank()} differed from rank {root_rank}'s, which is now in "
            "the dictionary and not yet in the model: keep the dictionary, and call model.load_state_dict with it.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor where an optimizer's state is sent as an object."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


@untraced
def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: object = None) -> None:
    """Make the state and the options (learning rate …) of all groups equal to root's, bit for bit, in place.

    Ranks may hold any state before, or none: what root has is created where it is missing, on the device of its parameter (on the CPU where root
    has it on the CPU), and what root does not have is dropped. No training step is run. Works for every optimizer whose state is made of tensors,
    picklable values, and dicts, lists and tuples of them. `model` is not needed, and accepted because Horovod's function has it.

    Raises ValueError for anything but an optimizer, `MismatchError` on every rank when the optimizers have different types, groups or parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"broadcast_optimizer_state: expected a torch.optim optimizer, got {optimizer!r:.100}.")
    check_root(root_rank, global_process_set, "broadcast_optimizer_state")
    groups = optimizer.param_groups
    params: list[torch.Tensor] = [p for group in groups for p in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    shapes = [tuple(p.shape) for p in params]
    runtime.agree(f"broadcast_optimizer_state of {type(optimizer).__name__} from rank {root_rank}, parameters per group {sizes}, shapes {shapes}")
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


@dataclass(frozen=True)
class _Packed:
    """A pickled object; or, with the error, words for all ranks on why there is none, which its size tells by its sign."""

    content: torch.Tensor
    error: Exception | None = None

    @property
    def size(self) -> int:
        return self.content.numel() if self.error is None else -self.content.numel()


def _pickled(obj: object) -> _Packed:
    failed: Exception | None = None
    remedy = ""
    try:
        content = pickle.dumps(obj)
    except Exception as error:  # whatever the object's own methods raise
        try:
            content = importlib.import_module("cloudpickle").dumps(obj)
        except ImportError:
            failed, remedy = error, " (cloudpickle may, if installed)"
        except Exception as another:
            failed = another
    if failed is not None:
        content = f"cannot pickle its object of type {type(obj).__name__}: {type(failed).__name__}: {failed}{remedy}.".encode(errors="replace")
    return _Packed(torch.frombuffer(bytearray(content), dtype=torch.uint8), failed)


def _unpickled(content: torch.Tensor, sender: int, what: str) -> Any:
    try:
        return pickle.loads(content.numpy().data)
    except Exception as error:
        raise ValueError(f"{what}: rank {rank()} cannot unpickle the object of rank {sender}: {type(error).__name__}: {error}.") from error


def _text(content: torch.Tensor) -> str:
    return content.numpy().tobytes().decode()
