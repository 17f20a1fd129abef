"""CSER: models that differ by their errors, which are reset now and then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..kernels import Addition
from ..protocols import Feedback, Part, Role, Slot, Slots, StepContext
from ..segments import Segments
from .base import LocalPoint

__all__ = ["CSER"]


@dataclass(frozen=True)
class CSER(LocalPoint):
    """p_i = x − e_i;  g = ∇F_i(p_i) + wd·p_i;  m = μm + g;  (c, r) = ηm split by C1;  x ← x − mean c;  e_i ← e_i + r;  and in every `period`-th step
    (c, r) = e_i split by C2;  x ← x − mean c;  e_i ← r.  Unit: update.

    That is, with the exchange `ErrorReset`, which does the splitting and the resets, p_i ← p_i − (mean c + r), and every worker moves by all of its
    own change at once. Nothing that C1 leaves is given to C1 again. mean p_i = x − mean e_i moves as momentum SGD on the mean of the workers'
    momenta. Xie, Zheng, Koyejo, Gupta, Li, Lin 2020: CSER: Communication-efficient SGD with Error Reset, algorithm 2, with momentum on the worker.

    With the exchange `Butterfly` errors are what models differ by, and are mixed between two workers in each step.

    η, μ and wd are read from the SGD optimizer's param group at every step; no dampening, no Nesterov.

    Slots: `residual` (e), `momentum`, and `x`, the part of the models that is equal on all ranks, to the bit. Memory beside parameters and gradients:
    3 times the parameters, and once more during a step.
    """

    dense: bool = field(default=False, repr=False)
    """For segments that travel uncompressed: no errors. Set by `for_dense`."""

    def for_dense(self) -> Feedback:
        return replace(self, dense=True)

    def slots(self, segments: Segments) -> Slots:
        point = {} if self.dense else {"x": Slot(Role.POINT)}
        return {"residual": Slot(Role.RESIDUAL, settled=not self.dense), "momentum": Slot(), **point}

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        """The buffer is ηm alone; the exchange adds what is left of it to the residual."""
        sgd = ctx.settings
        return Addition(
            part.segments,
            part.segments.scratch(),
            0.0,
            gradient=0.0,
            decay=sgd.weight_decay,
            momentum=part.state["momentum"],
            mu=sgd.momentum,
            of_momentum=sgd.lr,
        )

    def shift(self, part: Part) -> tuple[torch.Tensor, float] | None:
        """The parameters hold x − e."""
        return None if self.dense else (part.state["residual"], 1.0)
