"""Error feedback in update units without momentum: what TopK-SGD does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import Addition
from ..protocols import Feedback, Part, Role, Slot, Slots, StepContext
from ..segments import Segments
from .base import AppliesUpdate, move_by_, refuse_options

__all__ = ["MemSGD"]


@dataclass(frozen=True)
class MemSGD(AppliesUpdate):
    """u = e + η·(g + wd·x);  c = C(u);  e = u − c;  x = x − mean c.  Unit: update. x − mean e moves as uncompressed SGD, whatever η does.

    η and wd are read from the SGD optimizer's param group at every step; momentum is refused, as the method has none. Stich, Cordonnier, Jaggi
    2018 (Mem-SGD, algorithm 1); Alistarh et al. 2018 (TopK-SGD, algorithm 1), where C is top-k.

    Slot: `residual`. Memory beside parameters and gradients: once the parameters.
    """

    def check_group(self, options: Mapping[str, Any], where: str) -> None:
        super().check_group(options, where)
        refuse_options(
            self,
            options,
            where,
            {"momentum": 0},
            "The method has no momentum: make the optimizer with momentum=0, or use local_momentum or dist_ef_sgd.",
        )

    def for_dense(self) -> Feedback:
        return self

    def slots(self, segments: Segments) -> Slots:
        return {"residual": Slot(Role.RESIDUAL)}

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        eta = ctx.settings.lr
        return Addition(part.segments, part.state["residual"], gradient=eta, decay=eta * ctx.settings.weight_decay)

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        move_by_(part, part.parameters, out)
