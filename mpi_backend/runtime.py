"""The record of a job that runs: who this process is among how many, and the channels everything else uses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvd_ecsgd.optimizer.recovery import Recovery
from hvd_ecsgd.transport.base import Ready

from . import job_end
from .engine.negotiation import Request
from .process_sets import NOT_INITIALIZED, ProcessSet

# These import mpi4py.MPI, which initialises MPI: only init() may do that.
if TYPE_CHECKING:
    from mpi4py import MPI

    from .engine.channel import Channel
    from .engine.engine import Engine
    from .liveness.watchdog import Watchdog

__all__ = [
    "Context",
    "Job",
    "Members",
    "agree",
    "channel",
    "context",
    "install",
    "is_initialized",
    "members",
    "refuse_if_it_shrinks",
    "remove",
    "watchdog",
]


@dataclass(frozen=True)
class Members:
    """A process set: global ranks by rank within it, and, for its members, their communicator and the channel of their collectives."""

    ranks: tuple[int, ...]
    comm: MPI.Comm | None
    channel: Channel | None
    process_set: ProcessSet


@dataclass(frozen=True)
class Job:
    """All processes of the job, of which the last `servers` serve those before them, the workers."""

    comm: MPI.Intracomm
    rank: int
    size: int
    servers: int

    @property
    def workers(self) -> int:
        return self.size - self.servers

    @property
    def serves(self) -> bool:
        """Whether this process does."""
        return self.rank >= self.workers


@dataclass(frozen=True)
class Context:
    """What init() found out. The package's functions communicate through the engine's channels; optimizers have transports of their own.

    All but `job` is of those that train, or, on a rank that serves them, of those that serve."""

    job: Job
    comm: MPI.Intracomm
    engine: Engine
    watchdog: Watchdog
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    homogeneous: bool
    process_sets: dict[int, Members]
    """By id. 0 is everybody."""
    identifiers: Iterator[int]
    recovery: Recovery | None = None
    """Of a job that outlives its ranks."""


_context: Context | None = None


def install(running: Context) -> None:
    """Make it what `context` gives."""
    global _context
    _context = running
    ProcessSet.this_process = running.rank


def remove() -> Context | None:
    """Take it away again, and return it."""
    global _context
    removed, _context = _context, None
    ProcessSet.this_process = None
    return removed


def is_initialized() -> bool:
    """Whether init() has been called, and shutdown() not since."""
    return _context is not None


def context() -> Context:
    """The context. Raises ValueError before init()."""
    if _context is None:
        raise ValueError(NOT_INITIALIZED)
    return _context


def watchdog() -> Watchdog | None:
    """Who watches the other ranks; None before init()."""
    return None if _context is None else _context.watchdog


def members(process_set: ProcessSet) -> Members:
    """Who belongs to a process set. Raises ValueError for one that is not usable."""
    here = context()
    found = here.process_sets.get(getattr(process_set, "process_set_id", None) or 0)
    if found is None or getattr(process_set, "process_set_id", None) is None:
        raise ValueError(f"{process_set} is no usable process set; pass it to init(process_sets=[…]) or add_process_set first.")
    return found


def channel(process_set: ProcessSet) -> Channel:
    """The channel of its collectives. Raises ValueError for a set that is not usable, or that this process does not belong to, and in a process
    that was forked, which has no part in MPI."""
    found = members(process_set)
    _refuse_if_forked()
    if found.channel is None:
        raise ValueError(f"rank {context().rank} is not a member of the process set of ranks {list(found.ranks)}.")
    return found.channel


def agree(text: str, among: Members | None = None, extra: object = None, name: str | None = None) -> Sequence[Any]:
    """Everybody's `extra`, by rank, when every rank has called it, of all or of a process set; raise `MismatchError` on every rank when texts differ.

    Without a name it is matched with whatever unnamed collective the others call.
    """
    _refuse_if_forked()
    everybody = (context().process_sets[0] if among is None else among).channel
    assert everybody is not None
    request = Request(everybody.named(name, text), text, extra=extra)
    done: Sequence[Any] = everybody.submit(request, lambda extras: extras, start=lambda extras: Ready(extras)).wait()
    return done


def refuse_if_it_shrinks(what: str) -> None:
    """Raise ValueError where the job outlives its ranks, and what is called cannot go on without one."""
    if context().recovery is not None:
        raise ValueError(f"{what} cannot be had with MPI_BACKEND_ON_FAILURE=shrink, as it cannot go on without a rank; unset the variable.")


def _refuse_if_forked() -> None:
    if job_end.is_forked():
        raise ValueError(f"process {os.getpid()} was forked from rank {context().rank} and cannot communicate; only the rank itself can.")
