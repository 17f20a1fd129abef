"""Steps of optimizers that are not ours, for parameters of a method that must know.

Such an optimizer (Horovod's, or any beside DDP's hook) steps after an undone exchange, too, and methods that apply the update do so in its place.
With one process an unmodified Horovod never calls compress, and a method with momentum inside would vanish silently.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import CompressionError

__all__ = ["claim", "follow"]


class Claimant(Protocol):
    """What wants to know of steps that move its parameters."""

    @property
    def named(self) -> Sequence[tuple[str, torch.nn.Parameter]]: ...

    @property
    def ids(self) -> frozenset[int]:
        """Of the parameters named."""
        ...

    def before_step(self) -> None: ...


class Follower(Protocol):
    """What wants to know when steps of its parameters have ended."""

    @property
    def named(self) -> Sequence[tuple[str, torch.nn.Parameter]]: ...

    @property
    def ids(self) -> frozenset[int]:
        """Of the parameters named."""
        ...

    def after_step(self) -> None: ...


_claims: dict[int, weakref.ref[Claimant]] = {}
_followers: dict[int, weakref.ref[Follower]] = {}
_lock = threading.Lock()
_watched = _followed = False


def claim(bound: Claimant) -> None:
    """From now on call `bound.before_step()` before every step of any optimizer that holds one of its parameters, while it lives."""
    global _watched
    with _lock:
        if not _watched:  # at the first claim, and never removed: torch iterates over its hooks unlocked
            register_optimizer_step_pre_hook(_before_step)
            _watched = True
        for _, parameter in bound.named:
            _claims[id(parameter)] = weakref.ref(bound)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    claimed: dict[int, Claimant] = {}
    late: torch.Tensor | None = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = _claims.get(id(parameter))
            bound = None if found is None else found()
            if bound is not None and id(parameter) in bound.ids:  # while it lives it holds its parameters, so the id is theirs
                claimed[id(bound)] = bound
            else:
                if found is not None:
                    _claims.pop(id(parameter), None)
                if parameter.requires_grad and parameter.grad is not None:
                    late = parameter
    if late is not None and claimed:
        raise CompressionError(
            f"a parameter of shape {tuple(late.shape)} takes part in training but was frozen or absent when the compression was bound; its "
            "gradients are not averaged, and ranks would drift apart. Bind and wrap while everything is trainable and freeze afterwards, or bind "
            "again and make a new optimizer after unfreezing or adding parameters."
        )
    for bound in claimed.values():
        bound.before_step()


def follow(bound: Follower) -> None:
    """From now on call `bound.after_step()` after every step of any optimizer that holds one of its parameters, while it lives. Twice after one of
    an unmodified Horovod's."""
    global _followed
    with _lock:
        if not _followed:
            register_optimizer_step_post_hook(_after_step)
            _followed = True
        for _, parameter in bound.named:
            _followers[id(parameter)] = weakref.ref(bound)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    following: dict[int, Follower] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = _followers.get(id(parameter))
            bound = None if found is None else found()
            if bound is not None and id(parameter) in bound.ids:
                following[id(bound)] = bound
            elif found is not None:
                _followers.pop(id(parameter), None)
    for bound in following.values():
        bound.after_step()
