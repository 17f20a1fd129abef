"""Steps of optimizers that are not ours, for parameters of a method that must know.

Such an optimizer (Horovod's, or any beside DDP's hook) steps after an undone exchange, too, and methods that apply the update do so in its place.
With one process an unmodified Horovod never calls compress, and a method with momentum inside would vanish silently.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import CompressionError
from .closures import Arguments, Evaluated, closure_of, place_of, signature, with_closure

__all__ = ["claim", "follow", "hook_inner_step", "is_hooked", "tell_schedulers"]

_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__
"""Of the functions that torch puts around the `step` of every class of optimizers, to run step hooks and to name it in profiles."""


class Holder(Protocol):
    """What has parameters whose steps it wants to know of."""

    @property
    def named(self) -> Sequence[tuple[str, torch.nn.Parameter]]: ...

    @property
    def ids(self) -> frozenset[int]:
        """Of the parameters named."""
        ...


class Claimant(Holder, Protocol):
    """It is told before they are moved."""

    @property
    def exchanging(self) -> bool:
        """Gradients are exchanged by it in the backward pass, which is over when it is told."""
        ...

    def before_step(self) -> None: ...


class Follower(Holder, Protocol):
    """It is told when they have been."""

    def after_step(self) -> None: ...


H = TypeVar("H", bound=Holder)


class _Listeners(Generic[H]):
    """By parameter, while they live. `register` makes torch call what looks at them."""

    def __init__(self, register: Callable[[], object]) -> None:
        self._register = register
        self._registered = False
        self._of: dict[int, weakref.ref[H]] = {}
        self._lock = threading.Lock()

    def add(self, holder: H) -> None:
        with self._lock:
            if not self._registered:  # when the first comes, and never removed: torch iterates over its hooks unlocked
                _keep_step_hooks()
                self._register()
                self._registered = True
            for _, parameter in holder.named:
                self._of[id(parameter)] = weakref.ref(holder)

    def of(self, parameter: torch.nn.Parameter) -> H | None:
        """Who listens for steps of `parameter`."""
        if (found := self._of.get(id(parameter))) is None:
            return None
        holder = found()
        if holder is not None and id(parameter) in holder.ids:  # while it lives it holds its parameters, so the id is theirs
            return holder
        self._of.pop(id(parameter), None)
        return None


def claim(bound: Claimant) -> None:
    """From now on call `bound.before_step()` before every step of any optimizer that holds one of its parameters, while it lives."""
    _claims.add(bound)


def follow(bound: Follower) -> None:
    """From now on call `bound.after_step()` after every step of any optimizer that holds one of its parameters, while it lives. Twice after one of
    an unmodified Horovod's that is not attached."""
    _followers.add(bound)


def is_hooked(step: Any) -> bool:
    """Whether `step`, of a class of optimizers, is what torch puts around it to run step hooks; what it was before is its `__wrapped__`."""
    return getattr(step, "__code__", None) is _HOOKED


@functools.cache
def _keep_step_hooks() -> None:
    """The first module that torch 2.2 compiles takes step hooks off torch's optimizers for good, and nobody would be told of their steps: let it do
    that now, and put them back. Importing the compiler takes it a second or two. It does not compile for Python 3.12."""
    if torch.__version__ >= "2.3" or sys.version_info >= (3, 12):
        return
    from torch._dynamo.eval_frame import TorchPatcher

    TorchPatcher.patch()  # once for all
    for cls in vars(torch.optim).values():
        step = vars(cls).get("step") if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) else None
        if step is not None and cls is not torch.optim.Optimizer and not is_hooked(step):
            cls.step = torch.optim.Optimizer.profile_hook_step(step)
            cls.step.hooked = True  # as torch does when the first of a class is made


def hook_inner_step(optimizer: torch.optim.Optimizer) -> None:
    """From now on step hooks run once in a step of `optimizer`, whose class was made for it alone and calls `step` of the class below: around that.

    Whoever claims its parameters is told before the outer step, too. Nothing where it is so already.
    """
    cls: Any = type(optimizer)
    hooked, inner = vars(cls).get("step"), cast(Any, super(cls, optimizer))
    if not (is_hooked(hooked) and is_hooked(getattr(inner.step, "__func__", None))):
        return
    outer = hooked.__wrapped__

    @functools.wraps(outer)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        _tell_claimants(self)
        return outer(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # torch would put step hooks around this one too
    cls.step = step
    held: Any = optimizer.__dict__.get("step")
    if hasattr(held, "_wrapped_by_lr_sched") or hasattr(held, "_with_counter"):  # a scheduler's, which calls what the class had before
        this = weakref.ref(optimizer)

        @functools.wraps(held)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            stepping = this()
            assert stepping is not None
            tell_schedulers(stepping)
            return step(stepping, *args, **kwargs)

        optimizer.__dict__["step"] = tracked


def tell_schedulers(optimizer: torch.optim.Optimizer) -> None:
    """Schedulers that were made for the optimizer, and look at its steps, warn of what comes before the first: this is one."""
    held = optimizer.__dict__
    if hasattr(held.get("step"), "_wrapped_by_lr_sched"):
        held["_opt_called"] = True
    if hasattr(held.get("step"), "_with_counter"):  # torch before 2.4
        held["_step_count"] += 1


def _before_step(optimizer: torch.optim.Optimizer, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]] | None:
    """A closure is evaluated first, as its backward pass exchanges gradients, and a stand-in takes its place. `args` begins with the optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    place = place_of(signature(type(optimizer).step)) if args[1:] or kwargs else 0
    closure = closure_of(args[1:], kwargs, place)
    if closure is None or not any(bound.exchanging for p in parameters if (bound := _claims.of(p)) is not None):
        _tell_claimants(optimizer)
        return None
    with torch.enable_grad():
        value = closure.value if isinstance(closure, Evaluated) else closure()
    _tell_claimants(optimizer)
    rest, kwargs = with_closure(args[1:], kwargs, place, Evaluated(value, parameters, type(optimizer).__name__))
    return (args[0], *rest), kwargs


def _tell_claimants(optimizer: torch.optim.Optimizer) -> None:
    claimed: dict[int, Claimant] = {}
    late: torch.Tensor | None = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (bound := _claims.of(parameter)) is not None:
                claimed[id(bound)] = bound
            elif parameter.requires_grad and parameter.grad is not None:
                late = parameter
    if late is not None and claimed:
        raise CompressionError(
            f"a parameter of shape {tuple(late.shape)} takes part in training but was frozen or absent when the compression was bound; its "
            "gradients are not averaged, and ranks would drift apart. Bind and wrap while everything is trainable and freeze afterwards, or bind "
            "again and make a new optimizer after unfreezing or adding parameters."
        )
    for bound in claimed.values():
        bound.before_step()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    listening = [_followers.of(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for bound in {id(b): b for b in listening if b is not None}.values():
        bound.after_step()


_claims = _Listeners[Claimant](lambda: register_optimizer_step_pre_hook(_before_step))
_followers = _Listeners[Follower](lambda: register_optimizer_step_post_hook(_after_step))
