"""What callers hand over to a channel, until the engine takes it."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import HorovodInternalError
from .negotiation import Join, Leave, Withdraw, automatic_name
from .pending import Pending
from .submission import Submission

__all__ = ["Intake", "Item"]

Item = Submission | Withdraw | Join | Leave


class Intake:
    """A queue, the names in use, and the numbers that stand for names. Callers and the engine come from different threads.

    `raise_failure` raises what ended the engine, if something has.
    """

    def __init__(self, raise_failure: Callable[[], None]) -> None:
        self._raise_failure = raise_failure
        self._lock = threading.Lock()
        self._queue: deque[Item] = deque()
        self._names: set[str] = set()
        self._numbers = itertools.count()
        self._joins = 0
        self.closed = False
        """Nothing more will run."""
        self.joining: Pending[int] | None = None
        self.leaving: Pending[None] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    # ---- for callers

    def automatic_name(self) -> str:
        """A name for a collective that the user gave none."""
        with self._lock:
            return automatic_name(self._joins, next(self._numbers))

    def add(self, submission: Submission) -> None:
        """Raises ValueError while its name is in use."""
        request = submission.request
        with self._lock:
            self._refuse_if_closed()
            if request.name in self._names:
                raise ValueError(
                    f"{request.text}: a tensor of this name is being processed already. Wait for it by synchronize(), or use another name."
                )
            self._names.add(request.name)
            self._queue.append(submission)

    def withdraw(self, name: str) -> None:
        with self._lock:
            self._queue.append(Withdraw(name))

    def join(self, pending: Pending[int]) -> None:
        with self._lock:
            self._refuse_if_closed()
            if self.joining is not None:
                raise ValueError("join: this rank has joined already, and waits for the others.")
            self.joining = pending
            self._queue.append(Join())

    def leave(self, pending: Pending[None]) -> None:
        with self._lock:
            self._refuse_if_closed()
            self.leaving = pending
            self._queue.append(Leave())

    def _refuse_if_closed(self) -> None:
        self._raise_failure()
        if self.closed or self.leaving is not None:
            raise HorovodInternalError("mpi_backend has been shut down, or this process set was removed.")

    # ---- for the engine

    def take(self) -> list[Item]:
        """All that is new."""
        with self._lock:
            new, self._queue = list(self._queue), deque()
        return new

    def free(self, name: str) -> None:
        """The name may be used again."""
        with self._lock:
            self._names.discard(name)

    def all_joined(self, last: int) -> None:
        """Some have had more batches than others: automatic names go on together."""
        assert self.joining is not None
        joining, self.joining = self.joining, None
        with self._lock:
            self._joins, self._numbers = self._joins + 1, itertools.count()
        joining.settle(last)

    def join_failed(self, message: str) -> None:
        if self.joining is not None:
            joining, self.joining = self.joining, None
            joining.fail(HorovodInternalError(message))

    def left(self) -> None:
        """Everybody has left, and nothing is on its way."""
        if self.leaving is not None:
            leaving, self.leaving = self.leaving, None
            leaving.settle(None)

    def close(self) -> list[Pending[Any]]:
        """Take nothing more; returns those that wait for what will never run."""
        with self._lock:
            self.closed = True
            waiting = [item.pending for item in self._queue if isinstance(item, Submission)]
            self._queue.clear()
        ends = [pending for pending in (self.joining, self.leaving) if pending is not None]
        self.joining = None
        return [*waiting, *ends]
