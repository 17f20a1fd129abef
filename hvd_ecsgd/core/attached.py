"""The optimizer whose hyper-parameters a bound method reads, and the GradScaler that scales its loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CompressionError
from ..protocols import GroupSettings, Role
from .bucket import Bucket
from .method import Method
from .state import NamedParameters

__all__ = ["ATTACH", "Attached", "check_plain_sgd", "groups_of", "refuse_other"]

ATTACH = "call compression.attach(optimizer), with what hvd.DistributedOptimizer returned, before the first backward pass."


class Attached:
    """What was given to `compression.attach`, read live."""

    def __init__(self) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaler: Any = None
        self._places: dict[int, tuple[int, int]] = {}
        """Param group and place in it of a parameter (by id), where it was found last."""
        self._warned = False

    @staticmethod
    def check(optimizer: torch.optim.Optimizer, method: Method, named: NamedParameters) -> None:
        """Raise `CompressionError` where `optimizer` holds none of the parameters, or what the method cannot do."""
        bound = {id(p) for _, p in named}
        if not any(id(p) in bound for group in optimizer.param_groups for p in group["params"]):
            raise CompressionError(
                f"attach(): the optimizer holds none of the bound parameters ('{named[0][0]}', …). Pass the optimizer that "
                "hvd.DistributedOptimizer returned for this model."
            )
        for g, group in enumerate(optimizer.param_groups):
            if any(id(p) in bound for p in group["params"]):
                method.feedback.check_group(group, _group_of(optimizer, g))

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by now; 1 without a scaler."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def group_of(self, bucket: Bucket) -> int:
        """The param group of the bucket's first parameter, in the optimizer that is attached; without one the group that the driver has told."""
        found = None if self.optimizer is None else self._group_index(bucket.parameters[0], self.optimizer.param_groups)
        return bucket.group if found is None else found

    def settings(self, method: Method, bucket: Bucket) -> GroupSettings:
        """Those of the bucket's param group now. Without an optimizer the learning rate is taken to be constant, and where that cannot be it is an
        error that names the remedy."""
        feedback = method.feedback
        if self.optimizer is None:
            if feedback.takes.momentum:
                raise CompressionError(
                    f"{feedback} applies momentum and weight decay itself and must see the optimizer's param groups (parameter "
                    f"'{bucket.segments.names[0]}'): {ATTACH}"
                )
            if feedback.takes.learning_rate:
                raise CompressionError(
                    f"{feedback} needs the learning rate itself (parameter '{bucket.segments.names[0]}'): call compression.attach(optimizer) "
                    "before the first backward pass."
                )
            if Role.RESIDUAL in method.slot_names:
                self._warn_once("the learning rate is taken to be constant; call compression.attach(optimizer) if it changes.")
            return GroupSettings(loss_scale=self.loss_scale)
        g = self._group_index(bucket.parameters[0], self.optimizer.param_groups)
        if g is not None:
            feedback.check_group(self.optimizer.param_groups[g], _group_of(self.optimizer, g))
            return self.settings_of(method, self.optimizer, g)
        raise CompressionError(
            f"parameter '{bucket.segments.names[0]}' is in no param group of the attached optimizer; attach the optimizer that trains it."
        )

    def settings_of(self, method: Method, optimizer: torch.optim.Optimizer, g: int) -> GroupSettings:
        """Of the optimizer's param group `g` now. Warns once where methods in gradient units must take its learning rate to be constant."""
        feedback = method.feedback
        group, where = optimizer.param_groups[g], _group_of(optimizer, g)
        needs = feedback.takes.learning_rate
        if group.get("lr") is None and Role.RESIDUAL in method.slot_names and not needs:
            self._warn_once(
                f"{where} has no learning rate; what the method holds back is taken to be worth the same in all steps. Give the optimizer a learning "
                "rate (lr=) if it has one that changes."
            )
        return GroupSettings.of(group, self.loss_scale, where, needs)

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, UserWarning, stacklevel=3)

    def _group_index(self, parameter: torch.Tensor, groups: list[dict[str, Any]]) -> int | None:
        """Looked up live, since load_state_dict replaces the groups and add_param_group adds some; where it was last time first."""
        g, i = self._places.get(id(parameter), (0, 0))
        if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is parameter:
            return g
        for g, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if p is parameter:
                    self._places[id(parameter)] = (g, i)
                    return g
        return None


def groups_of(optimizer: torch.optim.Optimizer | None) -> Callable[[torch.nn.Parameter], int]:
    """What gives the index of a parameter's param group now: 0 without an optimizer, one past the last for parameters that it does not hold."""
    groups = [] if optimizer is None else optimizer.param_groups
    places = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
    return lambda parameter: places.get(id(parameter), len(groups))


def refuse_other(method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Raise `CompressionError` where a method that applies the update would have to follow `optimizer`, and its driver has hyper-parameters of its
    own. Others need not be told: theirs are read where the gradients come from."""
    if method.feedback.takes.update:
        raise CompressionError(
            f"attach(): {method.feedback} applies the update itself, by the options of what it was given to when it was bound; a "
            f"{type(optimizer).__name__} beside that is not stepped. Attach the optimizer that DistributedOptimizer returned, or none."
        )


def check_plain_sgd(method: Method, step: Any, name: str) -> None:
    """`step`, of the optimizer named `name`, is torch.optim.SGD's, which a method that applies the update itself stands in for."""
    if getattr(step, "__func__", step) is not torch.optim.SGD.step:
        raise CompressionError(
            f"{method.feedback} works with torch.optim.SGD, whose lr, momentum and weight_decay it applies itself; got {name} with another step()."
        )


def _group_of(optimizer: torch.optim.Optimizer, g: int) -> str:
    return f"param group {g} of {type(optimizer).__name__}"
