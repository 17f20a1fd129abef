"""A GPU that is not there: tensors that say they are on one, and are computed on the CPU, so that what is written for GPUs runs anywhere.

It knows what a GPU does to who is careless: what is copied to or from it without blocking arrives when its event is waited for, or was asked a few
times, and until then the target holds garbage; what the host reads from it is counted, as there it waits.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only

from hvd_ecsgd.core import step_hooks
from hvd_ecsgd.kernels import cuda
from hvd_ecsgd.kernels.cuda import Cuda

__all__ = ["GPU", "PretendGPU", "Pretended", "kernels_that_write_zeros", "on_gpu"]

GPU = torch.device("cuda", 0)
_ASKED = 3
"""Times that an event is asked for before it has come."""
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "item")
"""Operations that tell the host what is in a tensor, or make one of a size that depends on it."""


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU; `held` has what is in it."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": "cpu"}
        made: Pretended = torch.Tensor._make_wrapper_subclass(cls, held.size(), requires_grad=held.requires_grad, **options)  # type: ignore[attr-defined]
        return made

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    # What torch itself believes is that it is on the CPU: it may have been built without CUDA.
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def cpu(self, *given: Any, **options: Any) -> torch.Tensor:
        return self.to("cpu")

    def to(self, *given: Any, **options: Any) -> torch.Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*given, **{k: v for k, v in options.items() if k != "copy"})
        if device is None or device.type == "cuda":
            wanted = self.dtype if dtype is None else dtype
            return super().to(dtype=wanted, copy=options.get("copy", False))
        _note("to(cpu)")
        return self.held.detach().to(dtype=dtype, copy=True)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        _note("tolist")
        return self.held.tolist()

    def record_stream(self, stream: Any) -> None:
        pass

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


class _Gpu:
    """What all threads share."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.late: list[tuple[Any, Callable[[], None]]] = []


_gpu = _Gpu()


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Pretended) else x


def _carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.split("::")[1]
    flat = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = any(isinstance(x, Pretended) for x in flat)
    wanted = kwargs.get("device")
    to = None if wanted is None else torch.device(wanted)
    onto = to.type == "cuda" if to is not None else ours
    if ours and (name in _READS or _indexes_by_bools(name, args)):
        _note(name)
    if ours and name in ("_to_copy", "copy_") and not kwargs.get("non_blocking"):
        source, target = (args[0], to) if name == "_to_copy" else (args[1], args[0].device)
        if target is not None and source.device.type != target.type:
            _note(f"{name} from {source.device.type} to {target.type}")
    if name == "copy_" and len({type(a) is Pretended for a in args[:2]}) == 2 and (args[2:3] == (True,) or kwargs.get("non_blocking")):
        return _copied_late(*args[:2])
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}  # as there is no driver to pin it
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not onto:
        return result
    wrapped = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, Pretended) else Pretended(t), result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours and to is None else wrapped


def _indexes_by_bools(name: str, args: Any) -> bool:
    return name in ("index", "index_put_", "index_put") and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _note(what: str) -> None:
    where = [f"{f.filename.rpartition('/hvd_ecsgd/')[2]} {f.name}" for f in traceback.extract_stack() if "/hvd_ecsgd/" in f.filename]
    _gpu.reads.append(f"{what} in {next((w for w in reversed(where) if not w.endswith('comp>')), '?')}")


def _copied_late(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    held, was = _held(target), _held(source)
    held.fill_(float("nan") if held.is_floating_point() else 77)
    _gpu.late.append((None, lambda: held.copy_(was)))
    return target


class Event:
    """Of a stream: what was late before it is there when it has been waited for, or asked for a few times."""

    def __init__(self, **options: Any) -> None:
        self._asked = 0
        self._late: list[tuple[Any, Callable[[], None]]] = []

    def record(self, stream: Any = None) -> None:
        self._late = list(_gpu.late)

    def query(self) -> bool:
        self._asked += 1
        if self._asked < _ASKED:
            return False
        self._arrive()
        return True

    def synchronize(self) -> None:
        _note("event.synchronize()")
        self._arrive()

    def _arrive(self) -> None:
        for one in self._late:
            if one in _gpu.late:
                _gpu.late.remove(one)
                one[1]()

    def wait(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Stream:
    def __init__(self, *given: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        event._arrive()  # what comes next in this stream is computed at once here

    def synchronize(self) -> None:
        _note("stream.synchronize()")
        while _gpu.late:
            _gpu.late.pop(0)[1]()


class PretendGPU(TorchDispatchMode):
    """While entered (by each thread that makes tensors), `device="cuda"` is the pretended GPU, of which torch.cuda says what it would."""

    @property
    def reads(self) -> list[str]:
        """What the host has read, and where."""
        return _gpu.reads

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch._dynamo would be imported, which looks at torch.cuda as it is then

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


_WRITES = {"accumulate": (0,), "cast_extract": (2,), "take": (4,), "take_blocks": (4,), "sample": (4,), "draw_below": (3,), "count_above": (3, 4),
           "write_above": (6,), "histogram": (3,), "select": (1, 2)}  # fmt: skip
"""Which arguments a kernel writes that hold anything before."""


def _written(self: Cuda, name: str, programs: int, *arguments: Any, **constants: Any) -> None:
    """In a kernel's place: zeros where it would write."""
    for place in _WRITES.get(name, ()):
        arguments[place].zero_()


@contextlib.contextmanager
def kernels_that_write_zeros() -> Iterator[None]:
    """As if Triton were there, with kernels that are launched and compute nothing: what else is done on a GPU is seen then."""
    language = SimpleNamespace(float32=None, float64=None, float16=None, bfloat16=None)
    with mock.patch.object(cuda, "_loaded", lambda: (SimpleNamespace(tl=language), "")), mock.patch.object(Cuda, "_run", _written):
        yield


@contextlib.contextmanager
def on_gpu() -> Iterator[PretendGPU]:
    """torch.cuda as if the GPU were there, for this process; and a `PretendGPU`, entered in this thread."""
    step_hooks._keep_step_hooks()  # which imports the compiler of torch 2.2: that one would look at the stand-ins, and break
    _gpu.reads, _gpu.late = [], []
    current = Stream()
    nothing = lambda *given, **options: None  # noqa: E731
    with contextlib.ExitStack() as stack:
        patches: dict[str, Any] = {
            "Event": Event, "Stream": Stream, "current_stream": lambda *given: current, "stream": lambda s: contextlib.nullcontext(),
            "device": lambda d: contextlib.nullcontext(), "is_initialized": lambda: True, "current_device": lambda: 0, "set_device": nothing,
            "is_available": lambda: True, "device_count": lambda: 1, "synchronize": nothing, "mem_get_info": lambda *given: (1 << 32, 1 << 32),
        }  # fmt: skip
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        alias = lambda t: t.as_strided(t.shape, t.stride(), t.storage_offset())  # noqa: E731
        for module in ("hvd_ecsgd.values", "hvd_ecsgd.segments"):
            stack.enter_context(mock.patch(f"{module}.to_dlpack", lambda t: t))
            stack.enter_context(mock.patch(f"{module}.from_dlpack", alias))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda t: t))
        yield stack.enter_context(PretendGPU())
