"""Who runs the work of an exchange, who is told of it, and how a thread waits without taking a core."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from ..transport.patience import Patience

__all__ = ["Executor", "Inline", "Observer", "never", "wait_patiently"]

Observer = Callable[[str, str, float, float], None]
"""Is told the bucket (or "backward"), what was done (BACKWARD, COMPRESS, COMMUNICATE), and from when to when (time.perf_counter)."""


class Executor(Protocol):
    """Runs what it is given, one after the other in that order: at once, or in a thread of its own while the caller goes on."""

    @property
    def concurrent(self) -> bool:
        """Whether the caller goes on."""
        ...

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work`, after what was submitted before. Raises what that raised, if something did; then nothing more is run until `drain`."""
        ...

    def drain(self) -> None:
        """Return when everything has run. Raises what was raised."""
        ...


class Inline:
    """Runs everything at once."""

    concurrent = False

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def drain(self) -> None:
        pass


class _Waited(Protocol):
    def done(self) -> bool: ...

    def wait(self) -> object: ...


def never() -> bool:
    """Do not give up."""
    return False


def wait_patiently(handle: _Waited | Any, give_up: Callable[[], bool] = never) -> bool:
    """Until `handle` is done, looking at it now and then: waiting inside of a network library takes a whole core, but where the handle says that it
    `sleeps`. False when given up."""
    if give_up is never and getattr(handle, "sleeps", False):
        handle.wait()
        return True
    patience = Patience()
    while not handle.done():
        if give_up():
            return False
        time.sleep(patience.pause())
    return True
