"""Named collectives of one process set: callers hand them over, the coordinator decides, and they travel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.transport.base import Handle
from hvd_ecsgd.transport.devices import marks_of

from ..errors import HorovodInternalError, MismatchError, RankLostError
from ..transport import MPITransport
from .flights import Flights
from .intake import Intake
from .mail import Mail
from .negotiation import Coordinator, Decision, Fail, Joined, JoinFailed, Left, Message, Request, Run, StallCheck
from .pending import Finished, Pending, Progress
from .submission import Submission
from .timeline import Timeline

__all__ = ["Channel", "Server"]

T = TypeVar("T")
log = logging.getLogger("mpi_backend")

_COORDINATOR = 0


class Server(Progress, Protocol):
    """Whom a channel belongs to: the engine."""

    fusion_bytes: int
    stall: StallCheck
    timeline: Timeline | None
    finished: Finished | None

    def nudge(self) -> None:
        """There is new work."""

    def raise_failure(self) -> None:
        """Raise what ended the engine, if something has."""


class Channel:
    """Named collectives among the processes of `comm`. Creating one is collective, and so is `close`.

    `ranks`: the global ranks of its members, for messages. All of its communication is done by the engine.
    """

    def __init__(self, engine: Server, comm: MPI.Comm, ranks: Sequence[int]) -> None:
        self._engine = engine
        self._mail = Mail(comm.Dup())
        self.transport = MPITransport(comm)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.ranks = list(ranks)
        first = self.rank == _COORDINATOR
        self._coordinator = Coordinator(self.ranks, engine.fusion_bytes, engine.stall) if first else None
        self._next_check = 0.0
        self._intake = Intake(engine.raise_failure)  # touched by callers; the others are the engine's
        self._held: dict[str, Submission] = {}
        self._taken: list[Pending[Any]] = []
        """Out of `_held`, and not on their way yet."""
        self._flights = Flights(self.transport)

    # ---- for callers

    def automatic_name(self) -> str:
        """A name for a collective that the user gave none."""
        return self._intake.automatic_name()

    def named(self, name: object, what: str) -> str:
        """`name`, or where the user gave none an automatic one. Raises ValueError, about `what`, for one that is no string."""
        if name is None or (isinstance(name, str) and not name):
            return self.automatic_name()
        if not isinstance(name, str):
            raise ValueError(f"{what}: the name must be a string, got {name!r:.100}.")
        return name

    def submit(
        self,
        request: Request,
        finish: Callable[[Any], T],
        *,
        tensors: Sequence[torch.Tensor] = (),
        start: Callable[[Sequence[Any]], Handle[Any]] | None = None,
        kind: str = "",
        aside: bool = False,
    ) -> Pending[T]:
        """Hand over a collective, which runs when all ranks have.

        Either an all-reduce of `tensors` (contiguous; reduced in place; see `Reduce`), or whatever `start` starts when it is called with the extras
        of all ranks; `tensors` are then those that it reads. `finish` makes the result of `wait` from what the handle gave. `kind`: what
        Horovod calls it, for the timeline. `aside`: its result is not waited for on all ranks. Raises ValueError while `request.name` is in use.
        """
        pending: Pending[T] = Pending(self._engine, finish, None if aside else self._engine.finished)
        submission = Submission(request, pending, tensors, start, time.perf_counter(), kind)
        submission.given = marks_of(tensors)
        try:
            self._intake.add(submission)
        except RankLostError as error:
            if self._engine.finished is None or aside:
                raise
            pending.fail(error)  # which `wait` raises, as on ranks that have heard of it later
        self._engine.nudge()
        return pending

    def withdraw(self, name: str) -> None:
        """Take a request back, if nothing has been decided on it: it fails then, and the name is free."""
        self._intake.withdraw(name)
        self._engine.nudge()

    def join(self) -> Pending[int]:
        """See `Join`; the result is the global rank that joined last."""
        pending: Pending[int] = Pending(self._engine, int)
        self._intake.join(pending)
        self._engine.nudge()
        return pending

    def leave(self) -> Pending[None]:
        """Say that nothing more will be submitted here; done when everybody has said so and nothing is on its way."""
        pending: Pending[None] = Pending(self._engine, lambda nothing: None)
        self._intake.leave(pending)
        self._engine.nudge()
        return pending

    def revoke(self) -> None:
        """A rank is gone: whatever waits here fails, on all ranks."""
        self._mail.revoke()
        self.transport.link.revoke()

    def close(self) -> None:
        """Free the communicators."""
        self.transport.close()
        self._mail.close()

    # ---- for the engine

    @property
    def waiting(self) -> bool:
        """Whether others have to say something before this channel is done with its work."""
        return bool(self._held or self._intake or self._mail.sending or self._intake.joining or self._intake.leaving)

    @property
    def closed(self) -> bool:
        """Nothing more will run here."""
        return self._intake.closed

    @property
    def in_flight(self) -> bool:
        return bool(self._flights)

    @property
    def coordinates(self) -> bool:
        """Whether others may send something here while there is no work on this rank."""
        return self._coordinator is not None and self.size > 1

    def turn(self) -> bool:
        """Do what can be done without waiting. True when something was."""
        moved = self._send_new()
        if self._coordinator is not None:
            moved = self._coordinate(self._coordinator) or moved
        else:
            while (message := self._mail.received()) is not None:
                self._carry_out(message[1])
                moved = True
        self._mail.sweep()
        landed = self._flights.land(self._engine.timeline)
        if self._intake.closed and not self._flights and not self._mail.sending:
            self._intake.left()
        return landed or moved

    def fail_all(self, error: Exception) -> None:
        """Nothing here will ever run."""
        waiting = self._intake.close()
        waiting += [s.pending for s in self._held.values()] + self._taken + self._flights.pendings
        for pending in waiting:
            pending.fail(error)
        self._held.clear()
        self._flights.clear()

    def _send_new(self) -> bool:
        if not self._intake:
            return False
        messages: list[Message] = []
        for item in self._intake.take():
            if isinstance(item, Submission):
                self._held[item.request.name] = item
                messages.append(item.request)
            else:
                messages.append(item)
        if self._coordinator is not None:
            self._coordinator.receive(_COORDINATOR, messages, time.monotonic())
        else:
            self._mail.send(messages, _COORDINATOR)
        return True

    def _coordinate(self, coordinator: Coordinator) -> bool:
        now = time.monotonic()
        while (message := self._mail.received()) is not None:
            coordinator.receive(*message, now)
        if now >= self._next_check:
            self._next_check = now + 0.1
            if warnings := coordinator.check_stalls(now):
                log.warning(
                    "mpi_backend: some tensors were submitted by some ranks only, which wait for the others; do all ranks submit the same?\n%s",
                    "\n".join(warnings),
                )
        decisions = coordinator.take()
        if not decisions:
            return False
        if self.size > 1:
            self._mail.send(decisions, *(r for r in range(self.size) if r != self.rank))
        self._carry_out(decisions)
        return True

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Run):
                self._run(decision)
                self._taken.clear()
            elif isinstance(decision, Fail):
                if self.rank in decision.ranks:
                    kind = MismatchError if decision.mismatch else HorovodInternalError
                    self._take(decision.name, failed=True).pending.refuse(kind(decision.message))
                    self._taken.clear()
            elif isinstance(decision, Joined):
                self._intake.all_joined(decision.last)
            elif isinstance(decision, JoinFailed):
                if self.rank in decision.ranks:
                    self._intake.join_failed(decision.message)
            else:
                assert isinstance(decision, Left)
                self._intake.closed = True

    def _take(self, name: str, failed: bool = False) -> Submission:
        """The submission of this name, which is free again."""
        submission = self._held.pop(name)
        self._taken.append(submission.pending)
        self._intake.free(name)
        if (timeline := self._engine.timeline) is not None:
            what = "_".join(filter(None, ["NEGOTIATE", submission.operation]))
            timeline.span(submission.row, what, submission.since, time.perf_counter(), **({"failed": True} if failed else {}))
        return submission

    def _run(self, run: Run) -> None:
        if run.reduces:
            self._flights.reduce(run, [self._take(name) if name in self._held else None for name in run.names])
        else:
            self._flights.start(self._take(run.names[0]), run.extras[0])
