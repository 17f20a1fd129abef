"""How the ranks of a bound method find each other on an unmodified Horovod, and tell each other what they begin."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..core.talk import STEP, raise_if_apart, raise_if_joined
from .introduction import Introduction
from .opening import Opening, await_others
from .transport import SlotTransport

__all__ = ["Meeting", "inside_backward"]

_PATIENCE = 5.0
"""Seconds that the end of a backward pass waits for the other ranks to begin the step, while another slot is in none."""


class Meeting:
    """Of one bound method. `introduction`: how the other ranks' counterparts are found, before the first step.

    `nobody_waits` says that no rank can be waiting for this one to begin something else, so that it is safe to wait here.
    """

    def __init__(self, transport: SlotTransport, introduction: Introduction | None, nobody_waits: Callable[[], bool]) -> None:
        self._transport, self._introduction, self._nobody_waits = transport, introduction, nobody_waits
        self._opening: Opening | None = None
        self._patient = True

    def find(self) -> bool:
        """Find the other ranks before the first step; returns whether it is safe to wait for them: all have come with this method, or nobody
        waits."""
        return self._introduce(STEP) if self._introduction is not None else self._nobody_waits()

    def before(self, what: str) -> None:
        """All ranks call this before they do `what` together outside of a step. See `Driver.meet`."""
        if self._transport.size == 1:
            return
        if self._introduction is not None:
            self._introduce(what)
        opening = Opening(self._transport.direct, what)
        await_others(opening.said, what, self._transport.rank)
        doing = opening.doing()
        raise_if_apart(doing)
        raise_if_joined(what, doing)

    def open_step(self) -> None:
        """Tell the other ranks that a step begins here."""
        self.check_same()  # of a step that an error has ended
        if self._transport.size > 1:
            self._opening = Opening(self._transport.direct, STEP)

    def check_same_when_due(self) -> None:
        """Find out whether a step begins on the other ranks, too, before Horovod waits for what they would never send.

        That is as late as possible: at the end of the backward pass, or in `step()` before Horovod's.
        """
        if self._opening is not None and inside_backward():
            torch.autograd.Variable._execution_engine.queue_callback(self._check_same_if_safe)
        else:
            self._check_same_if_safe()

    def check_same(self) -> None:
        """Raise `DisagreementError`, on every rank, where some do something else than a step. Waits for the other ranks to begin."""
        opening, self._opening = self._opening, None
        if opening is not None:
            raise_if_apart(opening.doing())

    def _check_same_if_safe(self) -> None:
        """`check_same`, unless other ranks may be waiting for this one to begin a step of another slot: then it is looked for until patience ends,
        once, as models that each rank uses in turn would take that long in every step."""
        if self._opening is not None and not self._nobody_waits():
            give_up = time.monotonic() + (_PATIENCE if self._patient else 0.0)
            while self._opening is not None and not self._opening.said.done():
                if time.monotonic() > give_up:
                    self._patient = False
                    return
                time.sleep(0.001)
        self.check_same()

    def _introduce(self, doing: str) -> bool:
        """Find the other ranks; returns whether all have come with this method."""
        assert self._introduction is not None
        prefix, together = self._introduction.meet(self._transport.direct, doing)
        self._transport.rename(prefix)
        self._introduction = None
        return together


def inside_backward() -> bool:
    """True in a hook of a running backward pass."""
    return int(torch._C._current_graph_task_id()) != -1
