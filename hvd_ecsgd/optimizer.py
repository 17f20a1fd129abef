"""DistributedOptimizer over any transport: buckets, gradient hooks, and methods that apply the update themselves."""

from __future__ import annotations

import inspect
import json
import numbers
import struct
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .aggregator import Aggregator, Comparison
from .agreement import in_common_order
from .bound import BoundCompression, check_plain_sgd
from .bucket import Bucket, Reduction, drive
from .compression import AnyCompression, Compression, bind
from .errors import CheckpointError, CompressionError, SequenceError
from .method import GroupSettings
from .transport import SelfTransport, Transport
from .transport.base import Handle
from .trees import decode, encode

__all__ = ["DistributedOptimizer", "Executor", "Inline", "Observer"]

BUCKET_BYTES = 25 * 2**20
_TRAINS = 2**62  # the step at which a worker that still trains has joined, as it tells the others: later than any
_OUTSIDE = _TRAINS + 1  # the same, of a worker that begins no step, but something else that all do together
_SHORTEST, _LONGEST = 20e-6, 1e-3  # seconds between looks at a payload on its way, in a thread that must not take a core from the backward pass

Observer = Callable[[str, str, float, float], None]
"""Is told the bucket (or "backward"), what was done (BACKWARD, COMPRESS, COMMUNICATE), and from when to when (time.perf_counter)."""


