"""What is on its way: operations of one or two stages, and the order in which they are carried on."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError

__all__ = ["Operation", "Operations"]

T = TypeVar("T")


class Operation(Generic[T]):
    """A started collective: the requests of its first stage, and perhaps a second stage still to be launched.

    `finish` makes the result once all requests are complete. `keep`: the buffers that MPI reads or writes until then, beside those
    that `finish`, and in the first stage `second`, refer to.
    """

    def __init__(
        self,
        operations: Operations,
        number: int,
        what: str,
        requests: list[MPI.Request],
        finish: Callable[[], T],
        second: Callable[[], list[MPI.Request]] | None,
        keep: Sequence[torch.Tensor],
    ) -> None:
        self.number = number  # equal on all ranks
        self.what = what
        self._operations = operations
        self._requests = requests
        self._finish: Callable[[], T] | None = finish
        self._second = second
        self._keep = keep
        self._result: T | None = None
        self._error: TransportError | None = None

    def done(self) -> bool:
        if self._finish is not None:
            self._operations.progress()
        return self.quiet()

    def wait(self) -> T:
        if self._finish is not None and self._error is None:
            self._operations.blocked = self
            try:
                self._operations.progress(through=self.number)
                self.complete(block=True)
            finally:
                self._operations.blocked = None
        if self._finish is not None and self._error is None:
            try:
                self._result = self._finish()
            except TransportError as error:
                self._error = error
            self._finish, self._keep = None, ()
            self._operations.sweep()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by `finish`, whose type is T

    def quiet(self) -> bool:
        """Whether MPI has nothing more to do here. Does not start anything."""
        return self._error is not None or (self._second is None and self.complete(block=False))

    def launch(self, block: bool) -> bool:
        """Start the second stage if the first is complete, or (`block`) as soon as it is. False if it has to come later."""
        if not self.complete(block):
            return False
        second, self._second = self._second, None
        if second is not None and self._error is None:
            try:
                self._requests = second()
            except TransportError as error:
                self._error = error
            except MPI.Exception as error:
                self._fail(error)
        return True

    def complete(self, block: bool) -> bool:
        """Whether the requests of the stage in progress are complete (or have failed)."""
        if not self._requests:
            return True
        try:
            complete = MPI.Request.Waitall(self._requests) if block else MPI.Request.Testall(self._requests)
        except MPI.Exception as error:
            self._fail(error)
            complete = True
        if complete:
            self._requests = []
        return complete

    def _fail(self, error: MPI.Exception) -> None:
        self._error = TransportError(
            f"{self.what} failed in MPI: {error.Get_error_string()}. Every rank must start the same collectives in the same order, with equal "
            "dtypes and matching sizes; a truncated message, or an error in a status, means that another rank sent more than was expected here."
        )


class Operations:
    """The operations of one transport in the order in which they were started, which is the order in which their second stages are launched.

    Why operations of two stages are safe. Collectives of one communicator must be started in the same order on every rank, and a second stage
    starts when its first is seen to be complete, which is a matter of timing. So second stages have a communicator of their own, and are launched
    in the order in which their operations were started, whatever completes first. Nobody waits for ever: before a rank blocks in an operation it
    launches all second stages up to and including it, so of all operations that somebody is blocked in, the earliest has been launched everywhere.
    """

    def __init__(self) -> None:
        self.blocked: Operation[Any] | None = None
        """What a caller waits for at this moment; others may look."""
        self._started = 0
        self._in_flight: deque[Operation[Any]] = deque()  # in start order; keeps the buffers of handles that were dropped
        self._unlaunched: deque[Operation[Any]] = deque()  # those with a second stage to come, in start order

    def start(
        self,
        what: str,
        requests: list[MPI.Request],
        finish: Callable[[], T],
        second: Callable[[], list[MPI.Request]] | None = None,
        keep: Sequence[torch.Tensor] = (),
    ) -> Operation[T]:
        """Note what was started: `requests` are its first stage; `finish`, `second` and `keep` as for `Operation`."""
        operation = Operation(self, self._started, what, requests, finish, second, keep)
        self._started += 1
        self._in_flight.append(operation)
        if second is not None:
            self._unlaunched.append(operation)
        self.progress()
        self.sweep()
        return operation

    def submitted(self) -> int:
        """How many collectives, in the order that is equal on all ranks, need no further call of this rank."""
        return next((o.number for o in list(self._unlaunched)), self._started)

    def started_beyond(self, number: int) -> str | None:
        """If this rank has started its collective of this number, what it is. Another thread may ask."""
        if number >= self._started:
            return None
        with contextlib.suppress(RuntimeError):  # the queue changed meanwhile
            for operation in self._in_flight:
                if operation.number == number:
                    return operation.what
        return f"collective number {number}"

    def progress(self, through: int = -1) -> None:
        """Launch second stages in start order: those whose turn has come, and, blocking, those of operations numbered up to `through`."""
        while self._unlaunched and self._unlaunched[0].launch(block=self._unlaunched[0].number <= through):
            self._unlaunched.popleft()

    def sweep(self) -> None:
        """Let go of the operations that MPI is done with, in start order up to the first that it is not."""
        while self._in_flight and self._in_flight[0].quiet():
            self._in_flight.popleft()

    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._in_flight and not self._unlaunched

    def complete_all(self) -> None:
        """Block until MPI is done with everything."""
        self.progress(through=self._started)
        while self._in_flight:
            self._in_flight.popleft().complete(block=True)
