"""Telling the other ranks what this one waits for outside of named collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import runtime
from ..engine.negotiation import Reduce, Request
from ..process_sets import ProcessSet

__all__ = ["announced"]


@contextmanager
def announced(name: str, text: str, process_set: ProcessSet) -> Iterator[Callable[[], None]]:
    """While it is entered, the other ranks know that this one waits for what `text` describes, which every rank calls `name` and describes alike.

    What travels on communicators of its own is not negotiated. So what a rank that does not come leaves others waiting for is reported, and fails, as
    named tensors do (HOROVOD_STALL_CHECK_TIME_SECONDS, HOROVOD_STALL_SHUTDOWN_TIME_SECONDS). The function that is given is to be called now and
    then; it raises `HorovodInternalError` once that has failed. Enter it after a while of waiting only: it costs messages.
    """
    channel = runtime.channel(process_set)
    # Nothing is reduced: those that have joined go through this too.
    request = Request(name, text, reduce=Reduce("sum", False, 1.0, 1.0, ()))
    try:
        said = channel.submit(request, lambda nothing: None, aside=True)
    except ValueError:  # it is being taken back still
        yield lambda: None
        return
    try:
        yield lambda: said.wait() if said.done() else None
    finally:
        if not said.done():
            channel.withdraw(name)
