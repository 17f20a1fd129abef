"""What most accumulate rules share: they measure gradients, and do nothing but accumulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..protocols import State, StepContext
from ..segments import Segments

__all__ = ["GradientUnit", "Unshifted"]


class Unshifted:
    """Mixin: gradients are taken at x, where the parameters are."""

    @property
    def shifts(self) -> bool:
        return False

    def capture_(self, state: State, parameters: Sequence[torch.Tensor], segments: Segments) -> None:
        """There is no copy of x."""

    def shift_(self, state: State, parameters: Sequence[torch.Tensor], segments: Segments) -> None:
        """The parameters stay where they are."""


class GradientUnit(Unshifted):
    """Mixin: the buffer holds gradients, and the optimizer acts after the exchange."""

    @property
    def unit(self) -> Literal["gradient", "update"]:
        return "gradient"

    def finish_(self, state: State, out: torch.Tensor, parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext) -> None:
        """The optimizer applies the mean."""
