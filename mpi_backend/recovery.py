"""A job that outlives its ranks (MPI_BACKEND_ON_FAILURE=shrink): those that live go on among themselves, without leaving their processes.

The one rule is that every exchange, of an optimizer's step or of a named collective, ends with an agreement of all ranks, which ULFM gives also where
ranks die: either it was complete on all, or it counts on none. So all that live are at the same place of the script when they hear that a rank is
gone. They revoke what they communicate by, so that nobody waits in there any more; shrink the job; make everything that hangs on it anew; and go
on: a step is undone, bit for bit, and taken again with the gradients that are here, and a named collective is a `RankLostError`.

Where ranks serve (`asynchronous`), workers do so among themselves, in their collectives. Messages between a worker and a server need no third rank,
so their communicators stay as they were; servers find out by themselves, and are told what workers have agreed on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpi4py import MPI

from hvd_ecsgd.errors import PeerLostError, TransportError
from hvd_ecsgd.optimizer import driver_of

from . import job_end, runtime
from .assembly import Choices, assemble, watchdog_of
from .environment import one_of
from .errors import HorovodInternalError, RankLostError
from .optimizer import resources
from .process_sets import global_process_set
from .runtime import Context, Job
from .transport import Link, MPITransport, agree, among_those_that_live, lost_between

__all__ = ["ShrinkingJob", "on_failure"]


def on_failure() -> str:
    """What MPI_BACKEND_ON_FAILURE says: "end" (the job ends on all ranks when one dies), or "shrink". Raises ValueError for anything else."""
    return one_of("MPI_BACKEND_ON_FAILURE", "end", ("end", "shrink"))


@dataclass(frozen=True)
class _Smaller:
    """What the ranks that are left have made. `commits`: what brings drivers onto the `links`."""

    context: Context
    links: dict[int, Link]
    commits: list[Callable[[], None]]


class ShrinkingJob:
    """See `hvd_ecsgd.optimizer.recovery.Recovery`."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices

    def finished(self, error: PeerLostError | None) -> bool:
        """See `Recovery`. Raises `HorovodInternalError`, on all ranks, where communication has failed and no rank is gone."""
        here = runtime.context()
        if error is not None:
            _revoke(here)
        if agree(here.comm, error is None):
            return True
        self._go_on_without_those_that_are_gone(here, error)
        return False

    def together(self, error: Exception | None) -> Exception | None:
        """What a named collective ends with on all ranks that live, if it has ended with `error` here."""
        if self.finished(error if isinstance(error, PeerLostError) else None):
            return error
        here = runtime.context()
        return RankLostError(
            f"a rank died before this collective was complete on all, so it has not been done on any. This is rank {here.rank} of {here.size} now. "
            "All ranks may call it again, with its input as it was, or go on without its result."
        )

    def leave(self) -> None:
        """Be done with named collectives, as all that live are; those that still call one are told so by an error, as in a job that loses none."""
        finished = False
        while not finished:
            error: PeerLostError | None = None
            try:
                runtime.context().engine.leave()
            except PeerLostError as lost:
                error = lost
            finished = self.finished(error)

    def leave_as_it_is(self, closing: Context) -> None:
        """A rank has died, while all shut down or, where ranks serve, before: communicators cannot be given back without it."""
        _revoke(closing)
        closing.job.comm.Revoke()  # others may wait there to be all on their way out
        closing.engine.give_up()
        resources.abandon_backgrounds()
        resources.close_backgrounds()
        resources.abandon_transports()
        closing.watchdog.stop()
        if not closing.job.servers:
            os.write(2, f"mpi_backend: rank {closing.rank}: another rank has died while all shut down.\n".encode())

    def _go_on_without_those_that_are_gone(self, here: Context, error: PeerLostError | None) -> None:
        _revoke(here)
        here.engine.give_up()
        resources.abandon_backgrounds()
        if not here.job.servers:
            here.watchdog.stop()
        drivers = {number: driver_of(optimizer) for number, optimizer in resources.optimizers().items()}
        for driver in drivers.values():
            driver.take_back()

        def make(comm: MPI.Intracomm) -> _Smaller:
            job, watchdog = here.job, here.watchdog
            if not job.servers:
                job = Job(comm, comm.Get_rank(), comm.Get_size(), 0)
                watchdog = watchdog_of(job, self._choices, outlives=True)
            try:
                return _Smaller(assemble(job, comm, watchdog, self._choices, self), *_links(comm, drivers))
            except HorovodInternalError as lost:
                raise TransportError(str(lost)) from lost

        def unmake(made: _Smaller) -> None:
            made.context.engine.give_up()
            if not here.job.servers:
                made.context.watchdog.stop()

        try:
            smaller = among_those_that_live(here.comm, make, unmake)
        except TransportError as none:
            raise HorovodInternalError(f"{none} {error or ''}") from error
        new, links = smaller.context, smaller.links
        if not here.job.servers:  # which have told the user
            _tell(here, new)
        new.engine.timeline = here.engine.timeline
        new.engine.finished = self.together
        runtime.install(new)
        job_end.moved(new.job.comm, new.watchdog)
        global_process_set.ranks = list(range(new.size))
        for commit in smaller.commits:
            commit()
        resources.move(links)
        for number in links:
            drivers[number].begin_again()


def _revoke(here: Context) -> None:
    """Nobody waits any more for what may never come."""
    here.engine.revoke()
    resources.revoke()


def _links(comm: MPI.Intracomm, drivers: Mapping[int, object]) -> tuple[dict[int, Link], list[Callable[[], None]]]:
    """For each optimizer that all ranks have, by number, communicators among those of `comm`, and what changes its driver for them. Collective."""
    everyones = comm.allgather(sorted(drivers))
    links: dict[int, Link] = {}
    commits: list[Callable[[], None]] = []
    for number in sorted(set.intersection(*map(set, everyones))):
        links[number] = Link(comm)
        commits.append(drivers[number].prepare_fewer(MPITransport(link=links[number])))  # type: ignore[attr-defined]
    return links, commits


def _tell(before: Context, now: Context) -> None:
    """The user, on the first of the ranks that are left."""
    if now.rank:
        return
    gone = lost_between(before.comm, now.comm)
    who = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))} of {before.size} {'are' if len(gone) > 1 else 'is'} gone"
    text = f"mpi_backend: {who}. The job goes on with {now.size} ranks, in the order that they had (MPI_BACKEND_ON_FAILURE=shrink).\n"
    os.write(2, text.encode())
