"""Feeds the gradients of a wrapped optimizer to the exchange, and applies what comes back."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..aggregator import Aggregator
from ..agreement import in_common_order
from ..bound import BoundCompression, check_plain_sgd
from ..bucket import Bucket
from ..errors import CompressionError, SequenceError
from ..guard import Guard
from ..protocols import GroupSettings
from ..transport import Transport
from .executor import Executor, Observer
from .hooks import GradientHooks
from .hyper_parameters import HyperParameters
from .join import Note
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
        self._sum, self._overlap = sum_gradients, overlap
        self._check_optimizer()
        trained = in_common_order(trained, transport)
        group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        aggregator = Aggregator(
            compression.method,
            trained,
            rank=transport.rank,
            size=transport.size,
            bucket_bytes=bucket_bytes,
            group_of=lambda p: group_of[id(p)],
            settings=self._settings,
            transport=transport,
            also={
                "optimizer": type(inner).__name__,
                "gradients": "summed" if sum_gradients else "averaged",
                "backward_passes_per_step": passes,
                "hyper-parameters that are numbers": self.hyper_parameters.names,
                "exchange in a thread": executor.concurrent,  # bucket by bucket then, in another order
            },
        )
        compression.adopt(aggregator, optimizer)
        self.step = StepExchange(aggregator, transport, executor, observer, lambda: self.note().pack())
        self.guard = Guard(compression.method.feedback)
        self._left: list[tuple[torch.nn.Parameter, weakref.ref[torch.Tensor], int]] = []  # gradients that the last step has left, and their versions
        self.hooks = GradientHooks(trained, aggregator.buckets, passes, self._gradient_ready)
        self._backward_watched = False
        self._should_synchronize = True

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are exchanged."""
        return [p for _, p in self.step.aggregator.named]

    @property
    def applies_update(self) -> bool:
        """The method moves the parameters, in place of the optimizer."""
        return self.compression.method.feedback.takes.update

    @property
    def _clips_by_norm(self) -> bool:
        return self.compression.method.clip_norm is not None

    @property
    def listens(self) -> bool:
        """Whether this optimizer exchanges the gradients of its parameters; a newer one for them may have taken over."""
        return self.hooks.listens

    # -- settings ----------------------------------------------------------------------------------------------------------------

    def _settings(self, bucket: Bucket) -> GroupSettings:
        settings = self.compression.settings_of(self.optimizer, bucket.group)
        return replace(settings, lr=settings.lr * self.step.transport.size) if self._sum else settings  # what the mean is multiplied by

    def _check_optimizer(self) -> None:
        """What the optimizer would do beyond the method, or a second time, is an error, not silently different."""
        feedback = self.compression.method.feedback
        if feedback.takes.update:
            check_plain_sgd(self.compression.method, type(self.inner).step, type(self.inner).__name__)
            if self._sum:
                raise CompressionError(f"{feedback} averages updates; summing gradients (op=Sum) is not defined for it.")
        for g, group in enumerate(self.optimizer.param_groups):
            feedback.check_group(group, f"param group {g} of {type(self.inner).__name__}")

    def note(self, joined_at: int = Note.joined_at) -> Note:
        """What the other workers are told at the beginning of a step."""
        scaler = self.scaler.state()
        return Note(joined_at, scaler.get("scale", 0.0), scaler.get("_growth_tracker", 0), tuple(self.hyper_parameters.values()))

    def set_backward_passes_per_step(self, passes: int) -> None:
        self._check_no_gradients("set_backward_passes_per_step()")
        self.step.aggregator.also_agree_on(backward_passes_per_step=passes)
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
        if self.step.aggregator.held:
            raise CompressionError("join(): leave `with compression.at(…):` first.")

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

    def _check_applied(self, what: str) -> None:
        """Raise `SequenceError` when gradients were exchanged that were not applied, and of which the method keeps something."""
        if self.step.phase is Phase.EXCHANGED and self.step.aggregator.step_is_open:
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
            self._finish(replaced=False)
        if self.step.aggregator.step_is_open:
            self.step.aggregator.check_together("discard", ends_step=True)
        self.step.discard()
        self.guard.forget()
        for p in self.parameters:
            p.grad = None

    def _gradient_ready(self, parameter: torch.nn.Parameter) -> None:
        self._check_applied("a backward pass")
        self.step.forget()
        complete = self.hooks.count(parameter)
        self.step.begin()
        if complete:
            self._watch_backward()
            if self._overlap and not self._clips_by_norm:
                self._submit_ready()

    def _watch_backward(self) -> None:
        """Tell the observer of this backward pass, from its first complete gradient to its end."""
        observer = self.step.observer
        if observer is not None and not self._backward_watched:
            self._backward_watched = True
            begin = time.perf_counter()

            def ended() -> None:
                self._backward_watched = False
                observer("backward", "BACKWARD", begin, time.perf_counter())

            torch.autograd.Variable._execution_engine.queue_callback(ended)  # as torch's own DDP does

    def _submit_ready(self, everything: bool = False, lost: bool = False) -> None:
        """Hand over the next buckets that are complete: in order, because every rank must start the same collectives in the same order.

        `lost`: with NaN in place of their gradients, so that all ranks undo the step.
        """
        aggregator = self.step.aggregator
        of_bucket = [_gradients(b) for b in aggregator.buckets] if self._clips_by_norm and not lost else []
        factor = aggregator.clip_factor([g for gradients in of_bucket for g in gradients])
        while (bucket := self.step.next_bucket) is not None:
            if not everything and not self.hooks.release(bucket):
                return
            if lost:
                self.step.submit([torch.full_like(p, float("nan")) for p in bucket.parameters])
            else:
                gradients = aggregator.take_(bucket, of_bucket.pop(0) if of_bucket else _gradients(bucket), factor)
                if not self.step.begun:
                    self.guard.forget()  # of a step that ended in an error
                self.guard.note(list(zip(bucket.segments.names, bucket.parameters)))
                self.step.submit(gradients)

    # -- results are used --------------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """See `DistributedOptimizer`'s `synchronize`."""
        check_in_use(self)
        check_all_bound(self)
        if self.step.phase is Phase.EXCHANGED:
            warnings.warn(
                "this step's gradients were exchanged by optimizer.synchronize() already, and are not exchanged again. Call optimizer.step() inside "
                "`with optimizer.skip_synchronize():` after it.",
                UserWarning,
                stacklevel=4,
            )
            return
        self._check_fresh()
        self._finish()

    def _check_fresh(self) -> None:
        """Raise `SequenceError` when the gradients are those that the last step has left, which would be accumulated a second time."""
        if self.begun or not self.compression.method.stateful:
            return
        for p, gradient, version in self._left:
            if p.grad is None or p.grad is not gradient() or p.grad._version != version:
                continue
            if bool((p.grad._values() if p.grad.is_sparse else p.grad).any()):
                raise SequenceError(
                    f"the gradient of parameter '{self.names[id(p)]}' was exchanged already, and no backward pass has run since. Call zero_grad() "
                    "after step(); then a step without a backward pass takes part with gradients of zero. (After optimizer.synchronize(), call "
                    "optimizer.step() inside `with optimizer.skip_synchronize():`.)"
                )

    def _finish(self, replaced: bool = True) -> None:
        """Finish the exchange. `replaced`: a gradient that is another tensor than was handed over is an error too."""
        lost, local = self._lost(), self.step.aggregator.local
        self._submit_ready(everything=True, lost=lost)
        self.step.drain()
        if not lost:
            self.guard.check_in_flight(replaced=replaced)
        self.hooks.reset()
        self._backward_watched = False
        outcome = self.step.complete()
        if outcome is Outcome.UNDONE:
            raise_if_lost(self, lost, local)
        if not self.applies_update:
            self.guard.forget()
            self._write_means()
        elif outcome is Outcome.UNDONE:
            for p in self.parameters:
                p.grad = torch.full_like(p, float("nan"), dtype=_gradient_type(p))  # what a GradScaler on any rank must see

    def _lost(self) -> bool:
        """Half of a step's gradients are here, and the other ranks can still be told by what has not been sent."""
        return self.step.next_bucket is not None and self.hooks.lost()

    def _write_means(self) -> None:
        """The means become the gradients."""
        for bucket, reduction in zip(self.step.aggregator.buckets, self.step.results, strict=True):
            if reduction is None:  # learning rate 0
                for p in bucket.parameters:
                    p.grad = self._as_the_optimizer_expects(torch.zeros_like(p, dtype=_gradient_type(p)))
                continue
            assert reduction.out is not None
            if reduction.task.skipped and self.step.outcome is not Outcome.SILENT:
                for p in bucket.parameters:
                    p.grad = None  # the optimizer leaves these alone
                continue
            if self._sum:
                reduction.out.mul_(self.step.transport.size)
            for p, mean in zip(bucket.parameters, bucket.hand_out(reduction.out), strict=True):
                # Frozen since: what is left of it in the residual must not move it.
                p.grad = None if not p.requires_grad else self._as_the_optimizer_expects(mean.to(_gradient_type(p)))

    def _as_the_optimizer_expects(self, mean: torch.Tensor) -> torch.Tensor:
        """For SparseAdam the rows that are not zero. Alike on all workers: dense and sparse steps round differently."""
        if not isinstance(self.inner, torch.optim.SparseAdam) or mean.dim() == 0:
            return mean
        rows = mean.unsqueeze(-1).flatten(1).ne(0).any(1).nonzero().view(1, -1)
        return torch.sparse_coo_tensor(rows, mean[rows[0]], mean.shape, device=mean.device, is_coalesced=True, check_invariants=False)

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
            self.synchronize()
        elif self.step.phase is not Phase.EXCHANGED:
            raise CompressionError("step() inside skip_synchronize() needs optimizer.synchronize() before it.")
        if found is not None:
            self.scaler.meet(scale)
        if self.applies_update and self.step.outcome is not Outcome.UNDONE:
            self.guard.check_exchanged([1.0] if found is None else [1.0, 1 / self.compression.loss_scale])
        self.guard.forget()
        if scale is not None and self.step.outcome is Outcome.UNDONE:
            self.scaler.tell_of_overflow()
        elif scale is not None and not self.applies_update:
            self.multiply_gradients(1 / float(scale))

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
            self._check_optimizer()
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
            self._left = [(p, weakref.ref(p.grad), p.grad._version) for p in self.parameters if p.grad is not None]

    def _tell_schedulers(self) -> None:
        """Schedulers made for the optimizer that was wrapped have counted on being told of its steps; they warn of what comes before the first."""
        held = self.inner.__dict__
        if hasattr(held.get("step"), "_wrapped_by_lr_sched"):
            held["_opt_called"] = True
        if hasattr(held.get("step"), "_with_counter"):  # torch before 2.4
            held["_step_count"] += 1

    def multiply_gradients(self, factor: float) -> None:
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_mul_(gradients, factor)


def _gradient_type(parameter: torch.nn.Parameter) -> torch.dtype:
    """Of what may be assigned to its `.grad`: torch 2.10 and later let scripts choose it."""
    chosen: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if chosen is None else chosen


def _gradients(bucket: Bucket) -> list[torch.Tensor]:
    return [_gradient(p) for p in bucket.parameters]


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:  # not used in this step on this rank; others may have used it
        return torch.zeros_like(parameter)
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()  # as a GradScaler would do later, for half precision
    return parameter.grad.to_dense()
