"""The optimizer that a script holds: of its own optimizer's class, with what the exchange of gradients changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch

from ..compression import AnyCompression, Compression, bind
from ..core.bound import BoundCompression
from ..errors import CompressionError
from ..transport import Transport
from ..transport.base import check_transport
from ..transport.self_ import alone
from .driver import OptimizerDriver
from .executor import Executor, Inline, Observer, never
from .hooks import check_passes
from .join import join
from .own_class import OwnClass, copy_attributes
from .recovery import Recovery

__all__ = ["DistributedOptimizer", "driver_of", "matched"]

BUCKET_BYTES = 25 * 2**20
_DRIVER = "_hvd_ecsgd_driver"
"""The one attribute that a wrapped optimizer carries beside its own."""
_PUBLIC = ("synchronize", "skip_synchronize", "discard", "set_backward_passes_per_step", "join")
"""Horovod's names, which are ours also where the optimizer's own class has them."""
_NO_COPY = (
    "a distributed optimizer cannot be {}: its hooks, buckets and residuals belong to one model and one group of workers. Take its state_dict(), and "
    "compression.state_dict(); or make the optimizer anew, in the process that trains."
)


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
    recovery: Recovery | None = None,
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
    backward pass waits while they compress. All ranks must choose alike. `observer` is told what happens when, for a trace. `recovery`: of a job that
    outlives workers that die; it costs a copy of the state in each step, and a small collective.

    Attributes beside the optimizer's: `synchronize()`, `skip_synchronize()`, `join()`, `set_backward_passes_per_step()`, as Horovod's, and
    `discard()`, which hide what the optimizer's own class has under these names (a warning says so); and `compression` (the bound object), unless
    that has one. All other methods and attributes are the class's own, as they are without this.
    Raises `CompressionError` for parameters without a name, duplicate names, or a method that cannot work with this optimizer;
    at the first step `DisagreementError`, on every rank, when ranks hold different settings or parameters.
    """
    transport = alone("DistributedOptimizer()") if transport is None else transport
    check_transport(transport, "DistributedOptimizer()")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CompressionError(f"DistributedOptimizer(): expected a torch.optim optimizer, got {optimizer!r:.100}.")
    if isinstance(optimizer, _Distributed):
        raise CompressionError("DistributedOptimizer(): the optimizer is distributed already.")
    check_passes(backward_passes_per_step)
    own = type(optimizer)
    own_class = OwnClass(own)
    own_class.check_evaluates_once()
    if hidden := [name for name in _PUBLIC if hasattr(own, name)]:
        warnings.warn(
            f"DistributedOptimizer(): {own.__name__} has {', '.join(hidden)} of its own, which cannot be reached through the distributed optimizer: "
            "these names are those of Horovod's.",
            UserWarning,
            stacklevel=2,
        )
    bound, trained, names = matched(optimizer, named_parameters, compression)
    cls: Any = type(own.__name__, (_Distributed, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})
    wrapped: _Distributed = object.__new__(cls)
    copy_attributes(optimizer, wrapped)
    wrapped.__dict__[_DRIVER] = OptimizerDriver(
        wrapped,
        optimizer,
        own_class,
        bound,
        trained,
        names,
        transport,
        passes=backward_passes_per_step,
        bucket_bytes=bucket_bytes,
        sum_gradients=sum_gradients,
        overlap=overlap,
        executor=Inline() if executor is None else executor,
        observer=observer,
        recovery=recovery,
    )
    return wrapped


def driver_of(optimizer: Any) -> OptimizerDriver:
    """What stands behind an optimizer that `DistributedOptimizer` returned."""
    driver: OptimizerDriver = optimizer.__dict__[_DRIVER]
    return driver


