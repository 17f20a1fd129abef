"""Error feedback in gradient units with momentum on the worker: dist-EF-SGD and dist-EF-SGDM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import check_number
from ..errors import CompressionError
from ..kernels import Addition
from ..protocols import Feedback, Part, Role, Slot, Slots, StepContext, Takes
from ..segments import Segments
from .base import GradientUnit, refuse_no_learning_rate, refuse_options

__all__ = ["DistEFSGD"]


@dataclass(frozen=True)
class DistEFSGD(GradientUnit):
    """g = ∇F(x) + wd·x;  m = μm + g;  p = m (Nesterov: g + μm) + (η_{t-1}/η_t)·e;  Δ = C(p);  e = p − Δ;  x = x − η·D.  Unit: gradient.

    D is what the exchange makes of the workers' Δ; over `TwoPass` the server's residual follows the same rule. Weight decay is coupled: it is
    added locally, before momentum and compression. Zheng, Huang, Kwok 2019, algorithms 1 and 2 (the ratio of learning rates as corrected in
    arXiv:2003.04706). Nothing remembers D, so the ratio follows η exactly.

    Without arguments, μ, wd and Nesterov are read from the SGD optimizer's param group at every step, and the update is applied here. With
    `momentum` or `weight_decay` given (0 is a value), those are used, D becomes the gradient, and the optimizer, whose own momentum and weight decay
    must be 0, applies it.

    Slots: `residual`, `momentum`. Memory beside parameters and gradients: 2 times the parameters.
    """

    momentum: float | None = None
    weight_decay: float | None = None
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name, value in (("momentum", self.momentum), ("weight_decay", self.weight_decay)):
            if value is not None:
                check_number(value, f"dist_ef_sgd: {name}", "a finite number ≥ 0, or None to read the optimizer's", lambda v: v >= 0)
        if not isinstance(self.nesterov, bool) or (self.nesterov and not self.momentum):
            raise CompressionError(
                f"dist_ef_sgd: nesterov={self.nesterov!r} needs momentum > 0 beside it, got momentum={self.momentum!r}; without arguments the "
                "SGD optimizer's nesterov is used."
            )

    @property
    def takes(self) -> Takes:
        """The update, with the optimizer's momentum read from its param group; the optimizer itself applies D when momentum is given here."""
        return Takes.UPDATE if self.momentum is None and self.weight_decay is None else Takes.MOMENTUM

    def check_group(self, options: Mapping[str, Any], where: str) -> None:
        if self.takes.update:
            refuse_no_learning_rate(self, options, where)
            refuse_options(self, options, where, {"dampening": 0, "maximize": False})
            return
        twice = (
            "Momentum inside the compressor and in the optimizer at the same time is refused: leave it to the compression and make the optimizer "
            "with momentum=0, weight_decay=0."
        )
        refuse_options(self, options, where, {"momentum": 0, "weight_decay": 0, "nesterov": False, "maximize": False}, twice)
        if "dampening" not in options:
            raise CompressionError(f"{self}: {where} has no dampening, so it is not of torch.optim.SGD, which is expected. {twice}")

    def for_dense(self) -> Feedback:
        return self

    def slots(self, segments: Segments) -> Slots:
        return {"residual": Slot(Role.RESIDUAL), "momentum": Slot()}

    def _settings(self, ctx: StepContext) -> tuple[float, float, bool]:
        """(μ, wd, Nesterov) of this step."""
        if self.takes.update:
            return ctx.settings.momentum, ctx.settings.weight_decay, ctx.settings.nesterov
        return self.momentum or 0.0, self.weight_decay or 0.0, self.nesterov

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        mu, wd, nesterov = self._settings(ctx)
        return Addition(
            part.segments,
            part.state["residual"],
            ctx.carry,
            gradient=1.0 if nesterov else 0.0,
            decay=wd,
            momentum=part.state["momentum"],
            mu=mu,
            of_momentum=mu if nesterov else 1.0,
        )

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        """x ← x − η·D, when the optimizer does not."""
        torch._foreach_add_(list(part.parameters), part.segments.shaped_views(out), alpha=-ctx.settings.lr)
