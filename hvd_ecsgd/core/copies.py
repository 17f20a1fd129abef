"""Saved, copied and averaged models: what is taken of parameters at a shifted point differs between ranks, and is warned of."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

__all__ = ["Averages", "ShiftWarning"]

_MAKING = AveragedModel.__init__.__code__


@dataclass
class _Watched:
    """An averaged model, and its count of updates as it was looked at last."""

    model: weakref.ref[AveragedModel]
    version: int = 0
    count: int = 0

    def updated(self) -> bool:
        """Whether it took an average since it was looked at last; a loaded state is none. Reads the count only where something was written to it."""
        model = self.model()
        if model is None or model.n_averaged._version == self.version:
            return False
        written, before = model.n_averaged._version - self.version, self.count
        self.version, self.count = model.n_averaged._version, int(model.n_averaged)
        return self.count - before == written


class Averages:
    """The `swa_utils.AveragedModel`s that are made from now on of a module which holds a parameter of `ids`. Each is warned of once.

    The module need not be known: torch tells of every module that becomes a part of another one, as the copy does of the averaged model.
    """

    def __init__(self, ids: frozenset[int] = frozenset()) -> None:
        self.ids = ids
        self._watched: list[_Watched] = []
        _Made.tell(self)

    def watch(self, model: AveragedModel) -> None:
        """From now on."""
        if all(watched.model() is not model for watched in self._watched):
            self._watched.append(_Watched(weakref.ref(model)))

    def look(self, shifted: bool, feedback: object) -> None:
        """Warn of those that took an average since the last look, if the parameters were `shifted`. To be called before parameters are moved."""
        for watched in list(self._watched):
            if watched.model() is None:
                self._watched.remove(watched)
            elif watched.updated() and shifted:
                self._watched.remove(watched)
                warnings.warn(
                    f"an AveragedModel was updated while {feedback} held the parameters at a shifted point, so it averages other weights on each "
                    "rank. Call update_parameters inside `with compression.at('averaged'):`, also the first time.",
                    UserWarning,
                    stacklevel=2,
                )


class _Made:
    """Who is told of averaged models that are made, while they live."""

    _told: ClassVar[weakref.WeakSet[Averages]] = weakref.WeakSet()
    _registered = False
    _lock = threading.Lock()

    @classmethod
    def tell(cls, averages: Averages) -> None:
        with cls._lock:
            if not cls._registered:  # when the first comes, and never removed: torch iterates over its hooks unlocked
                register_module_module_registration_hook(cls._part)
                cls._registered = True
            cls._told.add(averages)

    @classmethod
    def _part(cls, module: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
        """`part` becomes a part of `module`."""
        if isinstance(module, AveragedModel) and (made := _making()) is not None:
            ids = {id(p) for p in made["model"].parameters()}
            with cls._lock:
                told = [averages for averages in cls._told if averages.ids & ids]
            for averages in told:
                averages.watch(module)


class ShiftWarning:
    """A hook of a module before its `state_dict()`: says that its parameters are shifted now. `of` returns (whether they are, the method's feedback
    rule), or None where nothing is trained any more.

    A copied or pickled module is told of likewise, and leaves the hook behind; an `AveragedModel`, which copies, is watched instead.
    """

    def __init__(self, of: Callable[[], tuple[bool, object] | None]) -> None:
        self._of = of

    def __call__(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        self._warn(4)

    def _warn(self, stacklevel: int) -> None:
        shifted, feedback = self._of() or (False, None)
        if shifted:
            warnings.warn(
                f"{feedback} holds the parameters at a shifted point that differs between ranks; save, copy and evaluate inside "
                "`with compression.at('averaged'):`.",
                UserWarning,
                stacklevel=stacklevel,
            )

    def __reduce__(self) -> tuple[type[ShiftWarning], tuple[Any]]:
        self._warn(3)
        return (ShiftWarning, (_nothing,))

    def __deepcopy__(self, memo: Any) -> ShiftWarning:
        if _making() is None:
            self._warn(3)
        return ShiftWarning(_nothing)


def _nothing() -> None:
    return None


def _making() -> dict[str, Any] | None:
    """Arguments of the `AveragedModel` that is being made."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _MAKING:
            return frame.f_locals
        frame = frame.f_back
    return None
