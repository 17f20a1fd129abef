"""Error feedback in gradient units."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import Addition
from ..protocols import Feedback, Part, Role, Slot, Slots, StepContext
from ..segments import Segments
from .base import GradientUnit
from .none import NoFeedback

__all__ = ["ErrorFeedback"]


@dataclass(frozen=True)
class ErrorFeedback(GradientUnit):
    """buffer = (η̃_{t-1}/η̃_t)·e + g; what extraction leaves is the next e. Unit: gradient; the optimizer acts after the exchange.

    In front of SGD without momentum η̃ = η, and the ratio keeps every stored error worth the update it was measured in: a 10× drop of η multiplies the
    stored residual by 10, which is harmless for the parameters. An optimizer with a memory (momentum, Adam) would remember what is sent of it, and
    apply it by whatever η comes next; so in front of one η̃ is the largest η so far. What waits then shrinks when η rises, stays as it is when η
    falls, and counts at the optimizer's own rate. With a constant learning rate, or without one, the ratio is 1.

    Seide et al. 2014; Stich et al. 2018; the ratio as in Zheng, Huang, Kwok 2019 (dist-EF-SGD, algorithm 1), where momentum comes before.
    Slot: `residual` (float32, or float64 for float64 parameters).
    """

    def for_dense(self) -> Feedback:
        return NoFeedback()

    def slots(self, segments: Segments) -> Slots:
        return {"residual": Slot(Role.RESIDUAL)}

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        return Addition(part.segments, part.state["residual"], ctx.carry)
