"""What scripts must not do to gradients while these travel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import CompressionError

__all__ = ["Guard", "Noted"]


@dataclass
class Noted:
    """A gradient as it was when its exchange was handed over."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    version: int

    @property
    def untouched(self) -> bool:
        return self.gradient._version == self.version

    def renew(self) -> None:
        """What was written since was written by us."""
        self.version = self.gradient._version


class Guard:
    """Gradients clipped or scaled after their exchange had started would be ignored without a word: `check` raises."""

    def __init__(self, named: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        self._named = named
        self._in_flight: list[Noted] = []

    def note(self, parameters: Iterable[torch.nn.Parameter]) -> list[Noted]:
        """Their gradients are handed over now."""
        noted = [Noted(p, p.grad, p.grad._version) for p in parameters if p.grad is not None]
        self._in_flight += noted
        return noted

    def check(self, lost: bool = False) -> None:
        """Raise `CompressionError` that names the parameter when a noted gradient was changed; then nothing is noted any more.

        `lost`: the step will be undone, whatever they are.
        """
        in_flight, self._in_flight = self._in_flight, []
        for noted in in_flight if not lost else ():
            if noted.parameter.grad is not noted.gradient or not noted.untouched:
                name = next(n for n, p in self._named if p is noted.parameter)
                raise CompressionError(
                    f"the gradient of parameter '{name}' was changed after its exchange had started in the backward pass. Change gradients "
                    "(clipping, scaler.unscale_) after optimizer.synchronize(), then step inside `with optimizer.skip_synchronize():`. If it was a "
                    "second backward pass, raise backward_passes_per_step."
                )
