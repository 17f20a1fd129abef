"""A user's own pair of functions, in the form that Horovod takes as `compression=`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, TypeGuard

import torch

from ..errors import CompressionError, DisagreementError
from ..kernels import all_finite
from ..protocols import Compressor, Feedback, Steps, Task, Traffic
from ..transport.base import Transport
from .base import Stateless, added_

__all__ = ["CompressedAllReduce", "HorovodCompressor", "is_horovod_compressor"]


class HorovodCompressor(Protocol):
    """What Horovod asks of `compression=`: two functions, of a class or an object. What one of them returns must be something whose mean means
    something; the other gets that mean, and the context."""

    def compress(self, tensor: torch.Tensor, /) -> tuple[torch.Tensor, Any]: ...

    def decompress(self, tensor: torch.Tensor, context: Any, /) -> torch.Tensor: ...


def is_horovod_compressor(what: object) -> TypeGuard[HorovodCompressor]:
    """It has both functions, for so many arguments: a class of whose objects that is true has not."""
    return _takes(what, "compress", 1) and _takes(what, "decompress", 2)


def _takes(what: object, function: str, arguments: int) -> bool:
    found = getattr(what, function, None)
    if not callable(found):
        return False
    try:
        inspect.signature(found).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # compiled, and says nothing of itself
        pass
    return True


@dataclass(frozen=True, repr=False)
class CompressedAllReduce(Stateless):
    """out = decompress((1/n) Σ compress(gradient)), parameter by parameter, with the functions of `compressor`.

    As Horovod does it: the mean is formed in the type of what `compress` returned (integers truncate toward zero). `compress` gets a copy of the
    gradient, of the parameter's shape, in float32 for 16-bit parameters, and in own optimizers perhaps in a thread. Nothing is known of what it
    leaves, so nothing is kept. Besides, every bucket sends 8 bytes per parameter in an all-gather: whether the gradient is finite, and a hash of
    the layout. Raises `CompressionError` when the functions return anything but tensors, of the gradient's size in the end, and on every
    rank `DisagreementError` when the tensors to add differ in shape or dtype.
    """

    compressor: HorovodCompressor

    def __repr__(self) -> str:  # equal on all ranks, where that of an object has an address in it
        kind = self.compressor if isinstance(self.compressor, type) else type(self.compressor)
        return f"CompressedAllReduce({kind.__module__}.{kind.__qualname__})"

    @property
    def approximates(self) -> bool:
        return True

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        if not compressor.lossless:
            raise CompressionError(f"{self} compresses by itself; its compressor is Identity(), not {compressor}.")
        super().check(compressor, feedback)

    def run(self, task: Task, transport: Transport) -> Steps:
        n, names = transport.size, task.segments.names
        gradients = task.segments.shaped_views(task.segments.zeros() if task.poisoned else task.buffer)
        pairs = [self._compressed(g, name) for g, name in zip(gradients, names, strict=True)]
        layouts = [f"{tuple(t.shape)} {t.dtype}" for t, _ in pairs]
        said = torch.tensor([-1 if task.poisoned else _hash(layout) for layout in layouts], dtype=torch.int64, device="cpu")
        task.traffic += Traffic(payload=said.nbytes, sent=(n - 1) * said.nbytes)
        table = torch.stack((yield transport.allgather(said, f"{task.name}.layout", [len(pairs)] * n)))
        task.finite = not bool((table < 0).any())
        if not task.finite:
            return task.result().fill_(float("nan"))
        differs = (table != table[0]).any(0)
        if bool(differs.any()):
            first = int(differs.nonzero()[0])
            other = int((table[:, first] != table[0, first]).nonzero()[0])
            raise DisagreementError(
                f"parameter '{names[first]}': {self} made tensors of different shapes or dtypes on rank 0 and rank {other} (here "
                f"{layouts[first]}), which cannot be added. What compress returns may depend on the gradient's shape, but not on its values."
            )
        out = task.result()
        views = task.segments.shaped_views(out)
        for dtype in dict.fromkeys(t.dtype for t, _ in pairs):
            members = [i for i, (t, _) in enumerate(pairs) if t.dtype == dtype]
            payload = torch.cat([pairs[i][0].reshape(-1) for i in members])
            task.traffic += Traffic(payload=payload.nbytes, sent=2 * (n - 1) * payload.nbytes // n)
            total: torch.Tensor = yield from added_(task, transport, payload, f"{task.name}.{dtype}")
            mean = total.div_(transport.divisor, rounding_mode=None if dtype.is_floating_point else "trunc")
            parts = torch.split(mean, [pairs[i][0].numel() for i in members])
            for i, part in zip(members, parts, strict=True):
                back = self.compressor.decompress(part.view(pairs[i][0].shape), pairs[i][1])
                if not isinstance(back, torch.Tensor) or back.numel() != views[i].numel():
                    got = tuple(back.shape) if isinstance(back, torch.Tensor) else repr(back)[:100]
                    raise CompressionError(
                        f"parameter '{names[i]}': {self}: decompress must return a tensor of {views[i].numel()} elements, got {got}."
                    )
                views[i].copy_(back.reshape(views[i].shape))
        task.finite = all_finite(out)
        return out

    def _compressed(self, gradient: torch.Tensor, name: str) -> tuple[torch.Tensor, Any]:
        made = self.compressor.compress(gradient)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.Tensor)):
            raise CompressionError(f"parameter '{name}': {self}: compress must return a tensor and a context, got {made!r:.100}.")
        return made


def _hash(layout: str) -> int:
    """63 bits."""
    return int.from_bytes(blake2b(layout.encode(), digest_size=8).digest(), "little") >> 1
