"""The record of a job made of communicators: by init(), and again where ranks are gone that the job outlives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mpi4py import MPI

from hvd_ecsgd.optimizer.recovery import Recovery

from .engine.engine import Engine, threads_available
from .engine.negotiation import StallCheck
from .liveness.watchdog import Settings, Watchdog
from .process_sets import global_process_set
from .runtime import Context, Job, Members

__all__ = ["Choices", "assemble", "part_of", "watchdog_of"]


@dataclass(frozen=True)
class Choices:
    """What users have chosen by variables."""

    watchdog: Settings
    fusion_bytes: int
    stall: StallCheck


def watchdog_of(job: Job, choices: Choices, outlives: bool) -> Watchdog:
    """Collective over the processes of `job`, which `outlives` its workers or not."""
    first = job.workers if job.serves else 0
    return Watchdog(job.comm, choices.watchdog, first=first, outlives=range(job.workers if outlives else 0))


def assemble(job: Job, own: MPI.Intracomm, watchdog: Watchdog, choices: Choices, recovery: Recovery | None) -> Context:
    """`own`: see `part_of`; collective over its processes. Nothing is installed."""
    rank, size = own.Get_rank(), own.Get_size()
    local = own.Split_type(MPI.COMM_TYPE_SHARED, rank)
    local_rank, local_size = local.Get_rank(), local.Get_size()
    cross = own.Split(local_rank, rank)
    cross_rank, cross_size = cross.Get_rank(), cross.Get_size()
    homogeneous = len(set(own.allgather(local_size))) == 1
    local.Free()
    cross.Free()
    engine = Engine(threads_available(), choices.fusion_bytes, choices.stall)
    process_set = {0: Members(tuple(range(size)), own, engine.add(own, range(size)), global_process_set)}
    place = rank, size, local_rank, local_size, cross_rank, cross_size
    return Context(job, own, engine, watchdog, *place, homogeneous, process_set, itertools.count(1), recovery)


def part_of(job: Job) -> MPI.Intracomm:
    """The communicator of the workers, or of those that serve them, whichever this process is of. Collective over the processes of `job`."""
    if not job.servers:
        return job.comm
    part = job.comm.Split(int(job.serves), job.rank)
    assert isinstance(part, MPI.Intracomm)
    return part
