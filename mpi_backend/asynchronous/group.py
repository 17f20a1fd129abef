"""All workers that live, and all servers: what they do together, and again where one of them dies meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from hvd_ecsgd.errors import CheckpointError, PeerLostError, TransportError

from ..runtime import Job
from ..transport import Link, MPITransport, agree, among_those_that_live, lost_between

__all__ = ["Everyone"]

T = TypeVar("T")


class Everyone:
    """The ranks of a job, and a transport among them. Creating one is collective. `outlives`: workers may die, and the others go on."""

    def __init__(self, job: Job, outlives: bool) -> None:
        self._job, self._outlives = job, outlives
        self._link = Link(job.comm)
        self.transport = MPITransport(link=self._link)
        self.lost: list[int] = []
        """Workers that were left out, by rank."""

    def together(self, do: Callable[[], T]) -> T:
        """What `do` returns, which communicates by the transport, once it is done on all that live; it may be called again, and must change nothing
        that cannot be replaced. Raises `CheckpointError` on all where it raises that on all; `TransportError` where a server has died."""
        if not self._outlives:
            return do()
        while True:
            gone: PeerLostError | None = None
            refused: CheckpointError | None = None
            try:
                done = do()
            except PeerLostError as error:
                gone = error
                self._link.revoke()
            except CheckpointError as error:
                refused = error
            if not agree(self._comm, gone is None):
                self._leave_out_those_that_are_gone()
            elif refused is not None:
                raise refused
            else:
                return done

    def _leave_out_those_that_are_gone(self) -> None:
        self._link.revoke()
        link = among_those_that_live(self._comm, Link, Link.abandon)
        gone = lost_between(self._job.comm, link.comm)
        self._link.abandon()
        self._link = link
        self.transport.be_on(link)
        if servers := [r for r in gone if r >= self._job.workers]:
            raise TransportError(f"rank {servers[0]}, which serves, has died, and the x that it held with it. Go on from the last checkpoint.")
        self.lost = gone

    @property
    def _comm(self) -> MPI.Intracomm:
        comm = self._link.comm
        assert isinstance(comm, MPI.Intracomm)
        return comm

    def close(self) -> None:
        """Complete what is in flight and free the communicators."""
        self._link.close()

    def abandon(self) -> None:
        """Ranks have died: the communicators stay."""
        self._link.abandon()
