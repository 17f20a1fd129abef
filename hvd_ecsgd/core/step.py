"""One bucket's step: begun, driven to its end, kept or undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..protocols import GroupSettings, Lent, Role, Steps, Task, settled
from ..transport.base import Handle
from .bucket import Bucket, part_of
from .meter import Gauge

__all__ = ["BucketStep", "FrozenState", "drive", "local_step"]


class FrozenState:
    """The state of a bucket's frozen parameters as it was before the step: it waits until they are unfrozen.

    They take part in the exchange with what is left of them, as all tables are alike on all ranks, and what comes of it is put away.
    """

    def __init__(self, bucket: Bucket, rank: int, size: int) -> None:
        self._bucket = bucket
        self._pieces = bucket.method.exchange.state_segments(bucket.segments, rank, size).table
        self._residuals = {bucket.method.slot_names.get(Role.RESIDUAL), bucket.method.server_slot}
        self._kept = {place: value.clone() for place, value in self._places()}

    def _places(self) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
        """(place in the bucket, slot), and what is there. Not x, which stays where it is, nor counters, which are of the bucket."""
        bucket = self._bucket
        assert bucket.state is not None and bucket.exchange_state is not None
        x = bucket.point
        for i in bucket.frozen():
            yield from (((i, slot), part_of(t, i, bucket.segments.table[i])) for slot, t in bucket.state.items() if t is not x)
            yield from (((i, slot), part_of(t, i, self._pieces[i])) for slot, t in bucket.exchange_state.items() if t.dim() == 1)

    def rescale_(self, carry: float) -> None:
        """From units of the learning rate before to those of the step's."""
        for (_, slot), value in self._kept.items():
            if slot in self._residuals:
                value.mul_(carry)

    def put_back_(self) -> None:
        now = dict(self._places())
        residual = self._bucket.method.slot_names.get(Role.RESIDUAL)
        for (i, slot), value in self._kept.items():
            if (i, slot) in now:
                now[i, slot].copy_(value)
            if slot == residual and bool(value.any()):
                self._bucket.residual_is_zero = False


