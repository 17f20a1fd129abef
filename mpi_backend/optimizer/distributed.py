"""Horovod's DistributedOptimizer over MPI."""

from __future__ import annotations

import math
import numbers
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hvd_ecsgd import DistributedOptimizer as _DistributedOptimizer
from hvd_ecsgd.compression import AnyCompression, Compression
from hvd_ecsgd.optimizer import driver_of
from hvd_ecsgd.transport import SelfTransport, Transport

from .. import runtime
from ..collectives import Adasum, Average, Sum
from ..environment import switch
from ..process_sets import ProcessSet, global_process_set
from . import resources
from .announce import announced

if TYPE_CHECKING:
    from ..engine.engine import Engine

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: AnyCompression = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Wrap `optimizer` so that `step()` applies the mean (or sum) over all ranks of the gradients, compressed by `compression`.

    Takes Horovod's arguments in Horovod's order. `compression` may be bound or not; every method of this project
    works here, those in update units included, and so does a user's own class or object with Horovod's `compress` and `decompress`
    (`hvd_ecsgd.exchange.CompressedAllReduce`). `backward_passes_per_step`: gradients of so many backward passes are summed before the exchange.
    `gradient_predivide_factor`, `num_groups`, `groups` tune Horovod's fusion and order of scaling; buckets take their place, the mean is formed
    from unscaled numbers, and results do not depend on them: they are checked and have no further effect.
    Buckets are compressed and sent by a thread of the optimizer's own, while the backward pass goes on; without MPI_THREAD_MULTIPLE by the
    gradient hooks; with MPI_BACKEND_OVERLAP=0 not before `step()`. Sparse gradients travel as dense ones,
    compressed like them, where Horovod gathers their rows unless `sparse_as_dense`, which therefore changes nothing here; the optimizer is given
    the dense mean, SparseAdam a sparse one.
    `process_set`: who exchanges; all ranks of the job call this, and one outside of the set trains by itself.

    Raises ValueError for an `op` other than Average and Sum, and for other wrong arguments, NotImplementedError for Adasum; `CompressionError` (a
    ValueError) as `hvd_ecsgd.DistributedOptimizer` does.
    """
    if not isinstance(op, int):
        raise ValueError(f"DistributedOptimizer(): op must be Average or Sum, got {op!r:.100}.")
    if op == Adasum:
        raise NotImplementedError("DistributedOptimizer(): Adasum is not implemented; use op=Average, or Horovod itself.")
    if op not in (Average, Sum):
        raise ValueError(f"DistributedOptimizer(): op must be Average or Sum, got {op!r}.")
    factor = gradient_predivide_factor
    if not isinstance(factor, numbers.Real) or not 0 < float(factor) < math.inf:
        raise ValueError(f"DistributedOptimizer(): gradient_predivide_factor must be a positive number, got {factor!r}.")
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("DistributedOptimizer(): gradient_predivide_factor goes with op=Average.")
    if not isinstance(num_groups, int) or num_groups != 0:
        warnings.warn("DistributedOptimizer(): num_groups is deprecated; use groups.", DeprecationWarning, stacklevel=2)
    _check_groups(num_groups if groups is None else groups)
    runtime.members(process_set)
    if servers := runtime.context().job.servers:
        raise ValueError(
            f"DistributedOptimizer(): {servers} ranks of this job serve, which is for AsyncDistributedOptimizer; start it without them (--servers, "
            "MPI_BACKEND_SERVERS, init(servers=…))."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):  # before the others are waited for
        raise ValueError(f"DistributedOptimizer(): expected a torch.optim optimizer, got {optimizer!r:.100}.")
    if isinstance(named_parameters, Iterable):
        named_parameters = _each_once(named_parameters)
    transport: Transport = resources.new_transport(process_set) if process_set.included() else SelfTransport()
    background = resources.new_background(transport)
    distributed = _DistributedOptimizer(
        optimizer,
        named_parameters,
        compression,
        transport=transport,
        backward_passes_per_step=backward_passes_per_step,
        sum_gradients=op == Sum,
        overlap=switch("MPI_BACKEND_OVERLAP"),
        executor=background,
        observer=partial(_trace, runtime.context().engine, traced := _Traced()),
        recovery=runtime.context().recovery,
    )
    number = resources.add_optimizer(distributed, transport)
    traced.number, traced.optimizer = number, weakref.ref(distributed)
    if background is not None:
        weakref.finalize(distributed, background.close)
        if process_set.included():
            background.waits = partial(_step_announced, weakref.ref(distributed), number, process_set)
    return distributed


def _step_announced(optimizer: Callable[[], Any], number: int, process_set: ProcessSet) -> AbstractContextManager[Callable[[], None]]:
    step = driver_of(optimizer()).step
    if called := step.meeting.called:
        return announced(f"{called} of DistributedOptimizer {number}", f"{called} (call it on every rank)", process_set)
    names = [name for name, _ in step.aggregator.state.named]
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (f", … ({len(names)} parameters)" if len(names) > 3 else "")
    name = f"step {step.aggregator.state.step} of DistributedOptimizer {number}"
    return announced(name, f"{name}, the gradients of {shown}", process_set)


@dataclass
class _Traced:
    """Whose rows of the timeline these are."""

    number: int = 0
    optimizer: Callable[[], Any] = lambda: None


def _trace(engine: Engine, traced: _Traced, row: str, what: str, begin: float, end: float) -> None:
    if (timeline := engine.timeline) is None:  # the engine's it was made with: while that shuts down, buckets are still completed
        return
    optimizer = traced.optimizer()
    bucket = None if optimizer is None else next((b for b in driver_of(optimizer).state.buckets if b.name == row), None)
    about = {} if bucket is None else {"parameters": bucket.segments.names, "gradient bytes": bucket.segments.numel * bucket.segments.dtype.itemsize}
    timeline.span(f"optimizer {traced.number} {row}", what, begin, end, **about)


def _each_once(pairs: Iterable[Any]) -> list[Any]:
    """Without a tied parameter's further names, which Horovod overlooks (`model.state_dict(keep_vars=True)` lists them)."""
    names: dict[int, object] = {}
    kept = []
    for pair in pairs:
        if isinstance(pair, tuple) and len(pair) == 2 and names.setdefault(id(pair[1]), pair[0]) != pair[0]:
            continue
        kept.append(pair)
    return kept


def _check_groups(groups: int | Sequence[Sequence[torch.Tensor]]) -> None:
    if isinstance(groups, int) and groups >= 0:
        return
    if not isinstance(groups, list | tuple) or any(isinstance(group, torch.Tensor) or not isinstance(group, Iterable) for group in groups):
        raise ValueError(f"DistributedOptimizer(): groups must be a non-negative integer or lists of parameters, got {groups!r:.100}.")
    members = [p for group in groups for p in group]
    if not all(isinstance(p, torch.Tensor) for p in members):
        raise ValueError("DistributedOptimizer(): groups must consist of tensors.")
    if len({id(p) for p in members}) != len(members):
        raise ValueError("DistributedOptimizer(): a parameter can only appear once in groups.")
