"""Runs the steps of one bound method: gradients are accumulated, exchanged, and the step is kept, discarded or undone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CompressionError
from ..protocols import Accumulated, GroupSettings, Lent, Role, Traffic, wanted
from ..transport.base import Transport
from ..verdicts import known_at_the_end
from . import beside, saved_state, switch
from .agreement import Agreement
from .bucket import Bucket
from .copies import Averages
from .gradients import scale_of
from .meter import Meter
from .method import Method
from .points import Point, Points
from .state import Layout, MethodState
from .step import BucketStep, FrozenState, local_step

__all__ = ["Aggregator"]


@dataclass(frozen=True)
class _Exchanged:
    """A step that stands, and may still be discarded."""

    reductions: Sequence[BucketStep]
    gradients_gone: bool
    """They were overwritten by the results."""
    transport: Transport


def _outcome(stands: bool, local: bool, reductions: Sequence[BucketStep]) -> str:
    """In a word, as records of steps have it."""
    if not stands:
        return "undone"
    if local:
        return "local"
    return "silent" if reductions and all(r.task.skipped for r in reductions) else "stands"


class Aggregator:
    """`state` is the record, `agreement` compares it across ranks, and `points` knows where its parameters are.

    `also` names further things that must be equal on all ranks. `statistics` returns the running statistics of the model (batch norm), which are
    averaged where workers evaluate at different points; `averages` are those of its weights.
    """

    def __init__(
        self,
        state: MethodState,
        *,
        also: Mapping[str, Any] | None = None,
        statistics: Callable[[], list[torch.Tensor]] = list,
        averages: Averages | None = None,
    ) -> None:
        self.state = state
        self.agreement = Agreement(state, also)
        self.points = Points(state, averages or Averages())
        self._statistics = statistics
        self._in_step = False
        self._exchanged: _Exchanged | None = None
        self.meter: Meter | None = None
        """Looks at the steps, if somebody wants to know; see `BoundCompression.measure_by`."""
        if Role.POINT in state.method.slot_names:  # they are averaged together
            self.agreement.also_agree_on(**{"batch-norm statistics (bind the module itself on every rank)": [tuple(t.shape) for t in statistics()]})

    # -- between steps -----------------------------------------------------------------------------------------------------------

    def check_between_steps(self, what: str, begun: bool = False) -> None:
        """Raise `CompressionError` when a step is under way: residuals then hold half a step, or gradients of it would be lost. `begun`: it is."""
        if self._in_step or begun:
            raise CompressionError(f"{what} between a backward pass and its optimizer.step(): the step is under way; do it after step().")

    def state_dict(self) -> dict[str, Any]:
        """See `saved_state`. Raises `CompressionError` within a step."""
        self.check_between_steps("the compression's state was asked for")
        return saved_state.state_dict(self.state)

    def prepare_load(self, saved: Mapping[str, Any]) -> Callable[[], None]:
        """See `saved_state`. Raises `CompressionError` within a step, too, and inside of `at`."""
        self.check_between_steps("state was loaded")
        self.points.check_not_held("load_state_dict()")
        return saved_state.prepare_load(self.state, saved)

    def switch(self, new: Method, meet: Callable[[str], None]) -> None:
        """See `switch`. Raises `CompressionError` within a step, too, and inside of `at`."""
        self.check_between_steps("the method was switched")
        self.points.check_not_held("switch()")
        switch.switch(self.state, self.agreement, self.points, new, meet)

    def at(self, point: Point, meet: Callable[[str], None]) -> AbstractContextManager[None]:
        """See `Points.at`."""
        return self.points.at(point, meet)

    @torch.no_grad()
    def form_buckets(self, bucket_bytes: int, group_of: Callable[[torch.nn.Parameter], int], layout: Layout | None = None) -> None:
        """Before the first step: form the record's buckets anew, with what was loaded into them. Of drivers that know the param groups by then only.

        Later ranks have agreed on the buckets, and this is `check_groups`; but where there is another `layout`, the same on all ranks, or one was
        loaded, they are formed by it, between two steps, and are compared with the next one.
        """
        if not self.agreement.first_step_pending:
            self.check_groups(group_of)
            if self.state.is_laid_out(layout):
                return
            self.check_between_steps("buckets were formed")
        self.points.check_trainable()
        saved = None
        if any(bucket.state is not None for bucket in self.state.buckets):
            for bucket in self.state.buckets:
                if bucket.state is not None:
                    self.points.recapture(bucket, contents=True)  # what somebody else wrote would be lost
            saved = saved_state.state_dict(self.state)
        self.state.form_buckets(bucket_bytes, group_of, layout)
        if saved is not None:
            saved_state.prepare_load(self.state, {**saved, "layout": self.state.layout})()

    def check_groups(self, group_of: Callable[[torch.nn.Parameter], int]) -> None:
        """Raise `CompressionError` where ranks have agreed on the buckets, and one would hold parameters of several param groups."""
        if self.agreement.first_step_pending:
            return
        for bucket in self.state.buckets:
            first = group_of(bucket.parameters[0])
            for name, parameter in zip(bucket.segments.names, bucket.parameters, strict=True):
                if group_of(parameter) != first:
                    raise CompressionError(
                        f"parameters '{bucket.segments.names[0]}' and '{name}' are in different param groups of the attached optimizer. Since the "
                        "first step they travel together, by the settings of one. Attach the optimizer before the first backward pass, and leave "
                        "parameters in their param groups; or make the model and its hook anew."
                    )

    # -- one step ----------------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A gradient has come: state may change from now on, perhaps in a thread that has not begun yet, and gradients are no part of it."""
        self._in_step = True

    @torch.no_grad()
    def start(
        self, bucket: Bucket, gradients: list[torch.Tensor], transport: Transport, out: torch.Tensor | None = None, lent: Lent | None = None
    ) -> BucketStep | None:
        """Accumulate `gradients`, as `gradients.take_` returned them, extract and start to send; the mean goes to the flat `out`, or to a buffer that
        the bucket keeps; or to `lent` memory, in which the gradients are, where the exchange can decode there.

        None when the learning rate is 0 and the method keeps state: nothing is sent, and residuals and momentum stay as they are. With
        hyper-parameters that no step can be taken with nothing is accumulated, and NaN is sent, so that every rank undoes the step.
        """
        bucket.check_takes(gradients)
        self.points.check_trainable()
        self._in_step = True
        gauge = None if self.meter is None else self.meter.begin(self.state, bucket)
        method, refusal = self.state.method, self.agreement.refusal
        bucket.allocate(transport.rank, transport.size)
        assert bucket.state is not None and bucket.exchange_state is not None
        feedback = bucket.method.feedback
        group = self.state.settings(bucket)
        self.points.recapture(bucket)
        if method.stateful and (refusal.wrong or group.wrong):
            refusal.wrong = refusal.wrong or group.wrong
            group = GroupSettings(refusal.learning_rate_of_others(bucket.group), loss_scale=group.loss_scale)
        ctx = bucket.context(group, method.seed, self.state.step, transport.rank, transport.size)
        if group.lr == 0 and method.stateful:
            return None
        if bucket.exact:
            bucket.remember()
        frozen_state = FrozenState(bucket, transport.rank, transport.size) if bucket.frozen() else None
        compressor, exchange = bucket.method.at(self.state.step)
        flat = None
        if lent is not None:
            lent.at_once = lent.again is not None or not bucket.method.stateful or bucket.method.exact
            flat = lent.flat if compressor.lossless and getattr(exchange, "delivers", False) and not bucket.method.stateful else None
        part = replace(bucket.part, wanted=wanted(compressor, exchange, bucket.segments, transport.size), flat=flat)
        accumulated = Accumulated.nothing(bucket.segments) if refusal.wrong else feedback.accumulate_(part, gradients, ctx)
        if gauge is not None:
            gauge.accumulated(gradients, accumulated, bucket, group)
        task = bucket.task(compressor, ctx, accumulated, out, lent=lent, last=getattr(exchange, "waits_once", False))
        # Who applies the mean gets it as a GradScaler expects it, loss-scaled.
        rescale = 1.0 if feedback.takes.update else scale_of(self.state, group)
        steps = local_step(task) if self.state.local else exchange.run(task, transport)
        step = BucketStep(bucket, task, steps, gradients, group, rescale, frozen_state, gauge)
        accumulated.settle()  # where the exchange has not looked at it
        return step

    @torch.no_grad()
    def finish_step(self, reductions: Sequence[BucketStep], gradients_gone: bool = False, transport: Transport | None = None) -> bool:
        """After all reductions of a step are driven: count it, and undo it on every rank when any rank sent an inf or NaN. True when it stands: then
        `keep_step` or `discard_step` follows.

        `gradients_gone`: as in `BucketStep.undo_`. `transport`: for what the rule then does together with the other ranks; the step's by default.
        """
        state, refusal = self.state, self.agreement.refusal
        local, n = state.local and not refusal.heard, state.transport.size
        transport = state.transport if transport is None else transport
        stands = known_at_the_end(r.task.finite for r in reductions) and not refusal.heard
        self._in_step = False
        if not stands:
            self.points.recapture_all([r.bucket for r in reductions])  # undoing shifts anew
        for reduction in reductions:
            bucket, traffic = reduction.bucket, reduction.task.traffic
            traffic.dense = bucket.bytes_without_compression(n)
            state.traffic += traffic
            if not stands:
                reduction.undo_(gradients_gone)
        state.step += 1
        if self.meter is not None:
            self.meter.exchanged(state, reductions, _outcome(stands, local, reductions))
        if not stands:
            state.undone += 1
            self._step_is_over()
            self._tell_of_undone(local, transport)
            return False
        self._exchanged, self._in_step = _Exchanged(reductions, gradients_gone, transport), state.method.stateful and bool(reductions)
        if not self._in_step:
            self.keep_step()
        return True

    def _tell_of_undone(self, local: bool, transport: Transport) -> None:
        """Of the step that was the last one: warn, or find out who has refused it."""
        state, refusal = self.state, self.agreement.refusal
        where = "this rank (a local step)" if local else "all ranks"
        alone = not refusal.heard and (local or transport.size == 1)
        if refusal.heard or (alone and refusal.wrong):
            refusal.end(state.step - 1, where, None if alone else transport)
        else:
            spoilt = next((name for name, p in state.named if not bool(p.detach().isfinite().all())), None)
            why = "With a GradScaler this happens now and then."
            if spoilt is not None:
                why = (
                    f"Parameter '{spoilt}' holds one itself, and gradients take it from there, step by step: load a checkpoint, and take a smaller "
                    "learning rate, or in an optimizer such as Adam an eps that is not 0 in the parameter's type."
                )
            warnings.warn(
                f"a gradient or a payload held an inf or NaN on some rank: step {state.step - 1} was undone on {where} ({state.undone} so "
                f"far). {why}",
                RuntimeWarning,
                stacklevel=3,
            )
        refusal.begin("")

    @property
    def step_is_open(self) -> bool:
        """A step was finished and stands, the method keeps something of it, and it was neither kept nor discarded so far."""
        return self._exchanged is not None

    def gradients_are_gone(self) -> None:
        """The gradients of the step that was finished are overwritten by the results from now on."""
        if self._exchanged is not None:
            self._exchanged = replace(self._exchanged, gradients_gone=True)

    def keep_step(self) -> None:
        """The step that was finished is applied: let go of what would undo it. Nothing when that is done already; collective otherwise."""
        if self._exchanged is not None:
            exchanged, self._exchanged, self._in_step = self._exchanged, None, False
            for reduction in exchanged.reductions:
                reduction.commit()
            if exchanged.reductions:  # nothing after a step in which nothing was sent (η = 0)
                beside.between_steps(self.state, exchanged.reductions, exchanged.transport, self._count)
            if not self.state.method.feedback.takes.update:
                self._step_is_over()

    def _step_is_over(self, outcome: str = "") -> None:
        if self.meter is not None:
            self.meter.end(self.state, outcome)

    def _count(self, traffic: Traffic) -> None:
        """Of what all ranks average together beside the buckets."""
        self.state.traffic += traffic
        if self.meter is not None:
            self.meter.together(traffic)

    @torch.no_grad()
    def discard_step(self) -> None:
        """Undo the step that was finished, on all ranks, as one with an inf. Nothing when nothing is open.

        Raises `CompressionError` where the gradients were overwritten and no copy of the state was kept.
        """
        if self._exchanged is None:
            return
        if self._exchanged.gradients_gone and not self.state.method.exact:
            raise CompressionError(
                "discard(): the mean was written over this worker's gradients, by an unmodified Horovod, or by DDP, which copies it where it has "
                "find_unused_parameters, static_graph, gradient_as_bucket_view, or a GPU. So what the method keeps of them can only be taken back "
                "with a copy of its state: give the preset exact=True. Own optimizers (`import mpi_backend as hvd`) need none."
            )
        exchanged, self._exchanged, self._in_step = self._exchanged, None, False
        for reduction in exchanged.reductions:
            reduction.undo_(exchanged.gradients_gone)
        self.state.undone += 1
        self._step_is_over("discarded")

    # -- methods that apply the update themselves --------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_updates(self, reductions: Sequence[BucketStep]) -> None:
        """Methods that apply the update themselves: move x, and shift; the step is kept.

        After an exchange, the running statistics of a model that is evaluated at different points on different ranks are averaged. Collective when
        there was an exchange.
        """
        self.keep_step()
        self.points.look_at_averages()
        self.points.recapture_all([r.bucket for r in reductions])
        if Role.POINT in self.state.method.slot_names and not all(r.task.skipped for r in reductions):
            beside.average(self._statistics(), self.state.transport, self._count)
        for reduction in reductions:
            reduction.apply_()
        self._step_is_over()