class BucketStep:
    """One bucket's step in progress."""

    def __init__(
        self,
        bucket: Bucket,
        task: Task,
        steps: Steps,
        gradients: list[torch.Tensor],
        settings: GroupSettings,
        rescale: float = 1.0,
        frozen_state: FrozenState | None = None,
        gauge: Gauge | None = None,
    ) -> None:
        self.bucket = bucket
        self.frozen_state = frozen_state
        self.gauge = gauge
        """Looks at it, if somebody does."""
        self._rescale = rescale
        self.task = task
        self.gradients = gradients
        self.settings = settings
        self.pending: Handle[Any] | None = None
        self.out: torch.Tensor | None = None
        self._steps = steps
        self._resume(None)

    @property
    def finished(self) -> bool:
        return self.out is not None

    @property
    def ordered(self) -> bool:
        """It starts another collective when it goes on: in one order on all ranks, therefore."""
        return not (self.finished or self.task.last)

    def _resume(self, value: Any) -> None:
        was_last = self.pending is not None and self.task.last
        try:
            self.pending = self._steps.send(value)
            assert not was_last, f"{self.bucket.method.exchange} waits again after what it has said to be its last wait"
        except StopIteration as stop:
            self.pending, self.out = None, stop.value
            if self._rescale != 1.0:
                self._multiply_(self._rescale)
            if self.lent is not None and self.lent.at_once:
                self.lent.arrived()
        if self.gauge is not None:
            self.gauge.paused(self.pending)
            if self.pending is None:
                self.gauge.finished(self.bucket, self.task)

    @property
    def lent(self) -> Lent | None:
        """The memory that the result is written to when the step stands, where the exchange could do that; else it is in `out` already."""
        lent = self.task.lent
        return lent if lent is not None and self.out is lent.memory else None

    def _multiply_(self, factor: float) -> None:
        assert self.out is not None
        if self.lent is None:
            self.out.mul_(factor)
        else:
            self.lent.write(partial(torch._foreach_mul_, self.lent.table(self.bucket.segments).views(self.out), factor))

    def advance(self, wait: Callable[[Handle[Any]], object] | None = None) -> None:
        """Wait for the pending handle, by `wait` if it is given, and go on to the next one (or to the end)."""
        if self.pending is None:
            return
        if self.gauge is None:
            if wait is not None:
                wait(self.pending)
            self._resume(self.pending.wait())
            return
        begin = time.perf_counter()
        if wait is not None:
            wait(self.pending)
        value = self.pending.wait()
        self.gauge.resumed(value, since=begin)
        self._resume(value)

    def hand_out(self) -> list[torch.Tensor]:
        """What came back, by parameter; see `Result.hand_out`."""
        assert self.out is not None
        return self.task.into.hand_out(self.out, self.bucket.segments)

    def undo_(self, gradients_gone: bool = False) -> None:
        """Put residuals (and momentum) back to where they were before this step, to rounding.

        `gradients_gone`: the gradients were overwritten by the result; finite ones of this worker then stay in its residual, as if delayed.
        """
        self._undo_(gradients_gone)
        if self.frozen_state is not None:
            self.frozen_state.put_back_()
        self.bucket.shift_()

    def take_back_(self) -> None:
        """Put the state back, bit for bit, of which the bucket has kept a copy."""
        self.bucket.restore()
        self.task.reversals.forget()

    def _undo_(self, gradients_gone: bool) -> None:
        state, method = self.bucket.state, self.bucket.method
        assert state is not None
        if self.bucket.exact:
            self.take_back_()
            return
        self.task.reversals.run()
        if not self.task.poisoned:
            again = None if self.task.lent is None else self.task.lent.again
            gradients = self.gradients if again is None or gradients_gone else again()
            method.feedback.undo_(self.bucket.part, None if gradients_gone else gradients, self.task.ctx)
        if self.task.reversals.was_zero and self.bucket.residual is not None:
            self.bucket.residual.zero_()  # such a payload is not kept for adding back, and what was taken back is so to rounding

    def apply_(self) -> None:
        """The step stands, of a method that applies the update itself: x moves by what came back, if anything did, and parameters are shifted anew.

        Parameters that were frozen since they were bound stand still (at x, where they are shifted).
        """
        bucket, frozen = self.bucket, self.bucket.frozen()
        assert self.out is not None
        before = [bucket.parameters[i].clone() for i in frozen] if bucket.point is None else []
        for i in frozen:
            bucket.segments.views(self.out)[i].zero_()  # what is left of it in the residual must not move x
        if not self.task.skipped:
            bucket.method.feedback.apply_(replace(bucket.part, touched=self.task.into.touched), self.out, self.task.ctx)
        bucket.shift_()
        for i, value in zip(frozen, before):
            bucket.parameters[i].copy_(value)
        if self.frozen_state is not None:
            self.frozen_state.put_back_()

    def commit(self) -> None:
        """The step stands: remember the learning rate that the residual is measured by, and let the payloads go."""
        if self.settings.lr:
            self.bucket.unit = self.task.ctx.unit
        took_all = self.task.compressor.lossless and self.task.extracted == self.bucket.segments.numel
        # Taking all of a buffer that is not the residual leaves the residual as it was.
        self.bucket.residual_is_zero = took_all and (self.bucket.residual_is_zero or not settled(self.bucket.method.feedback))
        self.task.reversals.forget()
        if self.frozen_state is not None:
            self.frozen_state.rescale_(self.task.ctx.carry)
            self.frozen_state.put_back_()


def local_step(task: Task) -> Steps:
    """A local step: nothing is sent, and nothing learned from others. An inf or NaN concerns this rank alone."""
    task.finite, task.skipped, task.silent = task.accumulated.finite, True, True
    yield from ()
    return task.out


def drive(reductions: Iterable[BucketStep], advance: Callable[[BucketStep], None] = BucketStep.advance) -> None:
    """Finish all, one phase of each after the other, by `advance`: second passes of all buckets travel at once, in the same order on every rank, and
    what nothing follows is waited for when all have started."""
    open_ones = [r for r in reductions if not r.finished]
    while open_ones:
        for reduction in [r for r in open_ones if r.ordered] or open_ones:
            advance(reduction)
        open_ones = [r for r in open_ones if not r.finished]
