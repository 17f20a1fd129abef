"""The collectives of a channel that are on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvd_ecsgd.errors import PeerLostError, TransportError
from hvd_ecsgd.transport.base import Handle

from ..errors import HorovodInternalError, RankLostError
from ..transport import MPITransport
from .arithmetic import finish_, scale_
from .negotiation import Run
from .pending import Pending
from .submission import InFlight, Submission
from .timeline import Timeline

__all__ = ["Flights"]


class Flights:
    """On `transport`; those that run together, as all ranks have decided, are one flight."""

    def __init__(self, transport: MPITransport) -> None:
        self._transport = transport
        self._flights: list[InFlight] = []
        self._landing: list[Pending[Any]] = []

    def __bool__(self) -> bool:
        return bool(self._flights)

    @property
    def pendings(self) -> list[Pending[Any]]:
        """Of all that is on its way, or was until now."""
        return [*self._landing, *(p for flight in self._flights for p in flight.pendings)]

    def clear(self) -> None:
        self._flights.clear()

    def start(self, submission: Submission, extras: Sequence[Any]) -> None:
        """Of a collective that is no reduction; `extras`: those of all ranks."""
        assert submission.start is not None
        submission.enter()
        try:
            handle = submission.start(extras)
        except TransportError as error:  # about what all ranks know: all raise it
            submission.pending.fail(HorovodInternalError(str(error)))
            return

        def finish(values: list[Any]) -> None:
            submission.leave()
            submission.pending.settle(values[0])

        self._launch([handle], [submission], finish, submission.request.text)

    def reduce(self, run: Run, submissions: Sequence[Submission | None]) -> None:
        """Start the reductions of `run` together, one all-reduce for each type; no submission: this rank has joined, and sends zeros."""
        first = run.reduces[0]
        tensors: list[torch.Tensor] = []
        for submission, reduce in zip(submissions, run.reduces, strict=True):
            if submission is None:
                tensors += [torch.zeros(n, dtype=dtype, device="cpu") for dtype, n in reduce.tensors]
                continue
            submission.enter()
            tensors += [t.view(-1) for t in submission.tensors]
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        wholes = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in by_dtype.values()]
        label = run.names[0] + (f" and {len(run.names) - 1} more" if len(run.names) > 1 else "")
        ours = [submission for submission in submissions if submission is not None]
        handles: list[Handle[Any]] = []
        try:
            for whole in wholes:
                scale_(whole, first.prescale)
                handles.append(self._transport.allreduce_(whole, label, first.op))  # type: ignore[arg-type]
        except TransportError as error:  # a forced algorithm that cannot: types are alike on all ranks, so all raise it
            for submission in ours:
                submission.pending.fail(HorovodInternalError(str(error)))
            return

        def finish(values: list[Any]) -> None:
            for whole, parts in zip(wholes, by_dtype.values(), strict=True):
                finish_(whole, self._transport.size if first.average else 1, first.postscale)
                if len(parts) > 1:
                    for part, t in zip(torch.split(whole, [t.numel() for t in parts]), parts, strict=True):
                        t.copy_(part)
            for submission in ours:
                submission.leave()
                submission.pending.settle(None)

        together = f", of {len(run.names)} together" if len(run.names) > 1 else ""
        self._launch(handles, ours, finish, f"allreduce of {sum(w.numel() * w.element_size() for w in wholes)} bytes{together}")

    def _launch(self, handles: list[Handle[Any]], submissions: list[Submission], finish: Callable[[list[Any]], None], what: str) -> None:
        self._flights.append(InFlight(handles, submissions, finish, what, time.perf_counter()))

    def land(self, timeline: Timeline | None) -> bool:
        """Hand out what has arrived; whether something has."""
        landed = False
        for flight in self._flights[:8]:
            if not all(handle.done() for handle in flight.handles):
                continue
            self._flights.remove(flight)
            self._landing += flight.pendings
            landed = True
            if timeline is not None:  # before the caller hears of it, who may stop the timeline
                for submission in flight.submissions:
                    if submission.operation:
                        timeline.span(submission.row, submission.operation, flight.since, time.perf_counter(), what=flight.what)
            try:
                flight.finish([handle.wait() for handle in flight.handles])
            except TransportError as error:
                kind = RankLostError if isinstance(error, PeerLostError) else HorovodInternalError
                for pending in flight.pendings:
                    pending.fail(kind(str(error)))
            self._landing.clear()
        return landed
