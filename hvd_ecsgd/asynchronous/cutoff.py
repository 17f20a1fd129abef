"""Synchronous training that does not wait for the slowest: who is late is answered for, and its gradient goes into a later step."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..core import saved_state
from ..core.bucket import Bucket
from ..core.gradients import clip_factor, take_
from ..core.meter import Meter, check_unmeasured
from ..core.method import Method
from ..core.state import MethodState, NamedParameters
from ..errors import CompressionError, SequenceError, TransportError
from ..optimizer.hyper_parameters import HyperParameters
from ..optimizer.own_class import OwnClass
from ..protocols import GroupSettings
from ..transport import Transport
from .attendance import Attendance, Cutoff, Met, Over, Row, Stand, Together
from .partial import Applicable, PartialSteps
from .plan import check_rule, dense_gradient

__all__ = ["CutoffWorker"]

_BUCKET_BYTES = 2**62
"""One bucket of each kind: there is no backward pass that it could travel beside."""


class CutoffWorker:
    """One of the workers of `transport`, whose parameters `named` are equal on all. `optimizer` has the hyper-parameters; `apply` takes its step.

    Two threads share it. The script's computes, hands gradients over and applies means (`step`, `meet`, `finish`); the other, which a driver runs,
    does the same rounds and steps on all ranks (`take_part`), whatever the script does meanwhile: it is what answers for a worker that is late.
    A round is an all-gather in which each worker says whether its gradient is there; `Attendance` makes the same of it everywhere.

    A step is the method's own exchange, in which those that are late send nothing, with the hyper-parameters of the worker whose script has taken
    the most steps; the mean divides by all workers. Its mean is applied by every worker, by a late one when its gradient is there, before that
    takes part in the next step; so x is the same on all workers that have applied as many steps, and nothing of a gradient is lost. Raises
    `CompressionError` for a method that shifts the model, has momentum or applies the update, an exchange that is more than payloads, and an
    optimizer that needs a closure.
    """

    def __init__(
        self,
        method: Method,
        named: NamedParameters,
        optimizer: torch.optim.Optimizer,
        transport: Transport,
        cutoff: Cutoff,
        apply: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_rule(method, "a straggler cutoff")
        OwnClass(type(optimizer)).check_evaluates_once()
        self.transport, self._apply_update, self._clock = transport, apply, clock
        self.attendance = Attendance(cutoff, transport.size)
        group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.state = MethodState(
            method,
            named,
            rank=transport.rank,
            size=transport.size,
            bucket_bytes=_BUCKET_BYTES,
            group_of=lambda p: group_of[id(p)],
            settings=self._own,
        )
        self.use(optimizer)
        self._steps = PartialSteps(self.state, optimizer, transport)
        self.steps = 0
        """That this worker's script has taken part in; those of all workers together are `state.step`."""
        self._changed = threading.Condition()
        self._stand = Stand.COMPUTING
        self._begun, self._seconds, self._told = clock(), 0.0, self._hyper_parameters.values()
        self._offered: dict[int, torch.Tensor] = {}  # by id of the parameter; the other thread's while READY
        self._applies, self._pause_for = True, 0.0
        self._done: deque[Applicable] = deque()
        self._error: BaseException | None = None
        self.applied = 0
        """Steps of all workers together that the script's thread has applied, or has been told that they were undone."""
        self._step_or_meter = threading.RLock()
        """Who measures changes between two steps."""
        self.over = False
        """All workers are done, and no round follows."""

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Its hyper-parameters count: of the same param groups as the one that was given at first."""
        self.optimizer, self._hyper_parameters = optimizer, HyperParameters(optimizer)

    def measure_by(self, meter: Meter | None) -> None:
        """As a bound compression does; records are made by the other thread."""
        with self._step_or_meter:
            if meter is not None:
                check_unmeasured(self.meter)
            self._steps.meter = meter

    @property
    def meter(self) -> Meter | None:
        """Who looks at the steps."""
        return self._steps.meter

    @property
    def hyper_parameters(self) -> list[str]:
        """Names of those that are told: as many on every rank."""
        return self._hyper_parameters.names

    def _own(self, bucket: Bucket) -> GroupSettings:
        return GroupSettings.of(self.optimizer.param_groups[bucket.group], where=f"param group {bucket.group} of {type(self.optimizer).__name__}")

    # -- the script's thread -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def offer(self) -> None:
        """This worker's gradient is there: its next step takes it. `p.grad` is None afterwards.

        Raises `SequenceError` after `finish`, and while x is held; `CompressionError` for hyper-parameters that no step can be taken with, a gradient
        of another shape than its parameter was bound with, and a parameter that has been frozen.
        """
        if self._stand is not Stand.COMPUTING:
            when = "after finish()" if self._stand is Stand.FINISHED else "inside of `with optimizer.consistent()`, where x is held"
            raise SequenceError(f"a straggler cutoff: step() {when}.")
        gradients = {id(p): dense_gradient(p) for _, p in self.state.named}
        for bucket in self.state.buckets:
            bucket.check_takes([gradients[id(p)] for p in bucket.parameters])
            if frozen := bucket.frozen():
                raise CompressionError(
                    f"a straggler cutoff: parameter '{bucket.segments.names[frozen[0]]}' was frozen after the optimizer was made, and other workers "
                    "may be steps ahead. Freeze it before, or leave it out of the loss."
                )
            if wrong := self._own(bucket).wrong:
                raise CompressionError(f"a straggler cutoff: {wrong}, and no step can be taken with that.")
        factor = clip_factor(self.state, list(gradients.values()))
        for bucket in self.state.buckets:
            taken = take_(self.state, bucket, [gradients[id(p)] for p in bucket.parameters], factor)
            self._offered |= {id(p): g for p, g in zip(bucket.parameters, taken, strict=True)}
        for _, p in self.state.named:
            if p.is_cuda:
                torch.cuda.current_stream(p.device).synchronize()
            p.grad = None
        self._say(Stand.READY, seconds=self._clock() - self._begun)

    def step(self) -> None:
        """Offer the gradient, and apply all steps up to the one that has taken it."""
        self.offer()
        self._apply_until(lambda: self._stand is Stand.COMPUTING)
        self.steps += 1

    def meet(self) -> None:
        """Wait until all workers do so too, or are done: x is the same on all of them then, and is held until all meet again."""
        leaves = self._stand is Stand.HOLDING
        if self._stand not in (Stand.COMPUTING, Stand.HOLDING):
            raise SequenceError("a straggler cutoff: consistent() after finish().")
        self._say(Stand.MEETING)
        self._apply_until(lambda: self._stand is Stand.HOLDING)
        if leaves:
            self._begun = self._clock()
            self._say(Stand.COMPUTING)

    def finish(self) -> None:
        """No gradient will come of this worker: apply the others' steps until all say so. Raises `SequenceError` while x is held."""
        if self._stand is Stand.HOLDING:
            raise SequenceError("a straggler cutoff: finish() inside of `with optimizer.consistent()`; leave it first.")
        self._say(Stand.FINISHED)
        self._apply_until(lambda: self.over)

    def leave(self) -> None:
        """No gradient will come of this worker, and x is of no more use to it: the others' steps are answered, and not applied."""
        self._applies = False
        with self._changed:
            self._stand = Stand.FINISHED
            self._done.clear()
            self._changed.notify_all()

    def _say(self, stand: Stand, seconds: float = 0.0) -> None:
        with self._changed:
            self._raise()
            self._stand, self._seconds, self._told = stand, seconds, self._hyper_parameters.values()
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise TransportError(f"a straggler cutoff: the exchange has failed: {self._error!r}") from self._error

    def _apply_until(self, reached: Callable[[], bool]) -> None:
        """Apply what has come, and comes, until `reached` and nothing is left."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._done) or self._error is not None or reached())
                self._raise()
                if not self._done:
                    return
                done = self._done.popleft()
            self.apply(done)

    def apply_all(self) -> None:
        """Apply what has come."""
        self._apply_until(lambda: True)

    def apply(self, done: Applicable) -> None:
        """Take the optimizer's step with a mean, and with the hyper-parameters that the step was taken with; the script's own are as before."""
        for _, p in self.state.named:
            p.grad = None
        self.applied += 1
        if done.means is None:
            warnings.warn(
                "a gradient or a payload held an inf or NaN on some rank: a step was undone on all ranks.",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        own = self._hyper_parameters.values()
        self._hyper_parameters.adopt(done.numbers)
        for p, mean in done.means:
            p.grad = None if mean is None else mean.to(p.dtype)
        self._apply_update()
        self._hyper_parameters.adopt(own)

    # -- the other thread --------------------------------------------------------------------------------------------------------

    def serve(self, waited: float | None = None, tell: Callable[[float], object] = lambda seconds: None) -> None:
        """Rounds and steps until all workers are done; what is raised, the script's thread raises. `tell`: called when this worker has waited so many
        seconds for others, and again after as many; None: never."""
        told_at = self._clock()
        try:
            while not self.over:
                self._pause()
                before = self.state.step
                self.take_part()
                now = self._clock()
                if self._stand in (Stand.COMPUTING, Stand.HOLDING) or self.state.step > before or not self.attendance.waited_for:
                    told_at = now
                elif waited is not None and now - told_at > waited:
                    tell(now - told_at)
                    told_at = now
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _pause(self) -> None:
        """Where this worker has nothing new to say, for a little."""
        with self._changed:
            stand = self._stand
            if stand is not Stand.READY:
                self._changed.wait_for(lambda: self._stand is not stand, self._pause_for)

    def take_part(self) -> bool:
        """A round, and the step that follows if one does. Whether this was the last round of all."""
        with self._changed:
            now = self._clock()
            seconds = self._seconds if self._stand is Stand.READY else now - self._begun
            row = Row(self._stand, now, seconds, self.steps, self._told)
        told = torch.tensor(row.told(), dtype=torch.float64, device="cpu")
        everyones = self.transport.allgather(told, "cutoff.round", [told.numel()] * self.transport.size).wait()
        rows = [Row.of(t.tolist()) for t in everyones]
        decision, self._pause_for = self.attendance.decide(rows), self.attendance.pause(rows)
        if isinstance(decision, Together):
            with self._step_or_meter:
                self._take_step(decision, rows[decision.chief].numbers)
        elif decision is not None:
            with self._changed:
                self.over = isinstance(decision, Over)
                self._stand = Stand.HOLDING if isinstance(decision, Met) and self._stand is Stand.MEETING else self._stand
                self._changed.notify_all()
        return self.over

    def _take_step(self, together: Together, numbers: Sequence[float]) -> None:
        done, ours = self._steps.take(together, numbers, self._offered), together.present[self.transport.rank]
        with self._changed:
            if self._applies:
                self._done.append(done)
            if ours and self._stand is Stand.READY:  # else the script has left meanwhile
                self._offered, self._stand, self._begun = {}, Stand.COMPUTING, self._clock()
            self._changed.notify_all()

    # -- saving ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Residuals, and how many steps there have been. While x is held, else `SequenceError`."""
        self.check_held("state_dict()")
        return {"exchange": saved_state.state_dict(self.state), "steps": self.steps, "applied": self.applied}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned on the same rank of as many. While x is held. Raises `CompressionError` where it does not fit."""
        self.check_held("load_state_dict()")
        saved_state.prepare_load(self.state, saved["exchange"])()
        self.steps, self.applied = saved["steps"], saved["applied"]

    def check_held(self, what: str) -> None:
        """Raise `SequenceError` unless x is held."""
        if self._stand is not Stand.HOLDING:
            raise SequenceError(f"a straggler cutoff: {what} is to be called inside of `with optimizer.consistent()`, where no step is under way.")
