"""What is on its way: collectives made of messages between two ranks, and who carries them on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError

__all__ = ["SLOTS", "Opening", "Operation", "Operations", "Task"]

T = TypeVar("T")

Task: TypeAlias = Generator[Sequence[MPI.Request], None, None]
"""A part of a collective: it starts messages, yields the requests that must be complete before it goes on, and holds what MPI reads or writes."""
Opening: TypeAlias = Generator[Sequence[MPI.Request], None, Sequence[Task]]
"""Likewise; it returns the tasks that follow."""

SLOTS = 32
"""Tags of each collective, from the one it is given. Its tasks use them so that messages of one tag between two ranks are sent and received in one
order; messages of different collectives never meet."""

_LOOKS = 10  # looks that only yield, before the first that sleeps
_SHORTEST, _LONGEST = 10e-6, 200e-6
"""Seconds between looks of a caller that waits. A message of the usual size takes 500 µs at 1 Gbit/s, and several are on their way at once."""


class _Lane:
    """A task, and what it waits for."""

    __slots__ = ("_requests", "_task", "next")

    def __init__(self, task: Task | Opening) -> None:
        self._requests: Sequence[MPI.Request] = ()
        self._task = task
        self.next: Sequence[Task] | None = None
        """What follows, when the task has come to its end."""

    def advance(self) -> bool:
        """Go on as far as possible without waiting. Whether anything was done."""
        moved = False
        while self.next is None and (not self._requests or MPI.Request.Testall(self._requests)):
            moved = True
            try:
                self._requests = next(self._task)
            except StopIteration as end:
                self.next = end.value or ()
        return moved


class Operation(Generic[T]):
    """A started collective: tasks that go on side by side, and `finish`, which makes the result when they have come to their ends.

    `keep`: buffers that are needed until then, beside those that tasks and `finish` refer to.
    """

    def __init__(
        self, operations: Operations, number: int, what: str, tasks: Iterable[Task | Opening], finish: Callable[[], T], keep: Sequence[torch.Tensor]
    ) -> None:
        self.number = number  # equal on all ranks
        self.what = what
        self._operations = operations
        self._lanes = [_Lane(task) for task in tasks]
        self._failed: list[_Lane] = []  # MPI may still write to what these hold
        self._finish: Callable[[], T] | None = finish
        self._keep = keep
        self._result: T | None = None
        self._error: TransportError | None = None

    def done(self) -> bool:
        if self._lanes:
            self._operations.progress()
        return not self._lanes

    def wait(self) -> T:
        if self._lanes:
            self._operations.wait_for(self)
        if self._finish is not None and self._error is None:
            try:
                self._result = self._finish()
            except TransportError as error:
                self._error = error
        if not self._failed:
            self._finish, self._keep = None, ()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by `finish`, whose type is T

    @property
    def travels(self) -> bool:
        """Whether there is anything left to be done before `finish`."""
        return bool(self._lanes)

    @property
    def failed_in_mpi(self) -> bool:
        return bool(self._failed)

    def advance(self) -> bool:
        """Go on as far as possible without waiting. Whether anything was done."""
        moved, lanes = False, self._lanes
        try:
            while any([lane.advance() for lane in lanes]):
                moved = True
                ended = [lane.next for lane in lanes if lane.next is not None]
                lanes = [lane for lane in lanes if lane.next is None] + [_Lane(task) for tasks in ended for task in tasks]
        except TransportError as error:  # what all ranks find out alike
            self._error, lanes = error, []
        except MPI.Exception as error:
            self._fail(error)
            self._failed, lanes = lanes, []
        except BaseException:  # Ctrl-C
            self._error = TransportError(f"{self.what} was interrupted, and can never be complete.")
            self._failed, self._lanes = lanes, []
            raise
        self._lanes = lanes
        return moved or self._error is not None

    def _fail(self, error: MPI.Exception) -> None:
        self._error = TransportError(
            f"{self.what} failed in MPI: {error.Get_error_string()}. Every rank must start the same collectives in the same order, with equal "
            "dtypes and matching sizes; a truncated message, or an error in a status, means that another rank sent more than was expected here."
        )


class Operations:
    """The operations of one transport, which all ranks start in the same order. `progress`, from whichever call or thread, carries all of them on.

    Why nobody waits for ever. An operation sends all that others need of it, whatever else this rank waits for, as often as anything here is
    polled or waited for; and its messages are told from those of others by tags that follow from its number, not from who comes first.
    """

    def __init__(self, last_tag: int) -> None:
        self._distinct = (last_tag + 1) // SLOTS  # collectives in flight at once that have tags of their own
        self._lock = threading.RLock()
        self._started = 0
        self._in_flight: list[Operation[Any]] = []  # in start order; keeps the buffers of handles that were dropped. Replaced, never changed
        self._failed: list[Operation[Any]] = []

    def start(
        self,
        what: str,
        tasks: Callable[[int], Iterable[Task | Opening]],
        finish: Callable[[], T],
        keep: Sequence[torch.Tensor] = (),
    ) -> Operation[T]:
        """Start a collective. `tasks` makes its tasks, given the first of its `SLOTS` tags; `finish` and `keep` as for `Operation`."""
        with self._lock:
            operation = Operation(self, self._started, what, tasks(self._started % self._distinct * SLOTS), finish, keep)
            self._started += 1
            if operation.travels:  # where nobody has anything to send there is nothing to do
                self._in_flight = [*self._in_flight, operation]
            self.progress()
        return operation

    def submitted(self) -> int:
        """How many collectives, in the order that is equal on all ranks, need no further call of this rank."""
        return next((o.number for o in self._in_flight), self._started)

    def started(self) -> int:
        """How many collectives there have been, in the order that is equal on all ranks."""
        return self._started

    def started_beyond(self, number: int) -> str | None:
        """If this rank has started its collective of this number, what it is. Another thread may ask."""
        if number >= self._started:
            return None
        return next((o.what for o in self._in_flight if o.number == number), f"collective number {number}")

    def progress(self) -> bool:
        """Carry everything on as far as possible without waiting. Whether anything was done."""
        with self._lock:
            moved = [operation.advance() for operation in self._in_flight]
            if any(moved):
                self._failed += [o for o in self._in_flight if o.failed_in_mpi]
                self._in_flight = [o for o in self._in_flight if o.travels]
        return any(moved)

    def wait_for(self, operation: Operation[Any]) -> None:
        """Return when `operation` is ready to be finished."""
        self._wait_while(lambda: operation.travels)

    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._in_flight

    def complete_all(self) -> None:
        """Block until everything has arrived."""
        self._wait_while(lambda: bool(self._in_flight))

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        """Looking now and then: a wait inside of MPI takes a whole core, and carries nothing else on."""
        looks, pause = 0, _SHORTEST
        while condition():
            if self.progress():
                looks, pause = 0, _SHORTEST
            elif looks < _LOOKS:
                looks += 1
                os.sched_yield()
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST)
