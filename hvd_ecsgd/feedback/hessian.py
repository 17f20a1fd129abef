"""Hessian-aided error compensation: what was held back is corrected for what the steps since have done to it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from ..errors import CompressionError
from ..kernels import all_finite
from ..protocols import Accumulated, Feedback, Part, Slots, StepContext, Takes
from ..segments import Key, Segments
from ..verdicts import known
from .curvature import Curvature
from .error_feedback import ErrorFeedback
from .none import NoFeedback

__all__ = ["HessianAided"]


@dataclass(frozen=True)
class HessianAided(ErrorFeedback):
    """u = g + (η̃_{t-1}/η̃_t)·(I − η_t·H)·e;  c = C(u);  e = u − c.  Unit: gradient; the optimizer acts after the exchange.

    η̃ is as in `ErrorFeedback`: η in front of SGD without momentum, else the largest η so far.

    On a quadratic with the Hessian H, z = x − η_{t−1}·mean e moves as uncompressed gradient descent from z itself, not from x as with plain error
    feedback, so z converges to the optimum although x stays η‖mean e‖ away. `curvature` says where H·e comes from: `Matrix`, `Product`,
    `Hutchinson` or `GradientSquares`. The other form, without any of them, takes the gradient at x − η_{t−1}·e, which supplies H_i·e by itself: that
    is `LocalMomentum(1.0)` with momentum 0, in update units. Khirirat, Magnússon, Johansson 2019:
    Compressed Gradient Methods with Hessian-Aided Error Compensation; the ratio of learning rates is derived here. The paper has no momentum;
    an optimizer's acts after the exchange. For averages, not sums, of gradients. A residual kept by the exchange (two-pass servers) is carried
    without H.

    Slots: `residual`, `correction` (H·e, where the curvature prepares it between steps), and what the curvature keeps. Memory beside parameters and
    gradients: 2 times the parameters, with a global `Matrix` once; during a step with a diagonal or a global matrix once more.
    """

    curvature: Curvature

    def __post_init__(self) -> None:
        if isinstance(self.curvature, type) or not isinstance(self.curvature, Curvature):
            raise CompressionError(
                f"HessianAided: expected a curvature such as Matrix(…) or Product(…) of hvd_ecsgd.feedback, got {self.curvature!r}."
            )

    @property
    def survives(self) -> bool:
        """No: means are formed between steps."""
        return False

    @property
    def takes(self) -> Takes:
        """H is multiplied by η itself, not by a ratio."""
        return Takes.LEARNING_RATE

    def for_dense(self) -> Feedback:
        """With a product over the whole model, what is held back elsewhere has a part in these gradients too."""
        return self if self.curvature.couples else NoFeedback()

    def slots(self, segments: Segments) -> Slots:
        return {**super().slots(segments), **self.curvature.slots(segments)}

    def accumulate_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> Accumulated:
        """The residual is corrected before it is carried, and gradients are looked at before that."""
        if not known(all_finite(g) for g in gradients):
            return Accumulated.nothing(part.segments)
        state = part.state
        if not self.curvature.ahead:
            state["correction"] = self.curvature.correction(part, ctx.settings.lr)  # until the step stands or is undone
        state["residual"].sub_(state["correction"], alpha=ctx.settings.lr)
        accumulated = super().accumulate_(part, gradients, ctx)
        self.curvature.observe_(part, gradients)
        return accumulated

    def undo_(self, part: Part, gradients: Sequence[torch.Tensor] | None, ctx: StepContext) -> None:
        if gradients is not None:
            self.curvature.forget_(part, gradients)
        super().undo_(part, gradients, ctx)
        state = part.state
        state["residual"].add_(state["correction"] if self.curvature.ahead else state.pop("correction"), alpha=ctx.settings.lr)

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        if not self.curvature.ahead:
            for part in parts:
                part.state.pop("correction", None)
        yield from self.curvature.between_steps(parts, key)
