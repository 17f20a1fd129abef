"""What accumulate rules share: who applies the update, worker momentum, and what most rules do not do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import torch

from ..errors import CompressionError
from ..kernels import Addition, move_
from ..protocols import Accumulated, Part, StepContext, Takes
from ..segments import Key

__all__ = ["AppliesUpdate", "GradientUnit", "LocalPoint", "Rule", "move_by_", "refuse_no_learning_rate", "refuse_options"]


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


class Rule(ABC):
    """Mixin: a step's way into the state and out of it again, and what most rules do without. A rule says what gradients add (`addition`)."""

    @property
    def survives(self) -> bool:
        """See `Feedback`."""
        return True

    @abstractmethod
    def addition(self, part: Part, ctx: StepContext) -> Addition:
        """What a step adds to which slots. The old residual comes in this step's units, `ctx.carry` times itself."""

    def accumulate_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> Accumulated:
        """One pass, compiled; in torch one that looks for inf and NaN before anything is changed, and those that add."""
        return self.addition(part, ctx).accumulated_(gradients, part.parameters, part.wanted)

    def undo_(self, part: Part, gradients: Sequence[torch.Tensor] | None, ctx: StepContext) -> None:
        """Where gradients are gone, momentum and residual keep them: those of this worker, which are finite."""
        self.addition(part, ctx).take_(gradients, part.parameters)

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


def move_by_(part: Part, targets: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """targets −= out, for a tensor by segment: everywhere, or where alone `out` is not zero, which it is there then, too."""
    if part.touched is None:
        torch._foreach_sub_(list(targets), part.segments.shaped_views(out))
        return
    while part.touched:
        move_(targets, out, part.segments, part.touched.pop())


class LocalPoint(AppliesUpdate):
    """Mixin: x moves by the mean; with a slot `x` the parameters are elsewhere (`shift`), else they are x."""

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        """x ← x − out."""
        move_by_(part, part.segments.shaped_views(part.state["x"]) if "x" in part.state else part.parameters, out)
