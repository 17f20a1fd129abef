"""The hooks by which parameters tell of their gradients, and the count of what has come."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..arguments import check_integer
from ..core.bucket import Bucket
from ..errors import SequenceError
from .backward import BackwardPasses

__all__ = ["GradientHooks", "check_passes"]

# Parameter → the hooks that listen to its gradients: making a new optimizer for the same parameters retires the old one's.
_listening: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def check_passes(passes: int) -> None:
    """Raise `CompressionError` unless `passes` is an integer ≥ 1."""
    check_integer(passes, "backward_passes_per_step", "an integer ≥ 1", least=1)


@dataclass
class _Came:
    """What has come of the gradients of one step; parameters and buckets by id."""

    left: dict[int, int] = field(default_factory=dict)
    """Of a parameter: backward passes whose gradients are still to come."""
    missing: dict[int, int] = field(default_factory=dict)
    """Of a bucket: parameters whose gradients are not complete."""
    last_pass: dict[int, object] = field(default_factory=dict)
    """The backward pass that a parameter's last gradient came from."""
    released: set[int] = field(default_factory=set)
    """Buckets whose exchange may have started."""
    reentrant_passes: bool = False
    excess: bool = False
    """A gradient came too many."""


class GradientHooks:
    """Listens to the gradients of `named` parameters and counts them: a bucket is complete when each of its parameters has had its gradients of
    `passes` backward passes.

    Within one backward pass a parameter may get several gradients (it is used in several reentrant checkpoints). That cannot be foreseen, so in the
    first step with such passes all buckets wait for the step's end, and later those of the parameters that it happened to.
    `came` is called with the parameter for each gradient. It must be a bound method: what a parameter's hook refers to is never collected with it,
    so the hook holds it weakly. Hooks of an earlier object on the same parameters are removed.
    """

    def __init__(
        self, named: Sequence[tuple[str, torch.nn.Parameter]], buckets: Sequence[Bucket], passes: int, came: Callable[[torch.nn.Parameter], None]
    ) -> None:
        self._named, self._buckets = named, buckets
        self._bucket_of = {id(p): bucket for bucket in buckets for p in bucket.parameters}
        self.passes = passes
        self.taken_over = ""
        """The name of a parameter that a newer object listens to."""
        self._backward = BackwardPasses()
        self._knows_reentrant_passes = False
        self._late: set[int] = set()  # buckets with parameters that get several gradients in one pass
        self._came = _Came()
        self.reset()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles).atexit = False
        listening = weakref.WeakMethod(came)

        def ready(parameter: torch.nn.Parameter) -> None:
            listen = listening()
            if listen is not None:
                listen(parameter)

        with _lock:
            for name, parameter in named:
                before = _listening.get(parameter)
                old = None if before is None else before()
                if old is not None and old.listens:
                    old.taken_over = name
                    _remove(old._handles)
                self._handles.append(parameter.register_post_accumulate_grad_hook(ready))  # type: ignore[no-untyped-call]
                _listening[parameter] = weakref.ref(self)

    @property
    def listens(self) -> bool:
        """False once a newer object has taken over the parameters."""
        return bool(self._handles)

    def reset(self) -> None:
        """A new step: no gradient has come."""
        self._knows_reentrant_passes = self._knows_reentrant_passes or self._came.reentrant_passes
        self._came = _Came(dict.fromkeys(self._bucket_of, self.passes), {id(b): len(b.parameters) for b in self._buckets})
        self._backward.forget()

    @property
    def begun(self) -> bool:
        """A gradient of this step has come."""
        return bool(self._came.last_pass)

    def count(self, parameter: torch.nn.Parameter) -> bool:
        """A gradient has come; whether it was the parameter's last of this step. Raises `SequenceError` when there is one too many.

        Not counted any more once the step is `lost`.
        """
        current, key, came = self._backward.current(), id(parameter), self._came
        if self._backward.interrupted:
            return False
        bucket = id(self._bucket_of[key])
        came.reentrant_passes = came.reentrant_passes or current.reentrant
        if came.last_pass.get(key) is current.whole:
            self._late.add(bucket)
            if bucket in came.released:
                came.excess = True
                raise SequenceError(
                    f"parameter '{self._name(parameter)}' got a second gradient within one backward pass, after its exchange had started: it is used "
                    "in a reentrant checkpoint and elsewhere. Use torch.utils.checkpoint.checkpoint(…, use_reentrant=False), or overlap=False "
                    "(MPI_BACKEND_OVERLAP=0)."
                )
            return False
        came.last_pass[key] = current.whole
        left = came.left[key] = came.left[key] - 1
        if left < 0:
            came.excess = True
            within = " (or one with reentrant checkpoints: use use_reentrant=False)" if came.reentrant_passes else ""
            raise SequenceError(
                f"parameter '{self._name(parameter)}' got gradients from more than backward_passes_per_step={self.passes} backward passes{within} "
                "before step(); raise backward_passes_per_step to accumulate locally. If another loss went backward through this model (a GAN's "
                "generator), freeze it (requires_grad_(False)) during that pass, or call optimizer.discard() after it."
            )
        if left == 0:
            came.missing[bucket] -= 1
        return left == 0

    def _name(self, parameter: torch.nn.Parameter) -> str:
        return next(n for n, p in self._named if p is parameter)

    def release(self, bucket: Bucket) -> bool:
        """Whether the exchange of the bucket may start now: all of its gradients have come, and no more will."""
        if self._came.missing[id(bucket)] or id(bucket) in self._late or (self._came.reentrant_passes and not self._knows_reentrant_passes):
            return False
        self._came.released.add(id(bucket))
        return True

    def lost(self) -> bool:
        """Outside of a backward pass: half of a step's gradients are here, as an exception has ended a backward pass."""
        self._backward.check_ended()
        return self._came.excess or (self._backward.interrupted and any(self._came.missing.values()))


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
