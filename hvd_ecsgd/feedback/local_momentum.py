"""Error feedback in update units, with momentum on the worker: EF, DEF and SAEF are one rule with a different λ."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..arguments import check_integer, check_number, is_integer
from ..errors import CompressionError
from ..kernels import Addition
from ..protocols import Feedback, Part, Role, Slot, Slots, StepContext
from ..segments import Key, Segments
from .base import LocalPoint

__all__ = ["LocalMomentum"]


@dataclass(frozen=True)
class LocalMomentum(LocalPoint):
    """p = x − λe;  g = ∇F(p) + wd·p;  m = μm + g;  u = e + ηm;  c = C(u);  e = u − c;  x = x − mean c.  Unit: update.

    λ = 0 is error feedback with local momentum (EF), 0 < λ < 1 detached error feedback (DEF; the authors use .3), λ = 1 step-ahead error feedback
    (SAEF). η, μ and wd are read from the SGD optimizer's param group at every step; no dampening, no Nesterov.
    Xu, Huo, Huang 2020/21: Step-Ahead Error Feedback; Detached Error Feedback; form as in the authors' code.

    `period` H > 1 makes H local steps between exchanges: p moves with them, p ← p − ηm, and u = e + Σ ηm over them; also parameters that travel
    uncompressed then move locally in between. An exchange takes place in steps H−1, 2H−1, … counted from 0. An inf or NaN in a local step is
    undone on its rank alone. `average_errors` H₂ (a multiple of H; the option of the SAEF paper): after the exchange of steps H₂−1, 2H₂−1, … the
    residuals are replaced by their mean, by a dense all-reduce; not those of a param group whose η is 0 in that step.

    x − mean e (− E, where servers keep a residual) moves as momentum SGD on the mean of the workers' momenta, whatever η, μ, wd, H and H₂ are.

    Slots: `residual` (e, and u between exchanges), `momentum`; where the parameters hold p between steps (λ > 0 or H > 1) `x`, because computing it
    back from p would drift between ranks; for H > 1 `displacement`, x − p. Memory beside parameters and gradients: 2 to 4 times the parameters.
    """

    lambda_: float = 0.0
    period: int = 1
    average_errors: int | None = None
    dense: bool = field(default=False, repr=False)
    """For segments that travel uncompressed: nothing to shift by. Set by `for_dense`."""

    def __post_init__(self) -> None:
        check_number(self.lambda_, "lambda_", "in [0, 1] (0: EF, 1: SAEF, between: DEF)", lambda share: 0 <= share <= 1)
        check_integer(self.period, "period", "a number of local steps between exchanges, an integer ≥ 1", least=1)
        h2 = self.average_errors
        if h2 is not None and not (is_integer(h2, 1) and h2 % self.period == 0):
            raise CompressionError(
                f"average_errors must be None or a number of steps, an integer ≥ 1 and a multiple of period={self.period}, got {h2!r}."
            )

    @property
    def survives(self) -> bool:
        """Not where workers are elsewhere, as in local steps, or residuals are averaged between steps."""
        return self.lambda_ == 0.0 and self.period == 1 and self.average_errors is None

    def exchanges(self, step: int) -> bool:
        return (step + 1) % self.period == 0

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        """e ← mean e, in the steps that `average_errors` says."""
        if self.average_errors is not None and (key.step + 1) % self.average_errors == 0:
            yield [part.state["residual"] for part in parts if not part.lossless and not part.zero_learning_rate]

    def for_dense(self) -> Feedback:
        return replace(self, dense=True)

    def slots(self, segments: Segments) -> Slots:
        kept = {"residual": Slot(Role.RESIDUAL), "momentum": Slot()}
        if self.period > 1 or (self.lambda_ > 0 and not self.dense):
            kept["x"] = Slot(Role.POINT)
        return {**kept, "displacement": Slot()} if self.period > 1 else kept

    def addition(self, part: Part, ctx: StepContext) -> Addition:
        state, sgd = part.state, ctx.settings
        return Addition(
            part.segments,
            state["residual"],
            gradient=0.0,
            decay=sgd.weight_decay,
            momentum=state["momentum"],
            mu=sgd.momentum,
            of_momentum=sgd.lr,
            displacement=state.get("displacement"),
        )

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        if self.period > 1:  # the local steps are part of x now
            torch.mul(part.state["residual"], 0.0 if self.dense else self.lambda_, out=part.state["displacement"])
        super().apply_(part, out, ctx)

    def shift(self, part: Part) -> tuple[torch.Tensor, float] | None:
        """The parameters hold p = x − λe, less the local steps."""
        if "x" not in part.state:
            return None
        return (part.state["displacement"], 1.0) if self.period > 1 else (part.state["residual"], self.lambda_)
