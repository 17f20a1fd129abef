"""Error feedback in update units, with momentum after the exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import Addition
from ..protocols import Feedback, Part, Role, Slot, Slots, StepContext
from ..segments import Segments
from .base import AppliesUpdate

__all__ = ["PEF"]


@dataclass(frozen=True)
class PEF(AppliesUpdate):
    """u = e + η̃·g;  c = C(u);  e = u − c;  then on all ranks  d = mean c/η̃ + wd·x;  m = μm + d;  x = x − η·m.  Unit: update.

    η̃ is the largest η so far, since m remembers d; where μ = 0 it is η. η, μ and wd are read from the SGD optimizer's param group at every step; no
    dampening, no Nesterov. For compressors with C(av) = aC(v) it equals `ErrorFeedback` (whose residual is rescaled when η̃ changes) under momentum
    SGD. Baseline of Xu, Huang 2021 (Detached Error Feedback); form as in the authors' code.

    Slots: `residual`; `momentum`, which holds the same bits on all ranks. Memory beside parameters and gradients: 2 times the parameters.
    """

    def for_dense(self) -> Feedback:
        return self

    def slots(self, segments: Segments) -> Slots:
        return {"residual": Slot(Role.RESIDUAL), "momentum": Slot(Role.MEMORY)}

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        return Addition(part.segments, part.state["residual"], gradient=ctx.unit)

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        sgd, parameters = ctx.settings, list(part.parameters)
        views = part.segments.shaped_views(part.state["momentum"].mul_(sgd.momentum).add_(out, alpha=1 / ctx.unit))
        if sgd.weight_decay:
            torch._foreach_add_(views, parameters, alpha=sgd.weight_decay)
        torch._foreach_add_(parameters, views, alpha=-sgd.lr)
