"""A script's own optimizer behind what training at different paces adds to it: one attribute, and the methods that its class gets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol

import torch

from hvd_ecsgd.core.meter import Meter
from hvd_ecsgd.errors import CompressionError
from hvd_ecsgd.optimizer.own_class import OwnClass, copy_attributes

__all__ = ["Participant", "Participating", "participant_of", "wrapped"]

_PARTICIPANT = "_mpi_backend_participant"
"""The one attribute that a wrapped optimizer carries beside its own."""


class Participant(Protocol):
    """What takes part for a wrapped optimizer: a worker, and how it talks to the others."""

    what: str
    """Who made the optimizer, by name."""
    with_whom: str
    """Whom it works with, as errors say it."""
    instead: str
    """What to save in place of the optimizer."""
    own: OwnClass

    def step(self) -> None: ...

    def consistent(self) -> AbstractContextManager[None]: ...

    def finish(self) -> None: ...

    def measure_by(self, meter: Meter | None) -> None: ...


def wrapped(optimizer: torch.optim.Optimizer, mixin: type[Participating], participant: Participant) -> Any:
    """An instance of the optimizer's own class behind `mixin`, which finds the `participant` under the one attribute that is added."""
    own = type(optimizer)
    cls: Any = type(own.__name__, (mixin, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})
    made = object.__new__(cls)
    copy_attributes(optimizer, made)
    made.__dict__[_PARTICIPANT] = participant
    return made


def participant_of(optimizer: Any) -> Any:
    """Of an optimizer that `wrapped` made."""
    return optimizer.__dict__[_PARTICIPANT]


def _exchange(optimizer: Any, *args: Any, **kwargs: Any) -> None:
    participant_of(optimizer).step()


_hooked_exchange: Callable[..., None] = torch.optim.Optimizer.profile_hook_step(_exchange)
"""The same within step hooks and the profiler's range, as torch has them around every optimizer's `step`."""


class Participating(torch.optim.Optimizer):
    """Mixin in front of the optimizer's own class: what all of these offer."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__refuse("pickled", f" {participant_of(self).instead}")

    def __refuse(self, what: str, instead: str = "") -> NoReturn:
        participant: Participant = participant_of(self)
        raise CompressionError(f"an optimizer of {participant.what} cannot be {what}: it belongs to {participant.with_whom}.{instead}")

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Hand this worker's gradient over, and take what x has become. A closure is evaluated once, before."""
        closure = participant_of(self).own.closure(args, kwargs)
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        _hooked_exchange(self)
        return value

    step.hooked = True  # type: ignore[attr-defined]  # torch would put step hooks around this one too

    def consistent(self) -> AbstractContextManager[None]:
        """`with optimizer.consistent():` — inside x is the same on all workers. Collective over the workers that are not done."""
        held: AbstractContextManager[None] = participant_of(self).consistent()
        return held

    def finish(self) -> None:
        """This worker has no more batches. `step()` is a `SequenceError` afterwards."""
        participant_of(self).finish()

    def measure_by(self, meter: Meter | None) -> None:
        """What `telemetry.Logger(optimizer, …)` calls. Raises `CompressionError` where another one measures."""
        participant_of(self).measure_by(meter)
