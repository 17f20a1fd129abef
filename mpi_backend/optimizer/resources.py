"""What the optimizers of this process hold: a transport and a thread each; in the order in which all ranks make them."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import TYPE_CHECKING, Any

from .. import runtime
from ..process_sets import ProcessSet
from .background import Background

if TYPE_CHECKING:
    from ..transport import MPITransport

__all__ = ["add_optimizer", "close_backgrounds", "close_transports", "new_background", "new_transport", "optimizers", "tell_dropped"]

_transports: list[MPITransport] = []
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_backgrounds: list[Background] = []


def new_background() -> Background | None:
    """A thread for one optimizer, closed by `shutdown`; None where MPI may not be called from it."""
    if not runtime.context().engine.threaded:
        return None
    _backgrounds.append(Background(f"mpi_backend optimizer {len(_backgrounds)}"))
    return _backgrounds[-1]


def add_optimizer(optimizer: Any, transport: Any) -> int:
    """Note a DistributedOptimizer, for `join`, and for what is said of its transport; all ranks note theirs in the same order. Its number."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    transport.user = weakref.ref(optimizer)
    return number


def tell_dropped(waits: bool) -> None:
    """While this rank waits in `join`, those who step an optimizer that it has dropped wait for it in vain: they are told."""
    if (watchdog := runtime.watchdog()) is not None:
        watchdog.tell_dropped([transport for transport in _transports if waits and transport.user() is None])


def optimizers() -> dict[int, Any]:
    """Those in use, by number. One that only a cycle of references keeps is not, and another rank may have let it go already."""
    gc.collect()
    return {number: optimizer for number, optimizer in sorted(_optimizers.items()) if optimizer.listens}


def new_transport(process_set: ProcessSet | None = None) -> MPITransport:
    """A transport of its own for one optimizer, so that two of them need not start their exchanges in the same order on all ranks.

    Collective over the process set (default: all); every rank makes its optimizers in the same order. Closed by `shutdown`. Raises ValueError
    before init(), and outside of the process set.
    """
    from ..transport import MPITransport

    everybody = runtime.context().process_sets[0]
    users = everybody if process_set is None else runtime.members(process_set)
    runtime.agree("DistributedOptimizer being made", users)  # without it a rank that has joined, or makes none, would be waited for in silence
    made = MPITransport(users.comm)
    _transports.append(made)
    if (watchdog := runtime.watchdog()) is not None:
        watchdog.watch(made, users.ranks)
    return made


def close_backgrounds() -> None:
    """End the threads, after what they have been given."""
    for background in _backgrounds:
        background.close()
    _backgrounds.clear()


def close_transports() -> None:
    """Complete what is in flight, and give the communicators back; collective."""
    for made in _transports:
        made.close()
    _transports.clear()
    _optimizers.clear()
