"""The handle of a submitted collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, cast

from ..tracing import untraced

__all__ = ["Finished", "Pending", "Progress"]

T = TypeVar("T")
Finished = Callable[[Exception | None], Exception | None]
"""Of a job that outlives its ranks: given what a collective ended with on this rank, what it is to end with on all."""


class Progress(Protocol):
    """Who carries collectives on: the engine."""

    def help(self) -> None:
        """Take a turn, if that is the callers' job."""

    def wait(self, event: threading.Event) -> None:
        """Return when `event` is set."""


class Pending(Generic[T]):
    """The handle of a submitted collective."""

    def __init__(self, engine: Progress, finish: Callable[[Any], T], finished: Finished | None = None) -> None:
        self._engine, self._finished = engine, finished
        self._settled = threading.Event()
        self._finish: Callable[[Any], T] | None = finish
        self._result: Any = None
        self._error: Exception | None = None

    @untraced
    def done(self) -> bool:
        """True when `wait` would not block. Never blocks."""
        if not self._settled.is_set():
            self._engine.help()
        return self._settled.is_set()

    @untraced
    def wait(self) -> T:
        """Block until finished and return the result; safe to call again. Raises `HorovodInternalError` when the collective failed."""
        if not self._settled.is_set():
            self._engine.wait(self._settled)
        if self._finished is not None:
            finished, self._finished = self._finished, None
            self._error = finished(self._error)
        if self._error is not None:
            raise self._error
        if self._finish is not None:  # in the caller's thread: its streams, its inference mode
            self._result, self._finish = self._finish(self._result), None
        return cast(T, self._result)

    def settle(self, value: Any) -> None:
        """For the engine: it is done."""
        self._result = value
        self._settled.set()

    def refuse(self, error: Exception) -> None:
        """For the engine: it is not begun, as all that submitted it are told. Ranks that did not, as they have left, have nothing to agree on."""
        self._finished = None
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """For the engine: it has failed, unless it was done before."""
        if not self._settled.is_set():
            self._error = error
            self._settled.set()
