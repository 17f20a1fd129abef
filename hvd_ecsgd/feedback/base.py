"""What accumulate rules share: who applies the update, worker momentum, and what most rules do not do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import torch

from ..errors import CompressionError
from ..kernels import all_finite
from ..protocols import Accumulated, Part, StepContext, Takes
from ..segments import Key

__all__ = ["AppliesUpdate", "GradientUnit", "Rule", "LocalPoint", "add_scaled_", "add_to_momentum_", "refuse_no_learning_rate",
           "refuse_options", "take_from_momentum_"]  # fmt: skip


def refuse_options(rule: object, options: Mapping[str, Any], where: str, plain: Mapping[str, Any], remedy: str = "") -> None:
    """Raise for the first option of a param group that is not as in `plain`. Options that the group does not have are plain."""
    for option, value in plain.items():
        if options.get(option, value) != value:
            raise CompressionError(f"{rule}: {where} has {option}={options[option]}; it supports {option}={value} only.{remedy and f' {remedy}'}")


def refuse_no_learning_rate(rule: object, options: Mapping[str, Any], where: str) -> None:
    """For rules that use η itself, and not only the ratio of two."""
    if options.get("lr") is None:
        raise CompressionError(
            f"{rule} needs the learning rate itself, and {where} has none (lr={options.get('lr')!r}). Give the optimizer one, or use a method in "
            "gradient units such as Compression.top_k() or Compression.double_squeeze(), which needs no more than how the learning rate changes."
        )


def add_to_momentum_(part: Part, gradients: Sequence[torch.Tensor], mu: float, wd: float) -> torch.Tensor:
    """m ← μm + g + wd·x, coupled weight decay at the point where the gradient was taken. Returns m."""
    momentum = part.state["momentum"].mul_(mu)
    views = part.segments.shaped_views(momentum)
    torch._foreach_add_(views, list(gradients))
    if wd:
        torch._foreach_add_(views, list(part.parameters), alpha=wd)
    return momentum


def take_from_momentum_(part: Part, gradients: Sequence[torch.Tensor], mu: float, wd: float) -> None:
    """Reverse `add_to_momentum_`, to rounding. With μ = 0 nothing is left of what was before, and nobody asks for it."""
    momentum = part.state["momentum"]
    if mu == 0:
        momentum.zero_()
        return
    views = part.segments.shaped_views(momentum)
    if wd:
        torch._foreach_add_(views, list(part.parameters), alpha=-wd)
    torch._foreach_sub_(views, list(gradients))
    momentum.div_(mu)


def add_scaled_(part: Part, gradients: Sequence[torch.Tensor], eta: float, wd: float = 0.0) -> torch.Tensor:
    """e ← e + η·(g + wd·x); with -η, its reverse, to rounding. Returns e."""
    residual = part.state["residual"]
    views = part.segments.shaped_views(residual)
    torch._foreach_add_(views, list(gradients), alpha=eta)
    if wd:
        torch._foreach_add_(views, list(part.parameters), alpha=eta * wd)
    return residual


class Rule(ABC):
    """Mixin: a step's way into the state and out of it again, and what most rules do without.

    A rule says in `_add_` what gradients add, and in `_take_` how that is taken back. One that reads them in a fused kernel has an `accumulate_` of
    its own, to which the same reversal belongs.
    """

    def accumulate_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> Accumulated:
        """A pass that looks for inf and NaN, before anything is changed, and one that adds."""
        if not all(all_finite(g) for g in gradients):
            return Accumulated.nothing(part.segments)
        self._carry_(part, ctx)
        return Accumulated(self._add_(part, gradients, ctx))

    def undo_(self, part: Part, gradients: Sequence[torch.Tensor] | None, ctx: StepContext) -> None:
        """Where gradients are gone, momentum and residual keep them: those of this worker, which are finite."""
        if gradients is not None:
            self._take_(part, gradients, ctx)
        self._carry_back_(part, ctx)

    def _carry_(self, part: Part, ctx: StepContext) -> None:
        """The old residual, in this step's units."""
        if ctx.carry != 1.0 and "residual" in part.state:
            part.state["residual"].mul_(ctx.carry)

    def _carry_back_(self, part: Part, ctx: StepContext) -> None:
        """Reverse `_carry_`, to rounding."""
        if ctx.carry != 1.0 and "residual" in part.state:
            part.state["residual"].div_(ctx.carry)

    @abstractmethod
    def _add_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> torch.Tensor:
        """Add what finite gradients bring to the state, and return the buffer."""

    @abstractmethod
    def _take_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> None:
        """Reverse `_add_`, to rounding."""

    def exchanges(self, step: int) -> bool:
        return True

    def shift(self, part: Part) -> tuple[torch.Tensor, float] | None:
        """Gradients are taken at x, where the parameters are."""
        return None

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        """Nothing is done together between steps."""
        yield from ()


class GradientUnit(Rule):
    """Mixin: the buffer holds gradients, and the optimizer acts after the exchange."""

    @property
    def unit(self) -> Literal["gradient", "update"]:
        return "gradient"

    @property
    def takes(self) -> Takes:
        return Takes.NOTHING

    def check_group(self, options: Mapping[str, Any], where: str) -> None:
        """Any optimizer can follow; one without a learning rate where the rule uses none."""
        if self.takes.learning_rate:
            refuse_no_learning_rate(self, options, where)

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        """The optimizer applies the mean."""


class AppliesUpdate(Rule):
    """Mixin: update units; the rule moves the parameters itself, by what SGD's param group says without the options it does not have."""

    @property
    def unit(self) -> Literal["gradient", "update"]:
        return "update"

    @property
    def takes(self) -> Takes:
        return Takes.UPDATE

    def check_group(self, options: Mapping[str, Any], where: str) -> None:
        refuse_no_learning_rate(self, options, where)
        refuse_options(self, options, where, {"dampening": 0, "nesterov": False, "maximize": False})


class LocalPoint(AppliesUpdate):
    """Mixin: x moves by the mean; with a slot `x` the parameters are elsewhere (`shift`), else they are x."""

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        """x ← x − out."""
        if "x" in part.state:
            part.state["x"].sub_(out)
        else:
            torch._foreach_sub_(list(part.parameters), part.segments.shaped_views(out))