def _update(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    return driver_of(optimizer).update(args, kwargs)


_hooked_update = torch.optim.Optimizer.profile_hook_step(_update)
"""The same within step hooks and the profiler's range, as torch has them around every optimizer's `step`."""


class _Distributed(torch.optim.Optimizer):
    """Mixin in front of the optimizer's own class: what a script calls, and nothing else, so that the names of that class are its own."""

    _step_supports_amp_scaling = True
    """`GradScaler.step` then calls our `step` on every rank, also where it found an overflow, and leaves unscaling to it."""

    def __getattr__(self, name: str) -> Any:
        """What a script may ask for where the optimizer's own class has nothing of that name."""
        if name == "compression" and _DRIVER in self.__dict__:
            return driver_of(self).compression
        if name == "_parameter_names" and _DRIVER in self.__dict__:  # of Horovod's optimizers; scripts read it
            return {p: n for n, p in driver_of(self).compression.named}
        above = getattr(super(), "__getattr__", None)
        if above is not None:
            return above(name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __deepcopy__(self, memo: Any) -> NoReturn:  # the optimizer's own class may have one, and one of the next
        raise CompressionError(_NO_COPY.format("copied"))

    def __copy__(self) -> NoReturn:
        raise CompressionError(_NO_COPY.format("copied"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CompressionError(_NO_COPY.format("pickled"))

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Exchange (unless skipped) and update. A step in which any rank held an inf or NaN is undone on all and not applied.

        Takes the arguments of the optimizer's own `step`, and returns what that returns. A closure is evaluated once, before the exchange.
        Step hooks run once in every call, also of a step that is undone: after the exchange, so they see (and may clip) the mean, but around
        a closure.
        """
        driver = driver_of(self)
        driver.before_step(args, kwargs)
        return (_hooked_update if driver.own_class.hooked else _update)(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # torch would put step hooks around this one too

    def synchronize(self) -> None:
        """Finish the exchange. Methods that leave the update to the optimizer then hold the mean in `p.grad`; all do NaN when the step was undone.

        Called twice, it warns, and exchanges nothing again. Raises `CompressionError` when gradients were changed since their backward pass, and
        `SequenceError` when they are those of the step before and the method keeps something of gradients.
        """
        driver_of(self).synchronize()

    def discard(self) -> None:
        """Throw this step's gradients away instead of `step()`: undone on all ranks as one with an inf, and counted so; `p.grad` becomes None.

        After `synchronize()`, or in its place: then the exchange is finished first, as other ranks may have begun it. Collective. State is as it was
        before the step, to rounding, with `exact=True` in the preset bit for bit. Raises `CompressionError` where some workers have joined.
        """
        driver_of(self).discard()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """`optimizer.synchronize(); clip…; with optimizer.skip_synchronize(): optimizer.step()`."""
        return driver_of(self).skip_synchronize()

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From now on gradients of so many backward passes are summed before the exchange. All ranks call it at the same step, and between steps."""
        check_passes(passes)
        driver_of(self).set_backward_passes_per_step(passes)

    def join(self, give_up: Callable[[], bool] = never) -> int:
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
        return join(driver_of(self), give_up)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the optimizer's; `set_to_none` is ignored where that does not take it.

        Raises `SequenceError` between a backward pass, of several the first, and `step()`; see `discard`.
        """
        driver = driver_of(self)
        driver.check_zero_grad()
        args, kwargs = driver.own_class.zero_grad_arguments(self, args, kwargs)
        super().zero_grad(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As the optimizer's; the optimizer that was wrapped, and schedulers made for it, stay in step. Between steps only."""
        driver = driver_of(self)
        driver.step.aggregator.check_between_steps("the optimizer's state was loaded")
        super().load_state_dict(*args, **kwargs)
        for name in ("param_groups", "state"):  # where they are properties both optimizers have the same
            if name in self.__dict__:
                driver.inner.__dict__[name] = self.__dict__[name]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after wrapping: buckets are fixed. Raises `CompressionError`."""
        raise CompressionError(
            "add_param_group(): parameters cannot be added to a distributed optimizer. Give it all of them before wrapping, and freeze those "
            "that are not needed yet; or bind and wrap again, and load the old compression's state_dict() into the new one."
        )


def matched(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None, compression: AnyCompression
) -> tuple[BoundCompression, list[tuple[str, torch.nn.Parameter]], dict[int, str]]:
    """The compression, bound; the (name, parameter) pairs that it and the optimizer have in common; by id, the names of all that is optimised."""
    owned = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
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
        named = [(f"group{g}.{i}", p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    bound = bind(compression, named)
    trained = [(n, p) for n, p in bound.named if id(p) in owned]
    unnamed = set(owned) - {id(p) for _, p in named}
    if unnamed:
        g, i = min(owned[p] for p in unnamed)
        raise CompressionError(
            f"parameter {i} of param group {g} (shape {tuple(optimizer.param_groups[g]['params'][i].shape)}) has no name; pass "
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
    return bound, trained, {id(p): n for n, p in [*named, *bound.named] if id(p) in owned}
