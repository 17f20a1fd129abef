"""The hyper-parameters of an optimizer's param groups, as workers tell them to one another."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .own_class import inner_optimizers

__all__ = ["HyperParameters"]


class HyperParameters:
    """Those of `optimizer` that are numbers, or tuples and tensors of one; equal in number on all workers, which is compared at the first step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # An optimizer that holds another one (Lookahead, say) need not have defaults of its own.
        # Nor must one's defaults name the learning rate, which steps read, and schedulers set.
        defaults = {"lr"} | {key for o in (optimizer, *inner_optimizers(optimizer)) for key in getattr(o, "defaults", {})}
        self._places = [(g, key) for g, group in enumerate(optimizer.param_groups) for key in sorted(defaults) if _numbers(group.get(key))]
        self._held: list[float] = []

    @property
    def names(self) -> list[str]:
        return [f"{key} of param group {g}" for g, key in self._places]

    def hold(self) -> None:
        """A step begins: until `release` what is told stays what they are now."""
        self._held = self._held or self._now()

    def release(self) -> None:
        """The exchange is over."""
        self._held = []

    def values(self) -> list[float]:
        """What they are now, or were when the step began that is under way."""
        return self._held or self._now()

    def _now(self) -> list[float]:
        return [number for g, key in self._places for number in _numbers(self._optimizer.param_groups[g][key])]

    def adopt(self, values: Iterable[float]) -> None:
        """Take over what `values` returned on another worker. Each keeps its kind."""
        told = iter(values)
        for g, key in self._places:
            self._optimizer.param_groups[g][key] = _with_numbers(self._optimizer.param_groups[g][key], told)


def _numbers(value: Any) -> list[float]:
    """Those in a hyper-parameter; none if it is something else."""
    if isinstance(value, (tuple, list)):
        return [number for part in value for number in _numbers(part)]
    single = isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return [float(value)] if single else []


def _with_numbers(value: Any, told: Iterator[float]) -> Any:
    """A hyper-parameter like `value`, that holds the next of the numbers told."""
    if isinstance(value, (tuple, list)):
        return type(value)(_with_numbers(part, told) for part in value)
    if not _numbers(value):
        return value
    new = next(told)
    if isinstance(value, torch.Tensor):
        return value.fill_(new)
    return value if float(value) == new else bool(new) if isinstance(value, bool) else new
