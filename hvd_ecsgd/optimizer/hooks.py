"""The hooks by which parameters tell of their gradients, and the count of what has come."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..bucket import Bucket
from ..errors import CompressionError, SequenceError

__all__ = ["GradientHooks", "check_passes"]

# Parameter → the hooks that listen to its gradients: making a new optimizer for the same parameters retires the old one's.
_listening: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def check_passes(passes: int) -> None:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise CompressionError(f"backward_passes_per_step must be an integer ≥ 1, got {passes!r}.")


class GradientHooks:
    """Listens to the gradients of `named` parameters and counts them: a bucket is complete when each of its parameters has had its gradients of
    `passes` backward passes.

    `came` is called with the parameter for each gradient. It must be a bound method: what a parameter's hook refers to is never collected with it,
    so the hook holds it weakly. Hooks of an earlier object on the same parameters are removed.
    """

    def __init__(
        self, named: Sequence[tuple[str, torch.nn.Parameter]], buckets: Sequence[Bucket], passes: int, came: Callable[[torch.nn.Parameter], None]
    ) -> None:
        self._named, self._buckets = named, buckets
        self._bucket_of = {id(p): bucket for bucket in buckets for p in bucket.parameters}
        self.passes = passes
        self.reset()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles).atexit = False
        listening = weakref.WeakMethod(came)

        def ready(parameter: torch.nn.Parameter) -> None:
            listen = listening()
            if listen is not None:
                listen(parameter)

        with _lock:
            for _, parameter in named:
                before = _listening.get(parameter)
                old = None if before is None else before()
                if old is not None:
                    _remove(old._handles)
                self._handles.append(parameter.register_post_accumulate_grad_hook(ready))  # type: ignore[no-untyped-call]
                _listening[parameter] = weakref.ref(self)

    @property
    def listens(self) -> bool:
        """False once a newer object has taken over the parameters."""
        return bool(self._handles)

    def reset(self) -> None:
        """A new step: no gradient has come."""
        self._left = {id(p): self.passes for _, p in self._named}
        self._waiting_for = {id(b): len(b.parameters) for b in self._buckets}

    @property
    def begun(self) -> bool:
        """A gradient of this step has come."""
        return any(left < self.passes for left in self._left.values())

    def count(self, parameter: torch.nn.Parameter) -> bool:
        """A gradient has come; whether it was the parameter's last of this step. Raises `SequenceError` when there is one too many."""
        left = self._left[id(parameter)] = self._left[id(parameter)] - 1
        if left < 0:
            name = next(n for n, p in self._named if p is parameter)
            raise SequenceError(
                f"parameter '{name}' got gradients from more than backward_passes_per_step={self.passes} backward passes before step(); "
                "raise backward_passes_per_step to accumulate locally."
            )
        if left == 0:
            self._waiting_for[id(self._bucket_of[id(parameter)])] -= 1
        return left == 0

    def complete(self, bucket: Bucket) -> bool:
        """All gradients of the bucket have come."""
        return self._waiting_for[id(bucket)] == 0


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
