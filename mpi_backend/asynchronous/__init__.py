"""Training over MPI that does not wait for slow workers: ranks that serve workers at any pace, and steps that go on without who is late."""

from __future__ import annotations

from . import cutoff, optimizer
from .cutoff import CutoffDistributedOptimizer
from .optimizer import AsyncDistributedOptimizer, is_serving

__all__ = ["AsyncDistributedOptimizer", "CutoffDistributedOptimizer", "abandon", "close", "is_serving", "leave"]


def leave() -> None:
    """Tell the others that this worker will not come again, if it has not said so."""
    optimizer.leave()
    cutoff.leave()


def abandon() -> None:
    """Ranks have died: communicators stay, as MPI may hold what was sent there."""
    optimizer.abandon()


def close() -> None:
    """Give the communicators back. Collective over the job."""
    optimizer.close()
    cutoff.close()
