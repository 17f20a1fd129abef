"""How one waits for an unmodified Horovod. Its own `synchronize` asks again and again, and takes a core that Horovod's thread needs, or the backward
pass of another rank."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from typing import Any

import torch

from ..transport.patience import Patience

__all__ = ["let_synchronize_sleep", "sleep_until_done"]


def sleep_until_done(hvd: Any, handle: int) -> None:
    """Before `hvd.synchronize(handle)`: return when that will not wait, having looked now and then.

    At once where Horovod uses MPI: there its thread looks all the time, too, and beside it who sleeps is woken late (docs/decisions.md).
    """
    if not hvd.gloo_enabled():
        return
    patience = Patience()
    while not hvd.poll(handle):
        time.sleep(patience.pause())


def let_synchronize_sleep(optimizer: torch.optim.Optimizer) -> None:
    """From now on `optimizer.synchronize()`, which `step()` calls too, sleeps until its all-reduces are done. Nothing where it does so already.

    `optimizer`: of Horovod's DistributedOptimizer, whose class was made for it alone. Where some all-reduces have not been started, as that of a
    parameter which the backward pass did not reach, other ranks may wait for these, and Horovod does as it always does.
    """
    cls: Any = type(optimizer)
    synchronize = vars(cls).get("synchronize")
    if synchronize is None or hasattr(synchronize, "__wrapped__"):
        return

    @functools.wraps(synchronize)
    def sleeping(self: Any) -> Any:
        started = {key: handle for key, (handle, _) in self._handles.items() if isinstance(handle, int)}
        reached = {parameter for key in started for parameter in (key if isinstance(key, tuple) else (key,))}
        if len(started) == len(self._handles) and self._requires_update <= reached:
            with contextlib.suppress(ValueError):  # a handle that was synchronised in an exchange that an error has ended: told below
                for handle in started.values():
                    sleep_until_done(sys.modules["horovod.torch"], handle)
        return synchronize(self)

    cls.synchronize = sleeping
