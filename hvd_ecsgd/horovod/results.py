"""The gradients that Horovod has: means are written into them, and taken away where the optimizer inside must not apply them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from ..core.state import NamedParameters
from ..core.step import BucketStep
from .step import Pending

__all__ = ["Results"]


class Results:
    """Of one method. `check_skip` is called with the name of a parameter whose step is skipped; it raises when the optimizer would still move it."""

    def __init__(self, check_skip: Callable[[str], None]) -> None:
        self._check_skip = check_skip
        self._returned: dict[str, weakref.ref[torch.Tensor]] = {}

    def returned(self, name: str, gradient: torch.Tensor | None) -> bool:
        """Whether this is the very tensor that was returned for the parameter last time."""
        before = self._returned.get(name)
        return gradient is not None and before is not None and before() is gradient

    def note(self, pending: Pending) -> None:
        """The gradient is returned to Horovod."""
        self._returned[pending.name] = weakref.ref(pending.gradient)

    def write(self, reduction: BucketStep, pending: Pending) -> None:
        """The mean becomes the gradient."""
        assert reduction.out is not None
        gradient = pending.gradient
        if reduction.task.skipped:
            self._check_skip(pending.name)
        if reduction.out.data_ptr() != gradient.data_ptr():
            gradient.copy_(reduction.out.view(gradient.shape))
        if not reduction.bucket.parameters[0].requires_grad:
            gradient.zero_()  # frozen since: what is left of it in the residual must not move it

    def drop(self, named: NamedParameters, undone: bool) -> None:
        """Take away those of an `undone` step, and of parameters frozen since, so that the optimizer's momentum does not move them either."""
        for name, parameter in named:
            if (undone or not parameter.requires_grad) and self.returned(name, parameter.grad):
                parameter.grad = None
