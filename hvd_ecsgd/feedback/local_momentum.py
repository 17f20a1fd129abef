"""Error feedback in update units, with momentum on the worker: EF, DEF and SAEF are one rule with a different λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import CompressionError
from ..protocols import Feedback, State, StepContext
from ..segments import Segments
from .base import AppliesUpdate, add_to_momentum_, take_from_momentum_

__all__ = ["LocalMomentum"]


@dataclass(frozen=True)
class LocalMomentum(AppliesUpdate):
    """p = x − λe;  g = ∇F(p) + wd·p;  m = μm + g;  u = e + ηm;  c = C(u);  e = u − c;  x = x − mean c.  Unit: update.

    λ = 0 is error feedback with local momentum (EF), 0 < λ < 1 detached error feedback (DEF; the authors use .3), λ = 1 step-ahead error feedback
    (SAEF). η, μ and wd are read from the SGD optimizer's param group at every step; no dampening, no Nesterov.
    Xu, Huo, Huang 2020/21: Step-Ahead Error Feedback; Detached Error Feedback; form as in the authors' code.

    Slots: `residual`, `momentum`, and for λ > 0 `x`: between steps the parameters hold p, and x is kept beside them, because computing it
    back from p would drift between ranks. Memory beside parameters and gradients: 2, with λ > 0 3, times the parameters.
    """

    lambda_: float = 0.0
    dense: bool = field(default=False, repr=False)
    """For segments that travel uncompressed: nothing to shift by. Set by `for_dense`."""

    def __post_init__(self) -> None:
        if (
            isinstance(self.lambda_, bool)
            or not isinstance(self.lambda_, (int, float))
            or not (math.isfinite(self.lambda_) and 0 <= self.lambda_ <= 1)
        ):
            raise CompressionError(f"lambda_ must be in [0, 1] (0: EF, 1: SAEF, between: DEF), got {self.lambda_!r}.")

    @property
    def shifts(self) -> bool:
        """The parameters hold p = x − λe between steps."""
        return self.lambda_ > 0 and not self.dense

    def for_dense(self) -> Feedback:
        return replace(self, dense=True)

    def init(self, segments: Segments) -> State:
        slots = ["residual", "momentum"] + (["x"] if self.shifts else [])
        return {slot: segments.zeros() for slot in slots}

    def accumulate_(
        self, state: State, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext
    ) -> torch.Tensor:
        momentum, residual = state["momentum"], state["residual"]
        add_to_momentum_(momentum, gradients, parameters, segments, ctx.momentum, ctx.weight_decay)
        residual.add_(momentum, alpha=ctx.lr)
        return residual

    def undo_(
        self, state: State, gradients: Sequence[torch.Tensor] | None, parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext
    ) -> None:
        momentum, residual = state["momentum"], state["residual"]
        if gradients is None:
            return  # momentum and residual keep this worker's finite gradients
        residual.sub_(momentum, alpha=ctx.lr)
        take_from_momentum_(momentum, gradients, parameters, segments, ctx.momentum, ctx.weight_decay)

    def finish_(self, state: State, out: torch.Tensor, parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext) -> None:
        if self.shifts:
            state["x"].sub_(out)
            self.shift_(state, parameters, segments)
        else:
            torch._foreach_sub_(list(parameters), segments.shaped_views(out))

    def capture_(self, state: State, parameters: Sequence[torch.Tensor], segments: Segments) -> None:
        """x ← what the parameters hold now: at the first step, and after somebody else wrote to them."""
        if self.shifts:
            torch._foreach_copy_(segments.shaped_views(state["x"]), list(parameters))

    def shift_(self, state: State, parameters: Sequence[torch.Tensor], segments: Segments) -> None:
        """parameters ← x − λe."""
        if self.shifts:
            torch._foreach_copy_(list(parameters), segments.shaped_views(state["x"]))
            torch._foreach_add_(list(parameters), segments.shaped_views(state["residual"]), alpha=-self.lambda_)
