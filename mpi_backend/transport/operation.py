"""What is on its way: collectives made of messages between two ranks, and who carries them on."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import PeerLostError, TransportError
from hvd_ecsgd.transport.patience import Patience, note_arrival

from .lanes import Lanes, Stages
from .lost import Look, may_be_lost
from .messages import DamagedError

__all__ = ["SLOTS", "Operation", "Operations"]

T = TypeVar("T")

SLOTS = 64
"""Tags of each collective, from the one it is given: two for each of 16 lanes, in each of two stages. Its tasks use them so that messages of one tag
between two ranks are sent and received in one order; messages of different collectives never meet."""


class Operation(Generic[T]):
    """A started collective: its stages, and `finish`, which makes the result when the last one has come to its end.

    `keep`: buffers that are needed until then, beside those that tasks and `finish` refer to.
    """

    def __init__(self, operations: Operations, number: int, what: str, stages: Stages, finish: Callable[[], T], keep: Sequence[torch.Tensor]) -> None:
        self.number = number  # equal on all ranks
        self.what = what
        self._operations = operations
        self.lanes = Lanes(stages, operations.look)
        self.failed_in_mpi = False  # it may still write to what the lanes hold
        self._finish: Callable[[], T] | None = finish
        self._keep = keep
        self._result: T | None = None
        self._error: TransportError | None = None

    def done(self) -> bool:
        if self.travels:
            self._operations.progress()
        return not self.travels

    def wait(self) -> T:
        if self.travels:
            self._operations.wait_for(self)
        if self._finish is not None and self._error is None:
            try:
                self._result = self._finish()
            except TransportError as error:
                self._error = error
        if not self.failed_in_mpi:
            self._finish, self._keep = None, ()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by `finish`, whose type is T

    @property
    def travels(self) -> bool:
        """Whether there is anything left to be done before `finish`."""
        return self._error is None and not self.lanes.ended

    def advance(self, room: int) -> bool:
        """Go on as far as possible without waiting, in at most so many lanes at once. Whether anything was done."""
        if self._error is not None:
            return True
        moved = False
        try:
            moved = self.lanes.advance(room)
        except DamagedError as error:  # what this rank finds out alone, while more is on its way
            self.failed_in_mpi = True
            self._error = TransportError(f"{self.what}: {error}")
        except TransportError as error:  # what all ranks find out alike
            self._error = error
        except MPI.Exception as error:
            self.failed_in_mpi = True
            self._fail(error)
        except BaseException:  # Ctrl-C
            self.failed_in_mpi = True
            self._error = TransportError(f"{self.what} was interrupted, and can never be complete.")
            raise
        return moved or self._error is not None

    def _fail(self, error: MPI.Exception) -> None:
        kind = PeerLostError if may_be_lost(error) else TransportError
        self._error = kind(
            f"{self.what} failed in MPI: {error.Get_error_string()}. Every rank must start the same collectives in the same order, with equal "
            "dtypes and matching sizes; a truncated message, or an error in a status, means that another rank sent more than was expected here."
        )


class Operations:
    """The operations of one transport, which all ranks start in the same order.

    Why nobody waits for ever. Whenever a rank polls or waits for something, on whichever transport, `progress` carries on what it has started on all
    of them, so others get what they need of it; and messages are told from those of other operations by tags that follow from their
    numbers, not from who comes first. `lanes` go on at once, those of what was started first before others, so that it ends first: as it was
    started first on all ranks, nothing that it waits for is held back.
    """

    _all: tuple[weakref.ref[Operations], ...] = ()
    """Of this process. Replaced, never changed, under the lock."""
    _all_lock = threading.Lock()

    def __init__(self, last_tag: int, lanes: int, look: Look) -> None:
        self._room, self.look = lanes, look
        self._distinct = (last_tag + 1) // SLOTS  # collectives in flight at once that have tags of their own
        self._lock = threading.RLock()
        self._started = 0
        self._in_flight: list[Operation[Any]] = []  # in start order; keeps the buffers of handles that were dropped. Replaced, never changed
        self._failed: list[Operation[Any]] = []
        with Operations._all_lock:
            Operations._all = (*(known for known in Operations._all if known() is not None), weakref.ref(self))

    def start(
        self,
        what: str,
        stages: Callable[[int], Stages],
        finish: Callable[[], T],
        keep: Sequence[torch.Tensor] = (),
    ) -> Operation[T]:
        """Start a collective. `stages` makes them, given the first of its `SLOTS` tags; `finish` and `keep` as for `Operation`."""
        with self._lock:
            operation = Operation(self, self._started, what, stages(self._started % self._distinct * SLOTS), finish, keep)
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
        """Carry everything on as far as possible without waiting, on other transports too. Whether anything was done on this one."""
        with self._lock:
            moved = self._advance()
        Operations.carry_on(but=self)
        return moved

    @staticmethod
    def carry_on(but: Operations | None = None) -> None:
        """Carry on what is on its way on all transports `but` one, also where an error has ended whoever waited: others may need its messages."""
        for known in Operations._all:
            one = known()
            if one is not None and one is not but and one._in_flight and one._lock.acquire(blocking=False):  # else another thread does it
                try:
                    one._advance()
                finally:
                    one._lock.release()

    def _advance(self) -> bool:
        moved, room = False, self._room
        for operation in self._in_flight:
            moved = operation.advance(room) or moved
            room -= operation.lanes.active
        if moved:
            note_arrival()
            self._failed += [o for o in self._in_flight if o.failed_in_mpi]
            self._in_flight = [o for o in self._in_flight if o.travels]
        return moved

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
        patience = Patience()  # not anew when something has come: where much is on its way, looking often takes a core and gains nothing
        while condition():
            if not self.progress():
                time.sleep(patience.pause())
