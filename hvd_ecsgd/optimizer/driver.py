"""Feeds the gradients of a wrapped optimizer to the exchange, and applies what comes back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..core.aggregator import Aggregator
from ..core.agreement import in_common_order
from ..core.attached import refuse_other
from ..core.bound import BoundCompression
from ..core.gradients import clip_factor, take_
from ..core.guard import Guard
from ..core.state import MethodState
from ..errors import CompressionError, SequenceError
from ..transport import Transport
from .backward import BackwardTimer
from .executor import Executor, Observer
from .gradients import Leftover, gradient_type, gradients_of, multiply_gradients_, write_mean
from .groups import ParamGroups
from .hooks import GradientHooks
from .hyper_parameters import HyperParameters
from .note import Note
from .own_class import Evaluated, OwnClass
from .refusals import check_all_bound, check_in_use, raise_if_lost
from .scaler import ScalerLink
from .step import Outcome, Phase, StepExchange

__all__ = ["OptimizerDriver"]


class OptimizerDriver:
    """What stands behind a wrapped optimizer. The optimizer that the script holds is `optimizer`; `inner` is the one that was wrapped.

    `trained`: the (name, parameter) pairs that are exchanged; `names`: by id, of all that it optimises. Making one is collective.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        inner: torch.optim.Optimizer,
        own_class: OwnClass,
        compression: BoundCompression,
        trained: list[tuple[str, torch.nn.Parameter]],
        names: dict[int, str],
        transport: Transport,
        *,
        passes: int,
        bucket_bytes: int,
        sum_gradients: bool,
        overlap: bool,
        executor: Executor,
        observer: Observer | None,
    ) -> None:
        self.optimizer, self.inner, self.own_class, self.compression, self.names = optimizer, inner, own_class, compression, names
        self.hyper_parameters = HyperParameters(optimizer)
        self.scaler = ScalerLink(optimizer, compression)
        self.groups = ParamGroups(optimizer, inner, compression, transport.size, summed=sum_gradients)
        self._overlap = overlap
        self.groups.check()
        trained = in_common_order(trained, transport)
        group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.state = MethodState(
            compression.method,
            trained,
            rank=transport.rank,
            size=transport.size,
            bucket_bytes=bucket_bytes,
            group_of=lambda p: group_of[id(p)],
            settings=self.groups.settings,
            transport=transport,
        )
        aggregator = Aggregator(
            self.state,
            statistics=compression.statistics,
            averages=compression.averages,
            also={
                "optimizer": type(inner).__name__,
                "gradients": "summed" if sum_gradients else "averaged",
                "backward_passes_per_step": passes,
                "hyper-parameters that are numbers": self.hyper_parameters.names,
                "exchange in a thread": executor.concurrent,  # bucket by bucket then, in another order
            },
        )
        compression.adopt(aggregator, self)
        self.step = StepExchange(aggregator, transport, executor, observer, lambda: self.note().pack())
        self.guard = Guard(compression.method.feedback)
        self._leftover = Leftover()
        self.hooks = GradientHooks(trained, self.state.buckets, passes, self._gradient_ready)
        self._timer = BackwardTimer(observer)
        self._should_synchronize = True

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are exchanged."""
        return [p for _, p in self.state.named]

    @property
    def applies_update(self) -> bool:
        """The method moves the parameters, in place of the optimizer."""
        return self.compression.method.feedback.takes.update

    @property
    def listens(self) -> bool:
        """Whether this optimizer exchanges the gradients of its parameters; a newer one for them may have taken over."""
        return self.hooks.listens

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Driver`."""
        refuse_other(self.state.method, optimizer)

    def catch_up(self) -> None:
        """See `Driver`."""
        self.step.drain()

    def meet(self, what: str) -> None:
        """See `Driver`."""
        self.step.meeting.before(what)

    # -- settings ----------------------------------------------------------------------------------------------------------------

    def note(self, joined_at: int = Note.joined_at) -> Note:
        """What the other workers are told at the beginning of a step."""
        scaler = self.scaler.state()
        return Note(joined_at, scaler.get("scale", 0.0), scaler.get("_growth_tracker", 0), tuple(self.hyper_parameters.values()))

    def set_backward_passes_per_step(self, passes: int) -> None:
        self._check_no_gradients("set_backward_passes_per_step()")
        self.step.aggregator.agreement.also_agree_on(backward_passes_per_step=passes)
        self.hooks.passes = passes
        self.hooks.reset()

    # -- gradients come ----------------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Gradients of a step have come that was not exchanged yet."""
        return self.listens and (self.step.begun or self.hooks.begun)

    def _check_no_gradients(self, what: str) -> None:
        if self.begun:
            raise CompressionError(f"{what}: gradients of this step are under way; call it after step().")

    def check_join(self) -> None:
        """Raise `CompressionError` where `join` is not possible now."""
        self._check_no_gradients("join()")
        self._check_applied("join()")
        self.step.aggregator.points.check_not_held("join()")

    def check_zero_grad(self) -> None:
        """Before the optimizer's `zero_grad`. Raises `SequenceError` when gradients are on their way."""
        if self.begun and not self._lost():
            raise SequenceError(
                "zero_grad() was called after a backward pass and before step() or synchronize(): gradients on their way would be lost. "
                "Call it after step(). Gradients that another loss has left here (of a GAN's generator, say) are best not made: freeze this model "
                "(requires_grad_(False)) during that backward pass. Those that are to be thrown away, accumulated ones too: optimizer.discard(), on "
                "every rank."
            )
        self._check_applied("zero_grad()")
        self.step.forget()

    @property
    def _unapplied(self) -> bool:
        """Gradients were exchanged that were not applied, and of which the method keeps something."""
        return self.step.phase is Phase.EXCHANGED and self.step.aggregator.step_is_open

    def _check_applied(self, what: str) -> None:
        if self._unapplied:
            raise SequenceError(
                f"{what} after synchronize() and before step(): what was exchanged is not applied yet, and what the method keeps of it would come "
                "back in later steps. Call optimizer.step() inside `with optimizer.skip_synchronize():`, or throw the step away by "
                "optimizer.discard(), on every rank."
            )

    def discard(self) -> None:
        """See `DistributedOptimizer`'s `discard`."""
        if self.step.phase is not Phase.EXCHANGED:
            if not self.begun:
                for p in self.parameters:
                    p.grad = None
            self._finish(discarding=True)
        if self.step.aggregator.step_is_open:
            self.step.meeting.before("discard")
        self.step.discard()
        self.guard.forget()
        for p in self.parameters:
            p.grad = None

    def _gradient_ready(self, parameter: torch.nn.Parameter) -> None:
        if self._unapplied:
            self.guard.mean_is_spoilt(self.names[id(parameter)])
        self._check_applied("a backward pass")
        self.step.forget()
        complete = self.hooks.count(parameter)
        self.step.begin()
        if complete:
            self._timer.start()
            if self._overlap and not self.state.method.clip_norm is not None:
                self._submit_ready()

    def _submit_ready(self, everything: bool = False, lost: bool = False) -> None:
        """Hand over the next buckets that are complete: in order, because every rank must start the same collectives in the same order.

        `lost`: with NaN in place of their gradients, so that all ranks undo the step.
        """
        of_bucket = [gradients_of(b) for b in self.state.buckets] if self.state.method.clip_norm is not None and not lost else []
        factor = clip_factor(self.state, [g for gradients in of_bucket for g in gradients])
        while (bucket := self.step.next_bucket) is not None:
            if not everything and not self.hooks.release(bucket):
                return
            if lost:
                self.step.submit([torch.full_like(p, float("nan")) for p in bucket.parameters])
            else:
                gradients = take_(self.state, bucket, of_bucket.pop(0) if of_bucket else gradients_of(bucket), factor)
                if not self.step.begun:
                    self.guard.forget()  # of a step that ended in an error
                self.guard.note(list(zip(bucket.segments.names, bucket.parameters)))
                self.step.submit(gradients)

    # -- results are used --------------------------------------------------------------------------------------------------------

    def synchronize(self, again: str = "optimizer.synchronize() called again", stacklevel: int = 3) -> None:
        """See `DistributedOptimizer`'s `synchronize`. `again`: what to say when nothing is left to exchange."""
        check_in_use(self.hooks)
        check_all_bound(self.optimizer, self.compression.ids)
        if self.step.phase is Phase.EXCHANGED:
            warnings.warn(
                f"{again} after optimizer.synchronize(): this step's gradients were exchanged already, and are not exchanged again. Call "
                "optimizer.step() inside `with optimizer.skip_synchronize():`.",
                UserWarning,
                stacklevel=stacklevel,
            )
            return
        if not self.begun and self.compression.method.stateful:
            self._leftover.check_fresh(self.names)
        self._finish()

    def _finish(self, discarding: bool = False) -> None:
        """Finish the exchange. `discarding`: gradients may have been taken away or replaced since they were handed over; and changed, where nothing
        is taken back from them."""
        lost, local, method = self._lost(), self.state.local, self.state.method
        self._submit_ready(everything=True, lost=lost)
        self.step.drain()
        if not lost and not (discarding and (method.exact or not method.stateful)):
            self.guard.check_in_flight(replaced=not discarding)
        self.hooks.reset()
        self._timer.reset()
        outcome = self.step.complete()
        if outcome is Outcome.UNDONE:
            raise_if_lost(self.step, self.parameters, lost, local)
        if not self.applies_update:
            self.guard.forget()
            silent, sparse = outcome is Outcome.SILENT, isinstance(self.inner, torch.optim.SparseAdam)
            for bucket, reduction in zip(self.state.buckets, self.step.results, strict=True):
                write_mean(bucket, reduction, silent, self.groups.factor, sparse)
        elif outcome is Outcome.UNDONE:
            for p in self.parameters:
                p.grad = torch.full_like(p, float("nan"), dtype=gradient_type(p))  # what a GradScaler on any rank must see

    def _lost(self) -> bool:
        """Half of a step's gradients are here, and the other ranks can still be told by what has not been sent."""
        return self.step.next_bucket is not None and self.hooks.lost()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What belongs before the optimizer's step hooks: the exchange, as if it were part of the backward pass. With a closure that is later."""
        self.own_class.check_step(self.optimizer, args, kwargs)
        if self.own_class.closure(args, kwargs) is None:
            self._exchange()

    def _exchange(self) -> None:
        """Exchange, unless that is skipped, and unscale what a GradScaler has scaled."""
        scale, found = self._amp()
        if self._should_synchronize:
            if found is not None and scale is None:
                raise CompressionError(
                    "scaler.unscale_(optimizer) was called after the gradients' exchange had started in the backward pass, and changes nothing that "
                    "was sent. Call optimizer.synchronize() before it, and scaler.step(optimizer) inside `with optimizer.skip_synchronize():`."
                )
            self.synchronize("optimizer.step() called without optimizer.skip_synchronize()", stacklevel=5)  # in Horovod's words
        elif self.step.phase is not Phase.EXCHANGED:
            raise CompressionError("step() inside skip_synchronize() needs optimizer.synchronize() before it.")
        self.guard.check_mean_is_whole()
        if found is not None:
            self.scaler.meet(scale)
        if self.applies_update and self.step.outcome is not Outcome.UNDONE:
            self.guard.check_exchanged([1.0] if found is None else [1.0, 1 / self.compression.attached.loss_scale])
        self.guard.forget()
        if scale is not None and self.step.outcome is Outcome.UNDONE:
            self.scaler.tell_of_overflow()
        elif scale is not None and not self.applies_update:
            multiply_gradients_(self.parameters, 1 / float(scale))

    def _amp(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """GradScaler's scale, unless gradients are unscaled already, and what it found; both are there during `GradScaler.step` only."""
        return getattr(self.optimizer, "grad_scale", None), getattr(self.optimizer, "found_inf", None)

    def update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rest of `step()`: apply what was exchanged. Returns what the optimizer's own `step` would."""
        value, closure = None, self.own_class.closure(args, kwargs)
        if closure is not None:
            with torch.enable_grad():
                value = closure()
            self._exchange()
            args, kwargs = self.own_class.with_closure(args, kwargs, Evaluated(value, self.parameters, type(self.inner).__name__))
        outcome, (_, found) = self.step.outcome, self._amp()
        self._tell_schedulers()
        try:
            if outcome is Outcome.UNDONE or (found is not None and bool(found)):
                return value
            self.groups.check()
            self.step.aggregator.keep_step()
            if self.applies_update:
                self.step.aggregator.apply_updates(self.step.reductions)
            elif outcome is Outcome.STANDS:
                if found is not None:  # an optimizer that unscales by itself (fused) must not do it again
                    self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]
                return self.own_class.step()(self.optimizer, *args, **kwargs)
            return value
        finally:
            self.step.forget()
            self._leftover = Leftover(self.parameters)

    def _tell_schedulers(self) -> None:
        """Schedulers made for the optimizer that was wrapped have counted on being told of its steps; they warn of what comes before the first."""
        held = self.inner.__dict__
        if hasattr(held.get("step"), "_wrapped_by_lr_sched"):
            held["_opt_called"] = True
        if hasattr(held.get("step"), "_with_counter"):  # torch before 2.4
            held["_step_count"] += 1
