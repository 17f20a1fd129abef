"""Handles of what was started, and the two collectives that carry no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from hvd_ecsgd.transport.base import Handle, Ready

from .. import runtime
from ..engine.negotiation import Request
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced

__all__ = ["Together", "barrier", "poll", "synchronize"]

T = TypeVar("T")


@untraced
def poll(handle: Handle[Any]) -> bool:
    """Whether `synchronize(handle)` would return without blocking. Raises ValueError for anything but a handle."""
    return _handle(handle, "poll").done()


@untraced
def synchronize(handle: Handle[T]) -> T:
    """Wait for an asynchronous operation and return its result; again, it returns the same.

    Raises `HorovodInternalError` when it failed, ValueError for anything but a handle.
    """
    return _handle(handle, "synchronize").wait()


def _handle(handle: Handle[T], what: str) -> Handle[T]:
    if not all(callable(getattr(handle, method, None)) for method in ("done", "wait")):
        raise ValueError(f"{what}: expected a handle, which the functions named …_async return, got {handle!r:.100}.")
    return handle


class Together:
    """Several handles as one."""

    def __init__(self, handles: Sequence[Handle[Any]]) -> None:
        self._handles = handles

    def done(self) -> bool:
        return all(handle.done() for handle in self._handles)

    def wait(self) -> list[Any]:
        return [handle.wait() for handle in self._handles]


@untraced
def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the process set has called it."""
    channel = runtime.channel(process_set)
    request = Request(channel.automatic_name(), "barrier")
    channel.submit(request, lambda nothing: None, start=lambda extras: Ready(None), kind="barrier").wait()
