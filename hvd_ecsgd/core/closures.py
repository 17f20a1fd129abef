"""Closures that are given to `step`: found among its arguments, and evaluated before gradients are exchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..errors import CompressionError

__all__ = ["Arguments", "Evaluated", "closure_of", "place_of", "signature", "with_closure"]

Arguments = tuple[Any, ...]
"""By position, without the optimizer."""


def signature(function: Any) -> inspect.Signature | None:
    """Of a function; None of one that is not written in Python."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def place_of(step: inspect.Signature | None) -> int:
    """Where an optimizer's `step` takes the closure; the optimizer itself does not count."""
    names = [] if step is None else list(step.parameters)[1:]
    return names.index("closure") if "closure" in names else 0


def closure_of(args: Arguments, kwargs: Mapping[str, Any], place: int) -> Callable[[], Any] | None:
    """The closure among the arguments of `step`; None if there is none."""
    found = kwargs["closure"] if "closure" in kwargs else args[place] if len(args) > place else None
    return found if callable(found) else None


def with_closure(args: Arguments, kwargs: dict[str, Any], place: int, closure: Callable[[], Any]) -> tuple[Arguments, dict[str, Any]]:
    """The arguments with another closure."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (*args[:place], closure, *args[place + 1 :]), kwargs


class Evaluated:
    """Stands in for a closure that was evaluated already, before its gradients were exchanged.

    Raises `CompressionError` when the optimizer, of that `name`, wants gradients that there are not: at another point, or a second time.
    """

    def __init__(self, value: Any, parameters: Iterable[torch.Tensor], name: str) -> None:
        self.value, self._parameters, self._name = value, list(parameters), name
        self._calls = 0
        self._then = self._now()

    def _now(self) -> list[tuple[int, int]]:
        return [(p._version, id(p.grad)) for p in self._parameters]

    def __call__(self) -> Any:
        self._calls += 1
        if self._calls > 1 or self._now() != self._then:
            why = "several times in a step" if self._calls > 1 else "after it has moved the parameters or dropped their gradients"
            raise CompressionError(
                f"{self._name} evaluates its closure {why}, and gradients are exchanged once, where the parameters were before. Use an optimizer "
                "that takes one gradient a step (SGD, Adam, …)."
            )
        return self.value
