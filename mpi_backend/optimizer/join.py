"""Going on without data: what this rank does in the steps of the others."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from hvd_ecsgd.optimizer import driver_of
from hvd_ecsgd.transport.devices import current_device, use_device

from .. import runtime
from ..errors import HorovodInternalError
from ..process_sets import global_process_set
from ..tracing import untraced
from . import resources

if TYPE_CHECKING:
    from ..engine.pending import Pending

__all__ = ["join"]

_TELL_DROPPED = 1.0
"""Seconds of waiting in `join` after which others are told what they wait for in vain: mostly all ranks join together."""


@untraced
def join(device: int = -1) -> int:
    """Say that this rank has no more data, and wait until all ranks have said so; returns the rank that did last.

    Meanwhile this rank contributes zeros to the all-reduces (Average, which still divides by the size, and Sum) that the others submit; other
    collectives fail. It takes part in the steps of their DistributedOptimizers with gradients of zero, and gets their parameters, optimizer state
    and hyper-parameters in the end (see `join` of `hvd_ecsgd.DistributedOptimizer`'s result): unlike with Horovod nothing need be broadcast, but
    for buffers (batch-norm statistics) and schedulers that step by batch: `broadcast_object(scheduler.state_dict(), root_rank=last)`. What
    needs all ranks fails while some have joined: SyncBatchNorm, new optimizers, checkpoints, `compression.switch`.
    `device`: accepted as Horovod's; the zeros are made on the CPU.

    Raises `HorovodInternalError` when a rank leaves without joining, or when ranks hold different optimizers; `CompressionError` between a backward
    pass and its `step()`, and on every rank when one that took no step has not attached the GradScaler that the others use. Where others step an
    optimizer that this rank has dropped (`del`), which they would wait for in vain, the job ends on all ranks, and that optimizer is named. Without
    MPI_THREAD_MULTIPLE optimizers do not go on without a rank, and a warning says so.
    """
    runtime.refuse_if_it_shrinks("join()")
    here, optimizers = runtime.context(), resources.optimizers()
    for optimizer in optimizers.values():
        driver_of(optimizer).check_join()  # before the others hear of it
    joining = runtime.channel(global_process_set).join()
    if here.size > 1 and here.engine.threaded:
        return _join_steps(joining, optimizers)
    if here.size > 1 and optimizers:
        warnings.warn(
            "join(): without MPI_THREAD_MULTIPLE a DistributedOptimizer of mpi_backend waits for all ranks in every step; join only after equal "
            "numbers of steps on all ranks (drop the last batches, or repeat some).",
            RuntimeWarning,
            stacklevel=2,
        )
    return joining.wait()


def _join_steps(joining: Pending[int], optimizers: Mapping[int, Any]) -> int:
    """Wait, and take part in the steps of all optimizers: in a thread for each, as the others may step them in any order, and at once."""
    given_up, told_at = threading.Event(), time.monotonic() + _TELL_DROPPED
    pool = ThreadPoolExecutor(max(1, len(optimizers)), "join", use_device, (current_device(),))
    try:
        parts = [pool.submit(optimizer.join, given_up.is_set) for optimizer in optimizers.values()]
        while not joining.done() and not any(part.done() and part.exception() for part in parts):
            time.sleep(1e-3)
            if time.monotonic() > told_at:
                told_at = math.inf
                resources.tell_dropped(True)
        for part in parts:
            if part.done():
                part.result()  # raises what it raised
        last = joining.wait()
        # Everybody is here now. An optimizer that lives on some ranks only would be waited for in vain.
        everyones = runtime.agree("join", extra=sorted(optimizers), name="join.values")
        if any(held != everyones[0] for held in everyones):
            raise HorovodInternalError(
                "join: ranks hold different DistributedOptimizers; make and drop each of them on all ranks. In the order in which they were made, "
                f"by rank: {', '.join(map(str, everyones))}."
            )
        for part in parts:
            part.result()
        return last
    except BaseException:
        for optimizer in optimizers.values():
            if hasattr(transport := driver_of(optimizer).step.transport, "abandon"):
                transport.abandon()  # others may never take part in what was begun
        raise
    finally:
        given_up.set()
        pool.shutdown(wait=False)
        if told_at == math.inf:
            resources.tell_dropped(False)
