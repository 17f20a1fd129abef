"""One step after the other of an exchange, from its first gradient to what comes of it: begun together, started bucket by bucket, finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial

import torch

from ..core.aggregator import Aggregator
from ..core.bucket import Bucket
from ..core.fewer import prepare_fewer
from ..core.step import BucketStep, drive
from ..errors import CompressionError, PeerLostError
from ..protocols import Lent
from ..transport import Transport
from ..transport.base import Workers, workers_of
from ..transport.devices import Marks, marks_of, wait_for
from .executor import Executor, Observer, wait_patiently
from .meeting import Meeting
from .recovery import Recovery

__all__ = ["Outcome", "Phase", "StepExchange"]


class Phase(Enum):
    """Where a step is."""

    IDLE = auto()
    """No gradient has come."""
    ACCUMULATING = auto()
    """Gradients come; buckets that are complete may be on their way."""
    EXCHANGING = auto()
    """All buckets are on their way, and this rank waits for them."""
    EXCHANGED = auto()
    """The results are there, and have not been applied."""


class Outcome(Enum):
    """What came of the exchange; the same on all ranks."""

    STANDS = auto()
    UNDONE = auto()
    """Some rank held an inf or NaN; every rank has put its state back."""
    SILENT = auto()
    """Nobody sent anything, so the model must stay where it is: also the optimizer's momentum and weight decay must not move it."""