class Executor(Protocol):
    """Runs what it is given, one after the other in that order: at once, or in a thread of its own while the caller goes on."""

    @property
    def concurrent(self) -> bool:
        """Whether the caller goes on."""
        ...

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work`, after what was submitted before. Raises what that raised, if something did; then nothing more is run until `drain`."""
        ...

    def drain(self) -> None:
        """Return when everything has run. Raises what was raised."""
        ...


class Inline:
    """Runs everything at once."""

    concurrent = False

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def drain(self) -> None:
        pass


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: AnyCompression = Compression.none,
    *,
    transport: Transport | None = None,
    backward_passes_per_step: int = 1,
    bucket_bytes: int = BUCKET_BYTES,
    sum_gradients: bool = False,
    overlap: bool = True,
    executor: Executor | None = None,
    observer: Observer | None = None,
) -> Any:
    """Wrap `optimizer` so that `step()` uses the (compressed) mean of all workers' gradients.

    The result is an instance of the optimizer's own class and shares its param groups and state. Buckets of about `bucket_bytes`
    bytes start to travel as soon as their gradients are complete, in the same order on every rank (rank 0's of the names), while the backward pass
    goes on. Collective: all ranks make their optimizers in the same order.
    A worker without a gradient for some parameter takes part with zeros. `compression`: any preset, bound or not; methods that apply the update
    themselves (`local_momentum`, `detached`, `dist_ef_sgd()`) need a plain `torch.optim.SGD`, whose lr, momentum and weight_decay they read.
    `sum_gradients`: the sum instead of the mean (not for those methods). Sparse gradients (of embeddings) travel as dense ones, compressed like them,
    and the optimizer is given the dense mean; SparseAdam, which takes no other, the rows that are not zero as a sparse tensor.
    `overlap=False`: nothing starts before `step()`. `executor`: what compresses and communicates; by default the gradient hooks do, and the
    backward pass waits while they compress. All ranks must choose alike. `observer` is told what happens when, for a trace.

    Attributes beside the optimizer's: `compression` (the bound object), `synchronize()`, `skip_synchronize()`, `join()`,
    `set_backward_passes_per_step()`.
    Raises `CompressionError` for parameters without a name, duplicate names, or a method that cannot work with this optimizer;
    at the first step `DisagreementError`, on every rank, when ranks hold different settings or parameters.
    """
    transport = SelfTransport() if transport is None else transport
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CompressionError(f"DistributedOptimizer(): expected a torch.optim optimizer, got {optimizer!r:.100}.")
    if isinstance(optimizer, _Distributed):
        raise CompressionError("DistributedOptimizer(): the optimizer is distributed already.")
    own = optimizer.__class__
    cls: Any = type(own.__name__, (_Distributed, own), {"__module__": own.__module__})
    wrapped: _Distributed = object.__new__(cls)
    # A scheduler made before wrapping has put a `step` of its own on the instance; it would bypass ours.
    wrapped.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    wrapped._overlap, wrapped._executor, wrapped._observer = overlap, Inline() if executor is None else executor, observer
    wrapped._setup(optimizer, named_parameters, compression, transport, backward_passes_per_step, bucket_bytes, sum_gradients)
    return wrapped


def _events(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """Of the streams that may still be writing these tensors."""
    events = []
    for device in {t.device for t in tensors if t.is_cuda}:
        events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        events[-1].record(torch.cuda.current_stream(device))
    return events


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _never() -> bool:
    return False


def _wait_patiently(handle: Handle[Any] | Comparison, give_up: Callable[[], bool] = _never) -> bool:
    """Until `handle` is done, looking at it now and then: waiting inside of a network library takes a whole core. False when given up."""
    pause = _SHORTEST
    while not handle.done():
        if give_up():
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST)
    return True


def _calling_scaler() -> Any:
    """The GradScaler whose `step` has called; None if there is none. It hands an optimizer its scale, and not itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if callable(getattr(found, "_check_inf_per_device", None)):
            return found
        frame = frame.f_back
    return None


def _check_passes(passes: int) -> None:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise CompressionError(f"backward_passes_per_step must be an integer ≥ 1, got {passes!r}.")


def _numbers(value: Any) -> list[float]:
    """Those in a hyper-parameter; none if it is something else."""
    if isinstance(value, (tuple, list)):
        return [number for part in value for number in _numbers(part)]
    single = isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return [float(value)] if single else []


def _with_numbers(value: Any, told: Iterator[float]) -> Any:
    """A hyper-parameter like `value`, that holds the next of the numbers told."""
    if isinstance(value, (tuple, list)):
        return type(value)(_with_numbers(part, told) for part in value)
    if not _numbers(value):
        return value
    new = next(told)
    if isinstance(value, torch.Tensor):
        return value.fill_(new)
    return value if float(value) == new else bool(new) if isinstance(value, bool) else new


# Parameter → the optimizer that listens to its gradients: making a new one for the same parameters retires the old.
_wrapped: Any = WeakTensorKeyDictionary()
_wrapped_lock = threading.Lock()


@dataclass
class _Noted:
    """A gradient as it was when its exchange was handed over."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    version: int


class _Distributed(torch.optim.Optimizer):
    """Mixin in front of the optimizer's own class."""

    compression: BoundCompression
    _step_supports_amp_scaling = True
    """`GradScaler.step` then calls our `step` on every rank, also where it found an overflow, and leaves unscaling to it."""
    _overlap: bool
    _executor: Executor
    _observer: Observer | None

    def _setup(
        self,
        inner: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None,
        compression: AnyCompression,
        transport: Transport,
        passes: int,
        bucket_bytes: int,
        sum_gradients: bool,
    ) -> None:
        _check_passes(passes)
        self._inner = inner
        self._transport = transport
        self._sum = sum_gradients
        owned = {id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        closure = inspect.signature(type(inner).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise CompressionError(
                f"{type(inner).__name__} evaluates its closure several times in a step, and gradients are exchanged once. Use an optimizer that "
                "takes one gradient a step (SGD, Adam, …)."
            )
        if named_parameters is not None:
            if not isinstance(named_parameters, Iterable):
                raise CompressionError(
                    f"named_parameters: expected (name, parameter) pairs such as model.named_parameters(), got {named_parameters!r:.80}."
                )
            named = list(named_parameters)
            if wrong := [pair for pair in named if not (isinstance(pair, tuple) and len(pair) == 2)]:
                raise CompressionError(
                    f"named_parameters: expected (name, parameter) pairs such as model.named_parameters(), got {wrong[0]!r:.80} in a "
                    f"{type(named_parameters).__name__}."
                )
        elif isinstance(compression, BoundCompression):
            named = compression.named
        else:
            named = [(f"group{g}.{i}", p) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        self.compression = bind(compression, named)
        trained = [(n, p) for n, p in self.compression.named if id(p) in owned]
        unnamed = set(owned) - {id(p) for _, p in named}
        if unnamed:
            g, i = min(owned[p] for p in unnamed)
            raise CompressionError(
                f"parameter {i} of param group {g} (shape {tuple(self.param_groups[g]['params'][i].shape)}) has no name; pass "
                "named_parameters=model.named_parameters() with all of them."
            )
        lost = {id(p) for n, p in named if p.requires_grad and id(p) in owned} - {id(p) for _, p in trained}
        if lost:
            name = next(n for n, p in named if id(p) in lost)
            raise CompressionError(
                f"parameter '{name}' is optimised but not bound: it was frozen, or another model was bound. Bind again: Compression.….bind(model)."
            )
        if not trained:
            raise CompressionError(
                "DistributedOptimizer(): none of the bound parameters belongs to the optimizer; was the compression bound to another model?"
            )

        self._updates = self.compression.method.feedback.applies_update
        self._numbered = [(g, key) for g, group in enumerate(self.param_groups) for key in sorted(self.defaults) if _numbers(group.get(key))]
        self._check_optimizer()
        self._names = {id(p): n for n, p in [*named, *self.compression.named] if id(p) in owned}
        trained = in_common_order(trained, transport)
        self._aggregator = Aggregator(
            self.compression.method,
            trained,
            rank=transport.rank,
            size=transport.size,
            bucket_bytes=bucket_bytes,
            group_of=lambda p: owned[id(p)][0],
            settings=self._settings,
            transport=transport,
            also={
                "optimizer": type(inner).__name__,
                "gradients": "summed" if sum_gradients else "averaged",
                "backward_passes_per_step": passes,
                "hyper-parameters that are numbers": [f"{key} of param group {g}" for g, key in self._numbered],
                "exchange in a thread": self._executor.concurrent,  # bucket by bucket then, in another order
            },
        )
        self._aggregator.outside = self._check_nobody_joined
        self.compression.adopt(self._aggregator)
        self._bound_ids = {id(p) for _, p in trained}
        self._passes = passes
        self._bucket_of = {id(p): bucket for bucket in self._aggregator.buckets for p in bucket.parameters}
        self._submitted = 0  # buckets of this step, handed to the executor
        self._started: list[Reduction | None] = []  # the executor's, until it is drained
        self._results: list[Reduction] | None = None
        self._stands = True
        self._silent = False
        self._opening: Comparison | None = None  # the comparison that begins a step, from its start until its end
        self._sent_at: dict[int, float] = {}
        self._backward_watched = False
        self._should_synchronize = True
        self._reset_counts()
        self._in_flight: list[_Noted] = []
        self._hooks: list[Any] = []
        weakref.finalize(self, _remove, self._hooks).atexit = False
        listening = weakref.WeakMethod(self._gradient_ready)

        def ready(parameter: torch.Tensor) -> None:  # what a parameter's hook refers to is never collected with it
            listen = listening()
            if listen is not None:
                listen(parameter)

        with _wrapped_lock:
            for _, parameter in trained:
                before = _wrapped.get(parameter)
                old = None if before is None else before()
                if old is not None:
                    old._release()
                self._hooks.append(parameter.register_post_accumulate_grad_hook(ready))  # type: ignore[no-untyped-call]
                _wrapped[parameter] = weakref.ref(self)

    @property
    def listens(self) -> bool:
        """Whether this optimizer exchanges the gradients of its parameters; a newer one for them may have taken over."""
        return bool(self._hooks)

    def _release(self) -> None:
        """Another optimizer has taken over the parameters: listen to their gradients no more."""
        _remove(self._hooks)
        self._submitted = 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise CompressionError("a distributed optimizer cannot be copied: its hooks and residuals belong to one model. Copy its state_dict().")

    # -- settings ----------------------------------------------------------------------------------------------------------------

    def _settings(self, bucket: Bucket) -> GroupSettings:
        settings = GroupSettings.of(self.param_groups[bucket.group], self.compression.loss_scale)
        return replace(settings, lr=settings.lr * self._transport.size) if self._sum else settings  # what the mean is multiplied by

    def _check_optimizer(self) -> None:
        """What the optimizer would do beyond the method, or a second time, is an error, not silently different."""
        method = self.compression.method.feedback
        if self._updates:
            check_plain_sgd(self.compression.method, type(self._inner).step, type(self._inner).__name__)
        if self._updates and self._sum:
            raise CompressionError(f"{method} averages updates; summing gradients (op=Sum) is not defined for it.")
        for g, group in enumerate(self.param_groups):
            method.check_group(group, f"param group {g}")

    # -- hooks -------------------------------------------------------------------------------------------------------------------

    def _reset_counts(self) -> None:
        self._passes_left = {id(p): self._passes for _, p in self._aggregator.named}
        self._waiting_for = {id(b): len(b.parameters) for b in self._aggregator.buckets}

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From now on gradients of so many backward passes are summed before the exchange. All ranks call it at the same step, and between steps."""
        _check_passes(passes)
        self._check_no_gradients("set_backward_passes_per_step()")
        self._passes = passes
        self._aggregator.also_agree_on(backward_passes_per_step=passes)
        self._reset_counts()

    def _begun(self) -> bool:
        """Gradients of a step have come that was not exchanged yet."""
        return self._submitted > 0 or any(left < self._passes for left in self._passes_left.values())

    def _check_no_gradients(self, what: str) -> None:
        if self._begun():
            raise CompressionError(f"{what}: gradients of this step are under way; call it after step().")

    def _gradient_ready(self, parameter: torch.Tensor) -> None:
        self._results = None  # synchronised, but never stepped: a GradScaler found an overflow
        left = self._passes_left[id(parameter)] = self._passes_left[id(parameter)] - 1
        if left < 0:
            name = next(n for n, p in self._aggregator.named if p is parameter)
            raise SequenceError(
                f"parameter '{name}' got gradients from more than backward_passes_per_step={self._passes} backward passes before step(); "
                "raise backward_passes_per_step to accumulate locally."
            )
        self._aggregator.begin_step()
        if left == 0:
            self._waiting_for[id(self._bucket_of[id(parameter)])] -= 1
            self._watch_backward()
            if self._overlap:
                self._submit_ready()

    def _watch_backward(self) -> None:
        """Tell the observer of this backward pass, from its first complete gradient to its end."""
        if self._observer is not None and not self._backward_watched:
            self._backward_watched = True
            begin = time.perf_counter()

            def ended() -> None:
                self._backward_watched = False
                if self._observer is not None:
                    self._observer("backward", "BACKWARD", begin, time.perf_counter())

            torch.autograd.Variable._execution_engine.queue_callback(ended)  # as torch's own DDP does

    def _submit_ready(self, everything: bool = False) -> None:
        """Hand over the next buckets that are complete: in order, because every rank must start the same collectives in the same order."""
        buckets = self._aggregator.buckets
        while self._submitted < len(buckets):
            bucket = buckets[self._submitted]
            if not everything and self._waiting_for[id(bucket)] > 0:
                return
            gradients = [self._gradient(p) for p in bucket.parameters]
            noted = [_Noted(p, p.grad, p.grad._version) for p in bucket.parameters if p.grad is not None]
            self._in_flight += noted
            self._submitted += 1
            self._executor.submit(partial(self._start, bucket, gradients, noted, _events(gradients) if self._executor.concurrent else []))

    def _start(self, bucket: Bucket, gradients: list[torch.Tensor], noted: list[_Noted], events: list[Any]) -> None:
        """Compress a bucket and start to send it. In a thread, then finish the one before: the order in which collectives start must not be a
        matter of timing, and with one on its way and one being finished both the link and the processor are busy."""
        for event in events:
            event.synchronize()
        if not self._started and self._opening is None:
            self._open()
        begin = time.perf_counter()
        untouched = [n for n in noted if n.gradient._version == n.version] if self.compression.loss_scale != 1.0 else []
        self._started.append(self._aggregator.start(bucket, gradients, self._transport))
        for n in untouched:  # unscaled in place
            n.version = n.gradient._version
        self._sent_at[id(bucket)] = time.perf_counter()
        if self._observer is not None:
            self._observer(bucket.name, "COMPRESS", begin, self._sent_at[id(bucket)])
        if self._executor.concurrent and len(self._started) > 1:
            self._agree()
            self._finish([self._started[-2]])

    def _open(self, joined_at: int = _TRAINS) -> Comparison:
        """Begin a step together with the other workers. They are told what those that have joined (at which step) need to know."""
        joined = joined_at < _TRAINS
        self._aggregator.use(self._transport, joined)
        told = [n for g, key in self._numbered for n in _numbers(self.param_groups[g][key])]
        scaler = self._scaler_state()
        note = struct.pack(f"<q{len(told) + 2}d", joined_at, scaler.get("scale", 0.0), scaler.get("_growth_tracker", 0), *told)
        self._opening = self._aggregator.compare(self._transport, note, joined, outside=joined_at == _OUTSIDE)
        return self._opening

    def _agree(self) -> None:
        """Nothing that was received is used before ranks are known to agree."""
        opening, self._opening = self._opening, None
        if opening is not None:
            self._aggregator.settle()
            opening.settle()

    def _finish(self, started: list[Reduction | None]) -> None:
        reductions = [r for r in started if r is not None]
        if self._executor.concurrent:
            for reduction in reductions:
                while not reduction.finished:
                    if reduction.pending is not None:
                        _wait_patiently(reduction.pending)
                    reduction.advance()
        else:
            drive(reductions)
        if self._observer is not None:
            now = time.perf_counter()
            for reduction in reductions:
                self._observer(reduction.bucket.name, "COMMUNICATE", self._sent_at[id(reduction.bucket)], now)

    def _finish_all(self) -> None:
        self._agree()
        self._finish(self._started[-1:] if self._executor.concurrent else self._started)
        for reduction in self._started:
            if reduction is not None and reduction.out is not None and reduction.out.is_cuda and self._executor.concurrent:
                torch.cuda.current_stream(reduction.out.device).synchronize()  # the caller's stream knows nothing of this thread's

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.grad is None:  # not used in this step on this rank; others may have used it
            return torch.zeros_like(parameter)
        if not parameter.grad.is_sparse:
            return parameter.grad
        parameter.grad = parameter.grad.coalesce()  # as a GradScaler would do later, for half precision
        return parameter.grad.to_dense()

    # -- step --------------------------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Finish the exchange. Methods that leave the update to the optimizer then hold the mean in `p.grad`; all do NaN when the step was undone.

        Called twice, it warns, and exchanges nothing again.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and id(p) not in self._bound_ids:
                    raise CompressionError(
                        f"a parameter of shape {tuple(p.shape)} takes part in training but was frozen or absent when this optimizer was "
                        "made, so ranks would drift apart; "
                        "make a new DistributedOptimizer after unfreezing or adding parameters, or wrap while all is trainable and freeze then."
                    )
        if self._results is not None:
            warnings.warn(
                "this step's gradients were exchanged by optimizer.synchronize() already, and are not exchanged again. Call optimizer.step() inside "
                "`with optimizer.skip_synchronize():` after it.",
                UserWarning,
                stacklevel=3,
            )
            return
        self._submit_ready(everything=True)
        self._executor.drain()
        self._check_untouched()
        self._submitted = 0
        self._reset_counts()
        self._executor.submit(self._finish_all)
        self._executor.drain()
        started, self._started = self._started, []
        reductions = [r for r in started if r is not None]
        self._stands = self._aggregator.finish_step(reductions)
        self._results = reductions
        # A step that nobody sent anything in must not move the model by the optimizer's momentum and weight decay either.
        self._silent = self._stands and bool(reductions) and all(r.task.skipped for r in reductions)
        if self._updates:
            if not self._stands:
                for p in self._bound_parameters():
                    p.grad = torch.full_like(p, float("nan"))  # what a GradScaler on any rank must see
            return
        for bucket, reduction in zip(self._aggregator.buckets, started, strict=True):
            if reduction is None:  # learning rate 0
                for p in bucket.parameters:
                    p.grad = self._as_the_optimizer_expects(torch.zeros_like(p))
                continue
            assert reduction.out is not None
            if reduction.task.skipped and not self._silent:
                for p in bucket.parameters:
                    p.grad = None  # the optimizer leaves these alone
                continue
            if self._sum:
                reduction.out.mul_(self._transport.size)
            for p, mean in zip(bucket.parameters, bucket.segments.shaped_views(reduction.out), strict=True):
                # Frozen since: what is left of it in the residual must not move it.
                p.grad = None if not p.requires_grad else self._as_the_optimizer_expects(mean if mean.dtype == p.dtype else mean.to(p.dtype))

    def _as_the_optimizer_expects(self, mean: torch.Tensor) -> torch.Tensor:
        """For SparseAdam the rows that are not zero. Alike on all workers: dense and sparse steps round differently."""
        if not isinstance(self._inner, torch.optim.SparseAdam) or mean.dim() == 0:
            return mean
        rows = mean.unsqueeze(-1).flatten(1).ne(0).any(1).nonzero().view(1, -1)
        return torch.sparse_coo_tensor(rows, mean[rows[0]], mean.shape, is_coalesced=True, check_invariants=False)

    def _bound_parameters(self) -> list[torch.nn.Parameter]:
        return [p for _, p in self._aggregator.named]

    def _check_untouched(self) -> None:
        """Gradients clipped or scaled after their exchange had started would be ignored without a word."""
        in_flight, self._in_flight = self._in_flight, []
        for noted in in_flight:
            if noted.parameter.grad is not noted.gradient or noted.gradient._version != noted.version:
                name = next(n for n, p in self._aggregator.named if p is noted.parameter)
                raise CompressionError(
                    f"the gradient of parameter '{name}' was changed after its exchange had started in the backward pass. Change gradients "
                    "(clipping, scaler.unscale_) after optimizer.synchronize(), then step inside `with optimizer.skip_synchronize():`. If it was a "
                    "second backward pass, raise backward_passes_per_step."
                )

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`optimizer.synchronize(); clip…; with optimizer.skip_synchronize(): optimizer.step()`."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchange (unless skipped) and update. A step in which any rank held an inf or NaN is undone on all and not applied.

        `closure` is evaluated once, before the exchange; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale: torch.Tensor | None = getattr(self, "grad_scale", None)  # set by GradScaler.step unless gradients are unscaled already
        found: torch.Tensor | None = getattr(self, "found_inf", None)
        if self._should_synchronize:
            if found is not None and scale is None:
                raise CompressionError(
                    "scaler.unscale_(optimizer) was called after the gradients' exchange had started in the backward pass, and changes nothing that "
                    "was sent. Call optimizer.synchronize() before it, and scaler.step(optimizer) inside `with optimizer.skip_synchronize():`."
                )
            self.synchronize()
        elif self._results is None:
            raise CompressionError("step() inside skip_synchronize() needs optimizer.synchronize() before it.")
        results, self._results = self._results, None
        assert results is not None
        if found is not None:
            self._meet_scaler(scale)
        if scale is not None:
            self._unscale(scale)
        if not self._stands or (found is not None and bool(found)):
            return loss
        self._check_optimizer()
        if self._updates:
            self._aggregator.apply_updates(results)
        elif not self._silent:
            if found is not None:  # an optimizer that unscales by itself (fused) must not do it again
                self.grad_scale = self.found_inf = None
            super().step()
        self._inner._opt_called = True  # type: ignore[attr-defined]  # what such a scheduler looks at before it warns
        return loss

    def _meet_scaler(self, scale: torch.Tensor | None) -> None:
        """In GradScaler.step, which gives its scale where gradients are scaled still. Without state the scale of a step is that step's matter
        alone, so a scaler that is not attached may be now; with state it is too late."""
        attached, caller = self.compression.scaler, _calling_scaler()
        known = attached is not None and (caller is None or caller is attached or not hasattr(attached, "_check_inf_per_device"))
        if not known or (scale is not None and float(scale) != self.compression.loss_scale):
            if caller is None or self._aggregator.method.stateful:
                raise CompressionError(
                    "scaler.step(optimizer): this GradScaler is not attached, so what the method keeps would be in units of its scale; call "
                    "optimizer.compression.attach(optimizer, scaler) before the first backward pass."
                )
            self.compression.scaler = caller
        if caller is not None and not (looked := caller._per_optimizer_states[id(self)]["found_inf_per_device"]):
            device = self._bound_parameters()[0].device
            looked[device] = torch.zeros((), device=device)  # a worker without gradients: update() asks that somebody looked

    def _unscale(self, scale: torch.Tensor) -> None:
        """After the exchange in GradScaler.step: tell the scaler of an overflow on any rank, so that all lower the scale; else unscale the mean."""
        if not self._stands:
            self.compression.scaler._check_inf_per_device(self)  # as GradScaler asks of optimizers that handle its scale
        elif not self._updates:
            self._multiply_gradients(1 / float(scale))

    def _multiply_gradients(self, factor: float) -> None:
        torch._foreach_mul_([p.grad for p in self._bound_parameters() if p.grad is not None] or [torch.empty(0)], factor)

    # -- workers without data ----------------------------------------------------------------------------------------------------

    def join(self, give_up: Callable[[], bool] = _never) -> int:
        """For a worker that has no more batches: take part in the others' steps until all workers have called this; how many steps that were.

        These are whole steps, with gradients of zero (the mean still divides by all workers) and with the hyper-parameters and loss scale of those
        that train: what is left in the residual goes on being sent, and the mean is applied here too. In the end every worker gets the parameters,
        optimizer state, hyper-parameters and loss scale of the last one to join, so what its script did around the steps (clipping, averaging
        weights) is there as well, and nothing need be broadcast. Schedulers and the model's buffers stay each worker's own: a scheduler that is
        stepped by batch must be brought to the last worker's state. Steps without an exchange (local steps) are taken alone. Collective. `give_up`
        is asked while this waits, and True ends it; then the optimizer is of no more use.

        Raises `CompressionError` between a backward pass and `step()`, and inside `compression.at(…)`; on every worker, in the end, when the
        GradScaler of some is not known, as they neither attached it nor took a step with it; and whatever a step raises.
        """
        self.check_join()
        self._results = None
        joined_at, steps = self._aggregator.step, 0
        while True:
            while self._aggregator.local:
                self._stand_in(self.compression.loss_scale)
                steps += 1
            opening = self._open(joined_at)
            if not _wait_patiently(opening, give_up):
                return steps
            said = [struct.unpack(f"<q{len(note) // 8 - 1}d", note) for note in opening.notes()]
            latest = max(said, key=lambda told: told[0])
            if latest[0] == _OUTSIDE:  # no step: what the others wanted to do together cannot be done without this worker, as they see
                self._agree()
                continue
            if said.index(latest) != self._transport.rank:
                self._follow(*latest[1:])
            if latest[0] < _TRAINS:  # nobody begins this step
                self._agree()
                break
            self._stand_in(latest[1] or 1.0)
            steps += 1
        for p in self._bound_parameters():
            p.grad = None
        if any(told[0] != latest[0] for told in said):
            self._take_over(said.index(latest))
        unknown = [r for r, told in enumerate(said) if not told[1]]
        if unknown and latest[1]:  # without this error they would go on with a scale of their own
            raise CompressionError(
                f"join(): the others' loss scale is {latest[1]:g}, and workers {', '.join(map(str, unknown))} (by rank), which took no step with "
                "their GradScaler before, cannot be given it; call optimizer.compression.attach(optimizer, scaler) on every rank at first."
            )
        return steps

    def check_join(self) -> None:
        """Raise `CompressionError` where `join` is not possible now."""
        self._check_no_gradients("join()")
        if self._aggregator.held:
            raise CompressionError("join(): leave `with compression.at(…):` first.")

    def _check_nobody_joined(self, what: str) -> None:
        opening = self._open(_OUTSIDE)
        self._agree()
        joined = [r for r, note in enumerate(opening.notes()) if struct.unpack_from("<q", note)[0] < _TRAINS]
        if joined:
            raise CompressionError(
                f"{what} needs all workers, and {', '.join(map(str, joined))} (by rank) joined: they have no more batches. Do it after join()."
            )

    def _take_over(self, root: int) -> None:
        """Parameters (at x), what the method keeps alike on all workers, and the optimizer's state, from worker `root`. Collective."""
        # By name: an optimizer's own order of its parameters need not be that of the others.
        mine, params = self._transport.rank == root, {self._names[id(p)]: p for group in self.param_groups for p in group["params"]}
        with self._aggregator.at("averaged"), torch.no_grad():
            self._broadcast([*self._bound_parameters(), *self._aggregator.shared_state()], root)
        names = [name for name, p in params.items() if p in self.state]
        held: dict[str, torch.Tensor] = {}
        said: Any = None
        if mine:
            try:
                tree = encode({str(i): dict(self.state[params[name]]) for i, name in enumerate(names)}, "", held)
                layout = [(where, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type == "cpu") for where, t in held.items()]
                said = [names, tree, layout]
            except CheckpointError as error:
                said = str(error)
        packed = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        said = json.loads(self._transport.allgather(packed, "join.state").wait()[root].numpy().tobytes())
        if isinstance(said, str):
            raise CompressionError(f"join(): the optimizer's state cannot be given to the workers that joined earlier; {said}")
        names, tree, layout = said
        if not mine:
            for where, dtype, shape, on_cpu in layout:
                device = torch.device("cpu") if on_cpu else params[names[int(where.split("/")[0])]].device
                held[where] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        self._broadcast(list(held.values()), root)
        if not mine:
            for p in params.values():
                self.state.pop(p, None)
            self.state.update({params[names[int(i)]]: state for i, state in decode(tree, held.__getitem__).items()})

    def _broadcast(self, tensors: Sequence[torch.Tensor], root: int) -> None:
        """Into these, which may have any layout of their elements."""
        flat = [t.detach().contiguous() for t in tensors]
        for handle in [self._transport.broadcast_(f, root, f"join.{i}") for i, f in enumerate(flat)]:
            handle.wait()
        for t, f in zip(tensors, flat, strict=True):
            if f.data_ptr() != t.data_ptr():
                t.copy_(f)
            else:
                torch.autograd.graph.increment_version(t)  # a network may write behind torch's back

    def _scaler_state(self) -> dict[str, float]:
        """What GradScaler says of itself; less, of something else that was attached for one; nothing without one, or when it is disabled."""
        scaler = self.compression.scaler
        if scaler is None:
            return {}
        tell = getattr(scaler, "state_dict", None)
        return tell() if tell is not None else {"scale": self.compression.loss_scale}

    def _follow(self, scale: float, growth_tracker: float, *hyper_parameters: float) -> None:
        """Take over what another worker has told, so that the step it begins, or has ended, is the same one here."""
        told = iter(hyper_parameters)
        for g, key in self._numbered:
            self.param_groups[g][key] = _with_numbers(self.param_groups[g][key], told)
        scaler = self._scaler_state()
        if scale and "_growth_tracker" in scaler:
            self.compression.scaler.load_state_dict({**scaler, "scale": scale, "_growth_tracker": int(growth_tracker)})

    def _stand_in(self, scale: float) -> None:
        """A step of a worker without data. `scale`: by which the others multiply their losses."""
        for p in self._bound_parameters():
            p.grad = None
        self.synchronize()
        if self._stands and not self._updates and scale != 1.0:  # there is no GradScaler.step to do it
            self._multiply_gradients(1 / scale)
        with self.skip_synchronize():
            self.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's. Raises `SequenceError` between a backward pass, of several the first, and `step()`."""
        if self._begun():
            raise SequenceError(
                "zero_grad() was called after a backward pass and before step() or synchronize(): gradients on their way would be lost. "
                "Call it after step(). (After an exception in the backward pass, make a new DistributedOptimizer.)"
            )
        self._results = None
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        """As the optimizer's; the optimizer that was wrapped, and schedulers made for it, stay in step. Between steps only."""
        self._aggregator.check_between_steps("the optimizer's state was loaded")
        super().load_state_dict(state_dict)
        self._inner.param_groups, self._inner.state = self.param_groups, self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after wrapping: buckets are fixed. Raises `CompressionError`."""
        if "_aggregator" in self.__dict__:
            raise CompressionError(
                "add_param_group(): parameters cannot be added to a distributed optimizer. Give it all of them before wrapping, and freeze those "
                "that are not needed yet; or bind and wrap again, and load the old compression's state_dict() into the new one."
            )
        super().add_param_group(param_group)
