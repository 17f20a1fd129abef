"""Error feedback in update units, with momentum after the exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..protocols import Feedback, State, StepContext
from ..segments import Segments
from .base import AppliesUpdate, Unshifted, add_scaled_

__all__ = ["PEF"]


@dataclass(frozen=True)
class PEF(Unshifted, AppliesUpdate):
    """u = e + η̃·g;  c = C(u);  e = u − c;  then on all ranks  d = mean c/η̃ + wd·x;  m = μm + d;  x = x − η·m.  Unit: update.

    η̃ is the largest η so far, since m remembers d; where μ = 0 it is η. η, μ and wd are read from the SGD optimizer's param group at every step; no
    dampening, no Nesterov. For compressors with C(av) = aC(v) it equals `ErrorFeedback` (whose residual is rescaled when η̃ changes) under momentum
    SGD. Baseline of Xu, Huang 2021 (Detached Error Feedback); form as in the authors' code.

    Slots: `residual`; `momentum`, which holds the same bits on all ranks. Memory beside parameters and gradients: 2 times the parameters.
    """

    @property
    def shared_slots(self) -> tuple[str, ...]:
        return ("momentum",)

    def for_dense(self) -> Feedback:
        return self

    def init(self, segments: Segments) -> State:
        return {"residual": segments.zeros(), "momentum": segments.zeros()}

    def accumulate_(
        self, state: State, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext
    ) -> torch.Tensor:
        add_scaled_(state["residual"], gradients, parameters, segments, ctx.unit)
        return state["residual"]

    def undo_(
        self, state: State, gradients: Sequence[torch.Tensor] | None, parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext
    ) -> None:
        if gradients is not None:
            add_scaled_(state["residual"], gradients, parameters, segments, -ctx.unit)

    def finish_(self, state: State, out: torch.Tensor, parameters: Sequence[torch.Tensor], segments: Segments, ctx: StepContext) -> None:
        momentum = state["momentum"]
        momentum.mul_(ctx.momentum).add_(out, alpha=1 / ctx.unit)
        views = segments.shaped_views(momentum)
        if ctx.weight_decay:
            torch._foreach_add_(views, list(parameters), alpha=ctx.weight_decay)
        torch._foreach_add_(list(parameters), views, alpha=-ctx.lr)
