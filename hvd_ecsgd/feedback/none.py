"""No feedback: what is not sent is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..protocols import Feedback, Part, Slots, StepContext
from ..segments import Segments
from .base import GradientUnit

__all__ = ["NoFeedback"]


@dataclass(frozen=True)
class NoFeedback(GradientUnit):
    """buffer = g, a scratch copy. Unit: gradient."""

    def for_dense(self) -> Feedback:
        return self

    def slots(self, segments: Segments) -> Slots:
        return {}

    def _add_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> torch.Tensor:
        buffer = part.segments.empty()
        for view, gradient in zip(part.segments.shaped_views(buffer), gradients, strict=True):
            view.copy_(gradient)
        return buffer

    def _take_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> None:
        """Nothing was kept."""
