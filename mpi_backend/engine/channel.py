"""Named collectives of one process set: what callers hand over, what the coordinator decides, and what is on its way."""

from __future__ import annotations

import itertools
import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.base import Handle

from ..errors import HorovodInternalError, MismatchError
from ..transport import MPITransport
from .arithmetic import finish_, scale_
from .negotiation import (
    Coordinator,
    Decision,
    Fail,
    Join,
    Joined,
    JoinFailed,
    Leave,
    Left,
    Message,
    Request,
    Run,
    StallCheck,
    Withdraw,
    automatic_name,
)
from .pending import Pending, Progress
from .submission import InFlight, Submission
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
        self._control = comm.Dup()
        self.transport = MPITransport(comm)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.ranks = list(ranks)
        first = self.rank == _COORDINATOR
        self._coordinator = Coordinator(self.ranks, engine.fusion_bytes, engine.stall) if first else None
        self._lock = threading.Lock()  # the four below are touched by callers
        self._queue: deque[Submission | Withdraw | Join | Leave] = deque()
        self._names: set[str] = set()
        self._numbers = itertools.count()
        self._joins = 0
        self._closed = False
        self._held: dict[str, Submission] = {}  # from here on: the engine's
        self._taken: list[Pending[Any]] = []  # out of `_held`, and not on their way yet, or not any more
        self._flights: list[InFlight] = []
        self._sends: list[tuple[MPI.Request, bytes]] = []
        self._joining: Pending[int] | None = None
        self._leaving: Pending[None] | None = None
        self._next_check = 0.0

    # ---- for callers

    def automatic_name(self) -> str:
        """A name for a collective that the user gave none."""
        with self._lock:
            return automatic_name(self._joins, next(self._numbers))

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
    ) -> Pending[T]:
        """Hand over a collective, which runs when all ranks have.

        Either an all-reduce of `tensors` (contiguous; reduced in place; see `Reduce`), or whatever `start` starts when it is called with the extras
        of all ranks; `tensors` are then those that it reads. `finish` makes the result of `wait` from what the handle gave. `kind`: what
        Horovod calls it, for the timeline. Raises ValueError while `request.name` is in use.
        """
        pending: Pending[T] = Pending(self._engine, finish)
        submission = Submission(request, pending, tensors, start, time.perf_counter(), kind)
        for t in tensors:
            if t.is_cuda:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(t.device))
                submission.events.append(event)
        with self._lock:
            self._refuse_if_closed()
            if request.name in self._names:
                raise ValueError(
                    f"{request.text}: a tensor of this name is being processed already. Wait for it by synchronize(), or use another name."
                )
            self._names.add(request.name)
            self._queue.append(submission)
        self._engine.nudge()
        return pending

    def withdraw(self, name: str) -> None:
        """Take a request back, if nothing has been decided on it: it fails then, and the name is free."""
        with self._lock:
            self._queue.append(Withdraw(name))
        self._engine.nudge()

    def join(self) -> Pending[int]:
        """See `Join`; the result is the global rank that joined last."""
        pending: Pending[int] = Pending(self._engine, int)
        with self._lock:
            self._refuse_if_closed()
            if self._joining is not None:
                raise ValueError("join: this rank has joined already, and waits for the others.")
            self._joining = pending
            self._queue.append(Join())
        self._engine.nudge()
        return pending

    def leave(self) -> Pending[None]:
        """Say that nothing more will be submitted here; done when everybody has said so and nothing is on its way."""
        pending: Pending[None] = Pending(self._engine, lambda nothing: None)
        with self._lock:
            self._refuse_if_closed()
            self._leaving = pending
            self._queue.append(Leave())
        self._engine.nudge()
        return pending

    def _refuse_if_closed(self) -> None:
        self._engine.raise_failure()
        if self._closed or self._leaving is not None:
            raise HorovodInternalError("mpi_backend has been shut down, or this process set was removed.")

    def close(self) -> None:
        """Free the communicators."""
        self.transport.close()
        self._control.Free()

    # ---- for the engine

    @property
    def waiting(self) -> bool:
        """Whether others have to say something before this channel is done with its work."""
        return bool(self._held or self._queue or self._sends or self._joining or self._leaving)

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
            while (message := self._received()) is not None:
                self._carry_out(message[1])
                moved = True
        if self._sends:
            self._sends = [(request, data) for request, data in self._sends if not request.Test()]
        return self._complete() or moved

    def fail_all(self, error: Exception) -> None:
        """Nothing here will ever run."""
        with self._lock:
            self._closed = True
            waiting = [s.pending for s in self._queue if isinstance(s, Submission)]
            self._queue.clear()
        waiting += [s.pending for s in self._held.values()] + self._taken
        waiting += [p for flight in self._flights for p in flight.pendings]
        for pending in (*waiting, self._joining, self._leaving):
            if pending is not None:
                pending.fail(error)
        self._held.clear()
        self._flights.clear()
        self._joining = None

    def _send_new(self) -> bool:
        if not self._queue:
            return False
        with self._lock:
            new, self._queue = list(self._queue), deque()
        messages: list[Message] = []
        for item in new:
            if isinstance(item, Submission):
                self._held[item.request.name] = item
                messages.append(item.request)
            else:
                messages.append(item)
        if self._coordinator is not None:
            self._coordinator.receive(_COORDINATOR, messages, time.monotonic())
        else:
            self._send(messages, _COORDINATOR)
        return True

    def _send(self, content: object, *ranks: int) -> None:
        data = pickle.dumps(content)
        self._sends += [(self._control.Isend([data, MPI.BYTE], rank), data) for rank in ranks]

    def _received(self) -> tuple[int, Any] | None:
        status = MPI.Status()
        message = self._control.Improbe(status=status)
        if message is None:
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([data, MPI.BYTE])
        return status.Get_source(), pickle.loads(data)

    def _coordinate(self, coordinator: Coordinator) -> bool:
        now = time.monotonic()
        while (message := self._received()) is not None:
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
            self._send(decisions, *(r for r in range(self.size) if r != self.rank))
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
                    self._take(decision.name, failed=True).pending.fail(kind(decision.message))
                    self._taken.clear()
            elif isinstance(decision, Joined):
                assert self._joining is not None
                joining, self._joining = self._joining, None
                with self._lock:  # some have had more batches: automatic names go on together
                    self._joins, self._numbers = self._joins + 1, itertools.count()
                joining.settle(decision.last)
            elif isinstance(decision, JoinFailed):
                if self.rank in decision.ranks and self._joining is not None:
                    joining, self._joining = self._joining, None
                    joining.fail(HorovodInternalError(decision.message))
            else:
                assert isinstance(decision, Left)
                self._closed = True

    def _take(self, name: str, failed: bool = False) -> Submission:
        """The submission of this name, which is free again."""
        submission = self._held.pop(name)
        self._taken.append(submission.pending)
        with self._lock:
            self._names.discard(name)
        if (timeline := self._engine.timeline) is not None:
            what = "_".join(filter(None, ["NEGOTIATE", submission.operation]))
            timeline.span(submission.row, what, submission.since, time.perf_counter(), **({"failed": True} if failed else {}))
        return submission

    def _run(self, run: Run) -> None:
        if run.reduces:
            self._reduce(run)
            return
        (name,), (extras,) = run.names, run.extras
        submission = self._take(name)
        assert submission.start is not None
        submission.enter()
        try:
            handle = submission.start(extras)
        except TransportError as error:  # about what all ranks know: all raise it
            submission.pending.fail(HorovodInternalError(str(error)))
            return
        self._launch([handle], [submission], lambda values: submission.pending.settle(values[0]), submission.request.text)

    def _reduce(self, run: Run) -> None:
        submissions = [self._take(name) if name in self._held else None for name in run.names]
        first = run.reduces[0]
        tensors: list[torch.Tensor] = []
        for submission, reduce in zip(submissions, run.reduces, strict=True):
            if submission is None:  # this rank has joined
                tensors += [torch.zeros(n, dtype=dtype, device="cpu") for dtype, n in reduce.tensors]
                continue
            submission.enter()
            tensors += [t.view(-1) for t in submission.tensors]
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        wholes = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in by_dtype.values()]
        label = run.names[0] + (f" and {len(run.names) - 1} more" if len(run.names) > 1 else "")
        handles: list[Handle[Any]] = []
        for whole in wholes:
            scale_(whole, first.prescale)
            handles.append(self.transport.allreduce_(whole, label, first.op))  # type: ignore[arg-type]

        def finish(values: list[Any]) -> None:
            for whole, parts in zip(wholes, by_dtype.values(), strict=True):
                finish_(whole, self.size if first.average else 1, first.postscale)
                if len(parts) > 1:
                    for part, t in zip(torch.split(whole, [t.numel() for t in parts]), parts, strict=True):
                        t.copy_(part)
                if whole.is_cuda:
                    torch.cuda.current_stream(whole.device).synchronize()
            for submission in submissions:
                if submission is not None:
                    submission.pending.settle(None)

        ours = [submission for submission in submissions if submission is not None]
        together = f", of {len(run.names)} together" if len(run.names) > 1 else ""
        self._launch(handles, ours, finish, f"allreduce of {sum(w.numel() * w.element_size() for w in wholes)} bytes{together}")

    def _launch(self, handles: list[Handle[Any]], submissions: list[Submission], finish: Callable[[list[Any]], None], what: str) -> None:
        self._flights.append(InFlight(handles, submissions, finish, what, time.perf_counter()))

    def _complete(self) -> bool:
        landed = False
        for flight in self._flights[:8]:
            if not all(handle.done() for handle in flight.handles):
                continue
            self._flights.remove(flight)
            self._taken += flight.pendings
            landed = True
            if (timeline := self._engine.timeline) is not None:  # before the caller hears of it, who may stop the timeline
                for submission in flight.submissions:
                    if submission.operation:
                        timeline.span(submission.row, submission.operation, flight.since, time.perf_counter(), what=flight.what)
            try:
                flight.finish([handle.wait() for handle in flight.handles])
            except TransportError as error:
                for pending in flight.pendings:
                    pending.fail(HorovodInternalError(str(error)))
            self._taken.clear()
        if self._closed and self._leaving is not None and not self._flights and not self._sends:
            leaving, self._leaving = self._leaving, None
            leaving.settle(None)
        return landed