class StepExchange:
    """Gradients in, results out, step by step. `note`: as for the `Meeting` with the other ranks. `recovery`: of a job that outlives its ranks; what
    a step has begun when one dies is then undone bit for bit, and the step taken again with the same gradients.

    Buckets are started in their order, because every rank must start the same collectives in the same order. The executor may be a thread: then a
    bucket is compressed and started, and the one before it finished, while the caller goes on.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        transport: Transport,
        executor: Executor,
        observer: Observer | None,
        note: Callable[[], bytes],
        recovery: Recovery | None = None,
    ) -> None:
        self.aggregator, self.transport, self.executor, self.observer = aggregator, transport, executor, observer
        self._workers = workers_of(transport)
        self.meeting = Meeting(aggregator.agreement, transport, executor, note)
        self.phase, self.outcome = Phase.IDLE, Outcome.STANDS
        self.results: list[BucketStep | None] = []
        """By bucket, of a step that is EXCHANGED; None where the learning rate was 0."""
        self._submitted = 0
        self._started: list[BucketStep | None] = []  # the executor's, until it is drained
        self._sent_at: dict[int, float] = {}
        self._end: Marks = []  # of the executor's streams
        self._recovery = recovery
        self._given: list[tuple[Bucket, list[torch.Tensor]]] = []  # of the step under way, where it may have to be taken again
        self._lost: PeerLostError | None = None  # what the step under way has ended with
        if recovery is not None:
            for bucket in aggregator.state.buckets:
                bucket.can_begin_again = True

    @property
    def reductions(self) -> list[BucketStep]:
        return [r for r in self.results if r is not None]

    @property
    def begun(self) -> bool:
        """A bucket of a step that was not exchanged yet is on its way."""
        return self._submitted > 0

    def begin(self) -> None:
        """A gradient has come. What was exchanged before counts as applied."""
        if self.phase is not Phase.ACCUMULATING:
            self.forget()
            self.phase = Phase.ACCUMULATING
            self.aggregator.begin_step()

    def forget(self) -> None:
        """The results, if there are any, have been applied."""
        if self.phase is Phase.EXCHANGED:
            self.aggregator.keep_step()
            self.phase, self.results = Phase.IDLE, []

    def discard(self) -> None:
        """The results will not be applied: undo the step, on all ranks."""
        self.aggregator.discard_step()
        self.phase, self.results = Phase.IDLE, []

    @property
    def next_bucket(self) -> Bucket | None:
        """The bucket that is to be submitted next; None when all have been."""
        buckets = self.aggregator.state.buckets
        return buckets[self._submitted] if self._submitted < len(buckets) else None

    def submit(self, gradients: list[torch.Tensor], lent: Lent | None = None) -> None:
        """Hand over the gradients of `next_bucket`, in the order of its parameters, as `gradients.take_` returned them. `lent`: as `Aggregator.start`
        takes it."""
        bucket = self.next_bucket
        assert bucket is not None
        if self._submitted == 0:
            self.aggregator.agreement.note_frozen()
        self._submitted += 1
        if self._recovery is not None:
            self._given.append((bucket, gradients))
        self._submit(bucket, gradients, lent)

    def _submit(self, bucket: Bucket, gradients: list[torch.Tensor], lent: Lent | None = None) -> None:
        self._do(partial(self._start, bucket, gradients, lent, marks_of(gradients) if self.executor.concurrent else []))

    def drain(self) -> None:
        """Wait until every submitted bucket has started to travel. Raises what went wrong in that; not that a rank is gone, where the job outlives
        it: `complete` takes the step again then."""
        self._do(None)

    def _do(self, work: Callable[[], None] | None) -> None:
        """Let the executor do it; None: wait until all is done. Nothing once a rank is gone that the job outlives."""
        if self._lost is not None:
            return
        try:
            if work is None:
                self.executor.drain()
            else:
                self.executor.submit(work)
        except PeerLostError as error:
            if self._recovery is None:
                raise
            self._lost = error

    def carry_on(self, then: Callable[[], object]) -> None:
        """Finish the exchange of all buckets, which have been submitted, while the caller goes on, and comes to `complete`. `then`: called by the
        executor in the end, also where something goes wrong. Raises what has gone wrong so far; `then` is not called in that case."""
        self.drain()
        self._do(partial(self._finish_all, then))

    def complete(self) -> Outcome:
        """Finish the exchange of all buckets, which have been submitted and drained: the results are in `results`, unless the step was undone.

        Raises `CompressionError`, on every rank, when some rank has hyper-parameters that no step can be taken with; the step is then undone.
        """
        self._submitted, self.phase = 0, Phase.EXCHANGING
        self._exchange()
        while self._recovery is not None and not self._recovery.finished(self._lost):
            self._exchange()
        self._given = []
        self.results, self._started = self._started, []
        reductions = self.reductions
        self._take_over(reductions)
        stands = self.aggregator.finish_step(reductions)
        silent = stands and bool(reductions) and all(r.task.skipped for r in reductions)
        self.phase, self.outcome = Phase.EXCHANGED, Outcome.SILENT if silent else Outcome.STANDS if stands else Outcome.UNDONE
        if refusal := self.aggregator.agreement.refusal.take():
            self.forget()
            raise CompressionError(refusal)
        return self.outcome

    def _exchange(self) -> None:
        """Finish what was submitted."""
        self._do(self._finish_all)
        self._do(None)

    # -- ranks are gone, and the job outlives them; no thread of the executor does anything ----------------------------------------

    def take_back(self) -> None:
        """Undo what has begun of the step under way, bit for bit, if one is. Again, it does nothing."""
        for started in self._started:
            if started is not None:
                started.take_back_()
        self._started = []

    def prepare_fewer(self, transport: Transport) -> Callable[[], None]:
        """After `take_back`: see `core.fewer`."""
        return prepare_fewer(self.aggregator.state, transport)

    def begin_again(self) -> None:
        """The transport is among those that live: give them what this rank has given so far of the step under way."""
        self._lost = None
        self.meeting.start_again()
        for bucket, gradients in self._given:
            self._submit(bucket, gradients)

    def _take_over(self, reductions: Sequence[BucketStep]) -> None:
        """What a thread has made is used by this one from now on, and its memory waits for both."""
        wait_for(self._end)
        self._end = []
        if self.executor.concurrent:
            for out in [r.out for r in reductions if r.out is not None and r.out.is_cuda]:
                out.record_stream(torch.cuda.current_stream(out.device))

    # -- the executor's ----------------------------------------------------------------------------------------------------------

    def _start(self, bucket: Bucket, gradients: list[torch.Tensor], lent: Lent | None, given: Marks) -> None:
        """Compress a bucket and start to send it. In a thread, then go on with what was started before: where another collective follows, by one in
        each, since the order in which collectives start must not be a matter of timing; else with those that have arrived.

        So the second pass of a bucket travels while the next one is compressed, and nobody waits for it before that.
        """
        wait_for(given)
        if not self._started and not self.meeting.begun:
            self.meeting.open()
        if isinstance(self._workers, Workers):
            gradients = self._averaged_inside(self._workers, bucket, gradients)
        begin = time.perf_counter()
        try:
            self._started.append(self.aggregator.start(bucket, gradients, self._workers, lent=lent))
        except PeerLostError:  # after it was accumulated
            if self._recovery is not None:
                bucket.restore()
            raise
        self._sent_at[id(bucket)] = time.perf_counter()
        if self.observer is not None:
            self.observer(bucket.name, "COMPRESS", begin, self._sent_at[id(bucket)])
        if self.executor.concurrent and len(self._started) > 1:
            self.meeting.agree()
            earlier = [r for r in self._started[:-1] if r is not None]
            for one in [r for r in earlier if r.ordered]:
                self._advance(one)
            for one in earlier:
                if one.pending is not None and not one.ordered and one.pending.done():
                    self._advance(one)

    def _averaged_inside(self, workers: Workers, bucket: Bucket, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies, as the script's gradients are not to be written to."""
        whole = bucket.segments.scratch()
        means = bucket.segments.shaped_views(whole)
        for mean, gradient in zip(means, gradients, strict=True):
            mean.copy_(gradient)
        handle = workers.average_inside_(whole, f"{bucket.name}.inside")
        wait_patiently(handle)
        handle.wait()
        return means

    def _advance(self, reduction: BucketStep) -> None:
        reduction.advance(wait_patiently if self.executor.concurrent else None)
        if reduction.finished and self.observer is not None:
            self.observer(reduction.bucket.name, "COMMUNICATE", self._sent_at[id(reduction.bucket)], time.perf_counter())

    def _finish_all(self, then: Callable[[], object] = lambda: None) -> None:
        try:
            self.meeting.agree()
            drive([r for r in self._started if r is not None], self._advance)
            if self.executor.concurrent:
                self._end = marks_of(r.out for r in self._started if r is not None and r.out is not None)
        finally:
            then()
