"""Feeds the gradients of a wrapped optimizer to the exchange, and applies what comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..core.aggregator import Aggregator
from ..core.agreement import in_common_order
from ..core.attached import refuse_other
from ..core.bound import BoundCompression
from ..core.closures import Evaluated
from ..core.fewer import check_survives
from ..core.state import MethodState
from ..core.step_hooks import tell_schedulers
from ..errors import CompressionError
from ..transport import Transport
from ..transport.base import workers_of
from .executor import Executor, Observer
from .gradients import Leftover, multiply_gradients_, poison_gradients, write_means
from .groups import ParamGroups
from .hand_over import HandOver
from .hyper_parameters import HyperParameters
from .note import Note
from .own_class import OwnClass
from .recovery import Recovery
from .refusals import check_all_bound, check_in_use, raise_if_lost, raise_on_the_way, raise_unapplied
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
        recovery: Recovery | None = None,
    ) -> None:
        self.optimizer, self.inner, self.own_class, self.compression, self.names = optimizer, inner, own_class, compression, names
        self.hyper_parameters = HyperParameters(optimizer)
        self.scaler = ScalerLink(optimizer, compression)
        self.groups = ParamGroups(optimizer, inner, compression, transport.size, summed=sum_gradients)
        self.groups.check()
        if recovery is not None:
            check_survives(compression.method)
        trained = in_common_order(trained, transport)
        group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        state = MethodState(
            compression.method,
            trained,
            rank=workers_of(transport).rank,
            size=workers_of(transport).size,
            process=transport.rank,
            bucket_bytes=bucket_bytes,
            group_of=lambda p: group_of[id(p)],
            settings=self.groups.settings,
            transport=transport,
        )
        aggregator = Aggregator(
            state,
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
        self.step = StepExchange(aggregator, transport, executor, observer, lambda: self.note().pack(), recovery)
        self.hand_over = HandOver(self.step, trained, passes, self._gradient_ready, overlap, observer)
        self._leftover = Leftover()
        self._should_synchronize = True

    @property
    def state(self) -> MethodState:
        return self.step.aggregator.state

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
        return self.hand_over.hooks.listens

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Driver`."""
        refuse_other(self.state.method, optimizer)

    def catch_up(self) -> None:
        """See `Driver`."""
        self.step.drain()
        self.hand_over.guard.check_read()

    def meet(self, what: str) -> None:
        """See `Driver`."""
        self.step.meeting.before(what)

    # -- ranks are gone, and the job outlives them: one after the other, see `Recovery` -----------------------------------------------

    def take_back(self) -> None:
        """Undo what has begun of the step under way."""
        self.step.take_back()

    def prepare_fewer(self, transport: Transport) -> Callable[[], None]:
        """Make ready for the workers of `transport`; collective among them. Returned is what changes this, and sends nothing."""
        commit = self.step.prepare_fewer(transport)

        def change() -> None:
            commit()
            self.groups.be_of(transport.size)

        return change

    def begin_again(self) -> None:
        """The optimizer's own transport is among those that live: take the step under way again, as far as it has come."""
        self.step.begin_again()

    # -- settings ----------------------------------------------------------------------------------------------------------------

    def note(self, joined_at: int = Note.joined_at) -> Note:
        """What the other workers are told at the beginning of a step."""
        scaler = self.scaler.state()
        return Note(joined_at, scaler.get("scale", 0.0), scaler.get("_growth_tracker", 0), tuple(self.hyper_parameters.values()))

    def set_backward_passes_per_step(self, passes: int) -> None:
        self._check_no_gradients("set_backward_passes_per_step()")
        self.step.aggregator.agreement.also_agree_on(backward_passes_per_step=passes)
        self.hand_over.hooks.passes = passes
        self.hand_over.hooks.reset()

    # -- gradients come ----------------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """See `Driver`."""
        return self.hand_over.begun

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
        if self.begun and not self.hand_over.lost:
            raise_on_the_way()
        self._check_applied("zero_grad()")
        self.step.forget()

    @property
    def _unapplied(self) -> bool:
        """Gradients were exchanged that were not applied, and of which the method keeps something."""
        return self.step.phase is Phase.EXCHANGED and self.step.aggregator.step_is_open

    def _check_applied(self, what: str) -> None:
        if self._unapplied:
            raise_unapplied(what)

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
        self.hand_over.guard.forget()
        for p in self.parameters:
            p.grad = None

    def _gradient_ready(self, parameter: torch.nn.Parameter) -> None:
        if self._unapplied:
            self.hand_over.guard.mean_is_spoilt(self.names[id(parameter)])
            raise_unapplied("a backward pass")
        self.step.forget()
        self.groups.hold()
        self.hyper_parameters.hold()
        self.hand_over.count(parameter)

    # -- results are used --------------------------------------------------------------------------------------------------------

    def synchronize(self, again: str = "optimizer.synchronize() called again", stacklevel: int = 3) -> None:
        """See `DistributedOptimizer`'s `synchronize`. `again`: what to say when nothing is left to exchange."""
        check_in_use(self.hand_over.hooks)
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
        lost, local, method = self.hand_over.lost, self.state.local, self.state.method
        try:
            self.hand_over.submit_rest(lost)
            self.step.drain()
            self.hand_over.guard.check_read()
            if not lost and not (discarding and (method.exact or not method.stateful)):
                self.hand_over.guard.check_in_flight(replaced=not discarding)
            self.hand_over.reset()
            outcome = self.step.complete()
        finally:
            self.groups.release()
            self.hyper_parameters.release()
        if outcome is Outcome.UNDONE:
            raise_if_lost(self.step, self.parameters, lost, local)
        if not self.applies_update:
            self.hand_over.guard.forget()
            silent, sparse = outcome is Outcome.SILENT, isinstance(self.inner, torch.optim.SparseAdam)
            write_means(self.state.buckets, self.step.results, silent, self.groups.factor, sparse)
        elif outcome is Outcome.UNDONE:
            poison_gradients(self.parameters)

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
        scale, found = self.scaler.stepping()
        if self._should_synchronize:
            if found is not None and scale is None:
                raise CompressionError(
                    "scaler.unscale_(optimizer) was called after the gradients' exchange had started in the backward pass, and changes nothing that "
                    "was sent. Call optimizer.synchronize() before it, and scaler.step(optimizer) inside `with optimizer.skip_synchronize():`."
                )
            self.synchronize("optimizer.step() called without optimizer.skip_synchronize()", stacklevel=5)  # in Horovod's words
        elif self.step.phase is not Phase.EXCHANGED:
            raise CompressionError("step() inside skip_synchronize() needs optimizer.synchronize() before it.")
        self.hand_over.guard.check_mean_is_whole()
        if self.step.outcome is Outcome.STANDS:
            self.groups.check_finite()
        if found is not None:
            self.scaler.meet(scale)
        if self.applies_update and self.step.outcome is not Outcome.UNDONE:
            self.hand_over.guard.check_exchanged([1.0] if found is None else [1.0, 1 / self.compression.attached.loss_scale])
        self.hand_over.guard.forget()
        if scale is not None and self.step.outcome is Outcome.UNDONE:
            self.scaler.tell_of_overflow()
        elif scale is not None and not self.applies_update:
            multiply_gradients_(self.parameters, 1 / float(scale))

    def update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rest of `step()`: apply what was exchanged. Returns what the optimizer's own `step` would."""
        value, closure = None, self.own_class.closure(args, kwargs)
        if closure is not None:
            with torch.enable_grad():
                value = closure()
            self._exchange()
            args, kwargs = self.own_class.with_closure(args, kwargs, Evaluated(value, self.parameters, type(self.inner).__name__))
        outcome, (_, found) = self.step.outcome, self.scaler.stepping()
        tell_schedulers(self.inner)
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
