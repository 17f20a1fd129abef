"""No feedback: what is not sent is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels import Addition, Native, Unread, kernels_for
from ..protocols import Accumulated, Feedback, Part, Slots, StepContext
from ..segments import Segments
from .base import GradientUnit

__all__ = ["NoFeedback"]


@dataclass(frozen=True)
class NoFeedback(GradientUnit):
    """buffer = g, a scratch copy, or the gradients themselves where they may be written to; none where a compressor takes of them without. Unit:
    gradient."""

    def for_dense(self) -> Feedback:
        return self

    def slots(self, segments: Segments) -> Slots:
        return {}

    def accumulate_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> Accumulated:
        if part.flat is not None:
            return Accumulated(part.flat)
        if part.wanted is None and isinstance(kernels_for(None, part.segments, "extract"), Native):
            return Unread(self.addition(part, ctx), gradients, part.parameters)
        return super().accumulate_(part, gradients, ctx)

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        return Addition(part.segments, part.segments.scratch(), 0.0)
