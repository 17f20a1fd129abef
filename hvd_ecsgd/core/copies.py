"""Saved, copied and averaged models: what is taken of parameters at a shifted point differs between ranks, and is warned of."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
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
    """The `swa_utils.AveragedModel`s that were made of one bound module. Each is warned of once."""

    def __init__(self) -> None:
        self._watched: list[_Watched] = []

    def watch(self, model: AveragedModel) -> None:
        """From now on."""
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


class ShiftWarning:
    """A hook of a module before its `state_dict()`: says that its parameters are shifted now. `of` returns (whether they are, the method's feedback
    rule, the averages to watch), or None where nothing is trained any more.

    A copied or pickled module is told of likewise, and leaves the hook behind; an `AveragedModel`, which copies, is watched instead.
    """

    def __init__(self, of: Callable[[], tuple[bool, object, Averages] | None]) -> None:
        self._of = of

    def __call__(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        self._warn(4)

    def _warn(self, stacklevel: int) -> None:
        shifted, feedback, _ = self._of() or (False, None, None)
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
        found, of = _averaged_model(), self._of()
        if found is None or of is None:
            self._warn(3)
        else:
            of[2].watch(found)
        return ShiftWarning(_nothing)


def _nothing() -> None:
    return None


def _averaged_model() -> AveragedModel | None:
    """The one that is being made, by copying a module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _MAKING:
            made: AveragedModel = frame.f_locals["self"]
            return made
        frame = frame.f_back
    return None
