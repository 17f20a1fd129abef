"""What happens behind `compress` and `decompress` on unmodified Horovod.

Horovod calls `compress(p.grad)` once per parameter and step, in an order that differs between ranks, and gives no name; after all of them it
calls `decompress` for each. A summable payload is returned from `compress` and reduced by Horovod itself. Everything else *rides along*: our own
named collectives are started in `compress`, and finished at the first `decompress` of the step, all of them together, since waiting
parameter by parameter would deadlock.

Rules that apply the update themselves (worker momentum, DEF) do so in `before_step`, which the caller arranges to run before the inner optimizer's
step: x is moved by exactly the code that our own optimizer runs, and the inner optimizer is left without gradients, so it applies nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..core.aggregator import Aggregator
from ..core.bucket import Bucket
from ..core.gradients import take_
from ..core.guard import Guard
from ..core.refusal import not_applied
from ..core.step import drive
from ..errors import CompressionError
from ..transport import SelfTransport
from .introduction import Introduction
from .meeting import Meeting, inside_backward
from .names import GradientNames
from .refusals import raise_averaged_already, raise_interrupted, raise_never_applied, raise_second_exchange
from .results import Results
from .step import Pending, Phase, SlotStep
from .tail import with_tail, without_tail
from .transport import SlotTransport

__all__ = ["HorovodSlot"]


_slots: weakref.WeakSet[HorovodSlot] = weakref.WeakSet()
"""Of this process. They tell when it is safe to wait, and nothing that is sent depends on them."""


class HorovodSlot:
    """The compress/decompress pair over an aggregator with one bucket per parameter.

    `check_skip` is called with a parameter's name when its step is skipped; it raises when the optimizer would move it nevertheless.
    `introduction`: how the other ranks' counterparts are found, before the first step.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        transport: SlotTransport,
        frozen: Iterable[tuple[str, torch.nn.Parameter]],
        check_skip: Callable[[str], None] = lambda name: None,
        introduction: Introduction | None = None,
    ) -> None:
        self.aggregator = aggregator
        self.transport = transport
        self._meeting = Meeting(transport, introduction, self._nobody_waits)
        self._names = GradientNames(aggregator.state.named, frozen)
        self._buckets: dict[str, Bucket] = {bucket.segments.names[0]: bucket for bucket in aggregator.state.buckets}
        self._applies = aggregator.state.method.feedback.takes.update
        self._guard = Guard(aggregator.state.method.feedback)
        self._step: SlotStep | None = None
        """The step that is being exchanged, or was, and that the optimizer's step has not ended yet."""
        self._results = Results(check_skip)
        self.accumulates = False
        """A backward pass has left gradients that Horovod has not taken yet (backward_passes_per_step)."""
        self._interrupted = ""
        """The name of a parameter at which an exchange was ended by an error, from where Horovod cannot go on: it takes it for started still."""
        _slots.add(self)
        this = weakref.ref(self)

        def accumulated(name: str, parameter: torch.Tensor) -> None:
            slot = this()
            if slot is not None:
                slot._accumulated(name)

        for name, parameter in aggregator.state.named:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(accumulated, name))  # type: ignore[no-untyped-call]

    @property
    def _exchanging(self) -> SlotStep | None:
        """The step that is being exchanged."""
        return self._step if self._step is not None and self._step.phase is not Phase.EXCHANGED else None

    @property
    def _exchanged(self) -> SlotStep | None:
        """The step that was exchanged, and that the optimizer's step has not ended."""
        return self._step if self._step is not None and self._step.phase is Phase.EXCHANGED else None

    def _nobody_waits(self) -> bool:
        """Steps of all slots of this process have begun, or are beginning, so that no rank waits for this one to begin one."""
        return all(slot is self or slot._exchanging for slot in list(_slots))

    def meet(self, what: str) -> None:
        """See `Driver`."""
        self._meeting.before(what)

    # -- compress ----------------------------------------------------------------------------------------------------------------

    def compress(self, gradient: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        step = self._exchanging or SlotStep()
        name = self._names.of(gradient, step.parts)
        try:
            return self._compress(gradient, step, name)
        except Exception:
            if inside_backward():
                self._interrupted = name
            raise

    def _accumulated(self, name: str) -> None:
        """A backward pass has added to this parameter's gradient; Horovod hears of it after this. Raises `SequenceError` after an exchange that an
        error of ours has ended: Horovod would raise, without a word."""
        self.accumulates = True
        if self.aggregator.step_is_open and self.aggregator.state.settings(self._buckets[name]).loss_scale == 1.0:
            self._guard.mean_is_spoilt(name)
        self._check_not_interrupted()

    def _check_not_interrupted(self) -> None:
        if self._interrupted:
            raise_interrupted(self._interrupted)

    def _compress(self, gradient: torch.Tensor, step: SlotStep, name: str) -> tuple[torch.Tensor, Pending]:
        step.check_takes(name)
        if self._exchanging is None:
            self._begin_step(name, gradient)

        bucket = self._buckets[name]
        in_place = gradient.is_contiguous() and gradient.dtype == bucket.segments.dtype
        # An update is applied later, and is not what belongs in the gradient.
        out = gradient.view(-1) if in_place and not self._applies else None
        taken = take_(self.aggregator.state, bucket, [gradient])
        noted = self._guard.note([(name, bucket.parameters[0])]) if bucket.parameters[0].grad is gradient else None  # else a copy of Horovod's
        reduction = self.aggregator.start(bucket, taken, self.transport, out)
        pending = step.parts[name] = Pending(name, gradient, reduction, noted)
        self._step = step
        payload = torch.empty(0, dtype=torch.float32, device=gradient.device) if pending.handle is None else pending.handle.payload
        return with_tail(payload, self.aggregator.agreement.settings_hash(bucket), bool(self.aggregator.agreement.refusal.wrong)), pending

    def _begin_step(self, name: str, gradient: torch.Tensor) -> None:
        self._raise_refusal()  # a GradScaler has left the optimizer's step out, where it would have been raised
        together = self._meeting.find()
        self.aggregator.agreement.note_frozen()
        self._meeting.open_step()
        self.aggregator.agreement.begin_step_together(self.transport.direct, together=together, check_same=self._meeting.check_same)
        self._meeting.check_same_when_due()
        if self._applies and self._exchanged is not None and not self._exchanged.undone:
            raise_never_applied(name)
        computed = inside_backward() or self.accumulates
        if not self._applies and self.aggregator.step_is_open:
            if self.aggregator.state.settings(self._buckets[name]).loss_scale == 1.0:
                raise_second_exchange(name, computed)
            self.aggregator.keep_step()  # its GradScaler has skipped it
        self._forget_exchanged()
        self._guard.forget()  # a GradScaler does not call step() after an overflow
        if not computed and self._results.returned(name, gradient) and bool(gradient.any()):
            raise_averaged_already(name)

    # -- decompress --------------------------------------------------------------------------------------------------------------

    def decompress(self, reduced: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        if pending is None:  # what Horovod gathered without calling compress()
            raise CompressionError(
                f"Horovod gathered a sparse gradient of shape {tuple(reduced.shape)} without compressing it; pass sparse_as_dense=True to "
                "hvd.DistributedOptimizer, or use sparse=False in the embedding."
            )
        try:
            return self._decompress(reduced, pending)
        except Exception:
            self._interrupted = self._interrupted or pending.name
            raise

    def _decompress(self, reduced: torch.Tensor, pending: Pending) -> torch.Tensor:
        self._check_not_interrupted()
        step = self._exchanging
        if step is None or step.parts.get(pending.name) is not pending:
            raise CompressionError(f"parameter '{pending.name}': decompress() was called with a context of another step.")
        if step.phase is Phase.COMPRESSING:
            self._meeting.check_same()
            step.awaits_synchronize = False
            self._guard.check_in_flight()
            step.phase = Phase.DECOMPRESSING
            self.aggregator.agreement.finish_comparisons()
            step.finish_what_rides_along()
        payload, factor, refused = without_tail(reduced, pending.name, self.transport.size)
        if refused:
            self.aggregator.agreement.refusal.hear()
        gradient, reduction = pending.gradient, pending.reduction
        if abs(factor - 1.0) > 1e-5 and self.aggregator.state.method.feedback.takes.learning_rate:
            raise CompressionError(
                f"parameter '{pending.name}': {self.aggregator.state.method.feedback} averages updates; summing gradients (op=hvd.Sum) is not "
                "defined for it. Use op=hvd.Average."
            )
        if reduction is None:
            if not self._applies:
                gradient.zero_()
        else:
            if pending.handle is not None:
                pending.handle.arrive(payload)
                drive([reduction])
            elif factor != 1.0:
                assert reduction.out is not None
                reduction.out.mul_(factor)
            if not self._applies:
                self._results.write(reduction, pending)
        if pending.noted is not None:
            pending.noted.versions = [gradient._version + 1]  # Horovod puts what we return into it: p.grad.set_(p.grad)
        self._results.note(pending)
        if step.take():
            self._end_step(step)
        return gradient

    def _end_step(self, step: SlotStep) -> None:
        self._step, self.accumulates, self._interrupted = None, False, ""
        step.end(undone=not self.aggregator.finish_step(step.reductions, gradients_gone=not self._applies, transport=self.transport.direct))
        self._step = step
        if not self._applies:
            self._guard.forget()
        elif step.undone:
            for pending in step.parts.values():
                pending.gradient.fill_(float("nan"))  # what a GradScaler on any rank must see

    # -- the step ----------------------------------------------------------------------------------------------------------------

    def before_step(self, scaled: bool) -> None:
        """Before a step of the inner optimizer. Horovod's own step comes through here too, before it has synchronised; then nothing is ready.

        `scaled`: a GradScaler may have unscaled the gradients since they were exchanged.
        """
        self._meeting.check_same()  # Horovod's step would wait; it waits for no rank that this does not wait for
        if scaled and self._exchanging:
            self._guard.check_in_flight()
            raise CompressionError(
                "optimizer.step() with a GradScaler attached needs optimizer.synchronize() and scaler.unscale_(optimizer) before it: "
                "the mean would be applied with the loss scale in it. Then scaler.step(optimizer) inside `with optimizer.skip_synchronize():`."
            )
        if (step := self._exchanging) is not None:
            if step.awaits_synchronize:
                raise CompressionError("step() inside skip_synchronize() needs optimizer.synchronize() before it.")
            step.awaits_synchronize = True
        if not self._applies:
            self._raise_refusal()
            if not self._exchanging:
                self._guard.check_mean_is_whole()
                self._check_finite()
                self.aggregator.keep_step()
            undone = self._exchanged is not None and self._exchanged.undone
            self._forget_exchanged()
            self._results.drop(self.aggregator.state.named, undone)
            return
        if self._step is None and self.transport.size == 1:
            self._exchange_alone()
        self._raise_refusal()
        if (step := self._exchanged) is None:
            return
        self._forget_exchanged()
        if not step.undone:
            # A GradScaler's unscale_ may have come in between.
            self._guard.check_exchanged([1.0, 1 / self.aggregator.state.settings(self.aggregator.state.buckets[0]).loss_scale] if scaled else [1.0])
            self.aggregator.apply_updates(step.reductions)
        self._let_go()

    def _check_finite(self) -> None:
        """Raise `CompressionError` where the inner optimizer would apply the mean by what no step can be taken with, set since it was compressed."""
        state = self.aggregator.state
        if self.aggregator.step_is_open and (wrong := next(filter(None, (state.settings(bucket).wrong for bucket in state.buckets)), "")):
            raise CompressionError(not_applied(wrong, "compression"))

    def discard(self) -> None:
        """Undo the step that was exchanged and not applied. Raises `CompressionError` while it is being exchanged."""
        if self._exchanging or self.accumulates:
            raise CompressionError("discard(): gradients are on their way; call optimizer.synchronize() first, on every rank.")
        self.aggregator.discard_step()
        self._forget_exchanged()
        self._let_go()

    def _forget_exchanged(self) -> None:
        """The optimizer's step has come, or will not."""
        if self._exchanged is not None:
            self._step = None

    def _let_go(self) -> None:
        """Nothing is left of the step's gradients."""
        self._guard.forget()
        for _, parameter in self.aggregator.state.named:
            parameter.grad = None

    def _raise_refusal(self) -> None:
        """Where Horovod's own bookkeeping of the step is over, so that training can go on."""
        if refusal := self.aggregator.agreement.refusal.take():
            self._forget_exchanged()  # there is nothing to apply
            raise CompressionError(refusal)

    def _exchange_alone(self) -> None:
        """With one process Horovod never calls compress."""
        if all(p.grad is None for _, p in self.aggregator.state.named):
            return  # the optimizer's step inside Horovod's: done already
        alone = SelfTransport()
        self.aggregator.agreement.begin_step_together(alone)
        step, self.accumulates = SlotStep(), False
        for name, bucket in self._buckets.items():
            gradient = bucket.parameters[0].grad
            if gradient is None:
                gradient = torch.zeros_like(bucket.parameters[0])
            taken = take_(self.aggregator.state, bucket, [gradient.to_dense() if gradient.is_sparse else gradient])
            step.parts[name] = Pending(name, gradient, self.aggregator.start(bucket, taken, alone))
        drive(step.reductions)
        step.end(undone=not self.aggregator.finish_step(step.reductions))
        self._step = step
