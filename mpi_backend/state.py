"""Python objects, parameters and optimizer state between ranks."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from . import runtime
from .basics import rank
from .collectives import allgather, broadcast_, broadcast_async_, check_root, describe
from .process_sets import ProcessSet, global_process_set

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]

T = TypeVar("T")


def broadcast_object(obj: T, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set) -> T:
    """Root's object on every rank: pickled there, with cloudpickle (if installed) what pickle cannot. Root returns `obj` itself.

    Unpickling runs code: it is for the job's own processes, which trust each other.
    """
    channel = runtime.channel(process_set)
    name = name or channel.automatic_name()
    check_root(root_rank, process_set, f"broadcast_object {name!r}")
    root = rank() == root_rank
    content = _pickled(obj, name) if root else torch.empty(0, dtype=torch.uint8)
    length = broadcast_(torch.tensor([content.numel()]), root_rank, f"{name}.sz", process_set)
    content = broadcast_(content if root else content.new_empty(int(length)), root_rank, f"{name}.t", process_set)
    return obj if root else cast(T, pickle.loads(content.numpy().tobytes()))


def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """The objects of all ranks, in rank order; pickled as by `broadcast_object`."""
    name = name or runtime.channel(global_process_set).automatic_name()
    mine = _pickled(obj, name)
    rows = allgather(torch.tensor([mine.numel()]), f"{name}.sz").tolist()
    return [pickle.loads(part.numpy().tobytes()) for part in torch.split(allgather(mine, f"{name}.t"), rows)]


def broadcast_parameters(params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor], root_rank: int) -> None:
    """Copy root's values into all tensors of a dict (a module's `state_dict()`), or of (name, tensor) pairs (`named_parameters()`), or of tensors.

    Raises ValueError for anything but tensors, `MismatchError` on every rank when ranks hold different tensors.
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
    contents = ", ".join(f"{name}: {describe(p)}" for name, p in pairs)
    runtime.agree(f"broadcast_parameters of {len(pairs)} tensors ({contents}) from rank {root_rank}")  # else ranks wait for names others lack
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

    Raises `MismatchError` on every rank when the optimizers have different types, groups or parameters.
    """
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


def _pickled(obj: object, name: str) -> torch.Tensor:
    try:
        content = pickle.dumps(obj)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        try:
            content = importlib.import_module("cloudpickle").dumps(obj)
        except ImportError:
            raise ValueError(f"{name!r}: cannot pickle an object of type {type(obj).__name__} ({error}); cloudpickle may, if installed.") from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
