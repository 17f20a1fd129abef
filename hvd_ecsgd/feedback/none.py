"""No feedback: what is not sent is lost."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import Addition
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

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        return Addition(part.segments, part.segments.scratch(), 0.0)
