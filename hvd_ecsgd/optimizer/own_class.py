"""What the class of a user's optimizer makes of `step`, `zero_grad` and its instances, however it defines them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..core.closures import Arguments, closure_of, place_of, signature, with_closure
from ..core.step_hooks import is_hooked
from ..errors import CompressionError

__all__ = ["OwnClass", "copy_attributes", "inner_optimizers"]

_OURS = ("step", "_step_supports_amp_scaling")
"""What an instance may hold and a wrapped one must not: a scheduler's `step`, which would bypass ours, and an answer to GradScaler that is ours."""


class OwnClass:
    """The class of an optimizer before it was wrapped."""

    def __init__(self, cls: type[torch.optim.Optimizer]) -> None:
        self._cls = cls
        self._step, self._zero_grad = signature(self._found()), signature(cls.zero_grad)
        self._place = place_of(self._step)

    def _found(self) -> Any:
        return self._cls.step

    @property
    def hooked(self) -> bool:
        """Whether torch runs step hooks around its `step`. Not where a class leaves out `Optimizer.__init__`, as some that hold another one do."""
        return is_hooked(self._found())

    def step(self) -> Callable[..., Any]:
        """Its `step`, which takes the instance first, without the hooks."""
        found = self._found()
        return found.__wrapped__ if self.hooked else found  # type: ignore[no-any-return]

    def check_step(self, optimizer: Any, args: Arguments, kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError where its `step` would, for arguments that it does not take."""
        if self._step is not None and (args or kwargs):
            self._step.bind(optimizer, *args, **kwargs)

    def closure(self, args: Arguments, kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
        """The one among the arguments of `step`; None if there is none."""
        return closure_of(args, kwargs, self._place)

    def with_closure(self, args: Arguments, kwargs: dict[str, Any], closure: Callable[[], Any]) -> tuple[Arguments, dict[str, Any]]:
        """The arguments with another closure."""
        return with_closure(args, kwargs, self._place, closure)

    def zero_grad_arguments(self, optimizer: Any, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        """Those of `zero_grad` that it takes: `set_to_none` is left out for classes that do not know it."""
        if self._zero_grad is None or not (args or kwargs):
            return args, kwargs
        try:
            self._zero_grad.bind(optimizer, *args, **kwargs)
        except TypeError:
            args = () if len(args) == 1 and isinstance(args[0], bool) else args
            kwargs = {name: value for name, value in kwargs.items() if name != "set_to_none"}
        return args, kwargs

    def check_evaluates_once(self) -> None:
        """Raise `CompressionError` for a class that cannot step without a closure, as it evaluates that several times in a step."""
        closure = None if self._step is None else self._step.parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise CompressionError(
                f"{self._cls.__name__} evaluates its closure several times in a step, and gradients are exchanged once. Use an optimizer that "
                "takes one gradient a step (SGD, Adam, …)."
            )


def copy_attributes(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """What an instance holds, in `__dict__` and `__slots__`, whatever its class makes of setting attributes."""
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name not in _OURS})
    for cls in type(source).__mro__:
        for member in vars(cls).values():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    value = member.__get__(source)
                except AttributeError:  # never set
                    continue
                member.__set__(target, value)


def inner_optimizers(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that this one holds (Lookahead, say), and those that these hold."""
    for value in vars(optimizer).values():
        for held in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(held, torch.optim.Optimizer) and held is not optimizer:
                yield held
                yield from inner_optimizers(held)
