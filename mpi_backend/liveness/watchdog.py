"""Ends this rank when another one is gone for good: dead, cut off, or left while this one waits for it. Nobody waits for ever.

Every rank has a small process beside it (`process`), which runs `heartbeat.py`; those of all ranks watch each other by UDP. That process says when
this rank must end, and why, and ends it if need be: a rank can be deep in a call of MPI that will never return, and behind a cut link no launcher's
order arrives. A rank that computes for long, or stands still in a debugger, is alive to the others, since the process beside it is.

A rank *leaves* when it shuts down, by the end of its script or `sys.exit`; what it never submitted will never come. So a rank that has been shutting
down for a second tells how many collectives it took part in on each transport, and one that has started a later one ends the job. So it is on the
transports of optimizers that a rank has dropped before it joined (`departures`).

Variables: MPI_BACKEND_WATCHDOG=0, on any rank, turns all of this off on all. MPI_BACKEND_WATCHDOG_TIMEOUT: seconds of silence after which a rank
counts as cut off (6). MPI_BACKEND_INTERFACE: network interfaces or networks (10.0.0.0/8), comma-separated, that signs of life take (those that Open
MPI was told, or all).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..environment import seconds, switch
from .departures import Departures
from .interfaces import addresses, network_identity
from .process import HeartbeatProcess

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..transport import Link

__all__ = ["Settings", "Watchdog"]

_TICK = 0.25  # seconds between looks
_LEAVING = 1.0  # seconds of shutting down after which others are told: mostly all ranks shut down together
_FAILED = 3.0  # seconds in which ranks whose communication failed must meet to shut down


@dataclass(frozen=True)
class Settings:
    """What users choose of the watchdog: whether it runs, and after how many seconds of silence a rank counts as dead."""

    enabled: bool
    timeout: float

    @staticmethod
    def from_environment() -> Settings:
        """Raises ValueError for a timeout that is no number of seconds from 1, and a switch that is neither 0 nor 1."""
        return Settings(switch("MPI_BACKEND_WATCHDOG"), seconds("MPI_BACKEND_WATCHDOG_TIMEOUT", 6.0, least=1.0))


class Watchdog:
    """Collective over `comm` to create. `stop` when all ranks are known to have shut down, or the others will miss this one. `watch` counts ranks
    from the `first` of those that communicate with this one. `outlives`: ranks whose processes may end, which is MPI's matter, and others go on
    without them; one that is cut off still ends the job."""

    def __init__(self, comm: MPI.Comm, settings: Settings, first: int = 0, outlives: Sequence[int] = ()) -> None:
        self._comm, self._first = comm, first
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._departures = Departures(self.rank)
        self._leaving_since: float | None = None
        self._process: HeartbeatProcess | None = None
        self._thread: threading.Thread | None = None
        everyone_enabled = all(comm.allgather(settings.enabled))
        if self.size == 1 or not everyone_enabled:
            return
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind(("", 0))
        self._process = HeartbeatProcess(self.rank, opened, _configuration(comm, opened.getsockname()[1], settings, outlives))
        self._thread = threading.Thread(target=self._serve, args=(self._process,), name="mpi_backend watchdog", daemon=True)
        self._thread.start()

    # ---- what the runtime tells

    def watch(self, link: Link, ranks: Sequence[int]) -> None:
        """Ranks that leave are compared with what this rank waits for on `link`, of which `ranks`, equal on all of them, are the members.

        Again, for another user of it: what ranks have said of the one before no longer counts.
        """
        self._departures.watch(link, [self._first + r for r in ranks])

    def leaving(self) -> None:
        """This rank shuts down. If that takes long, because others wait for something else, they are told."""
        self._leaving_since = time.monotonic()

    def tell_dropped(self, dropped: Sequence[Link]) -> None:
        """This rank waits for others, and will never start anything on these links again; none: it waits no more."""
        self._tell(f"left {self._departures.own_on(dropped)}")

    def wait_for_all(self, meeting: MPI.Request, failure: BaseException | None = None) -> None:
        """Return when all ranks are at the `meeting`, on their way out. What others still wait for in transports is carried on meanwhile.

        After a `failure` of this rank's communication the others may wait for it where nobody answers: then the job ends, soon.
        """
        since = time.monotonic()
        while not meeting.Test():
            if failure is not None and time.monotonic() - since > _FAILED:
                self._end(f"communication failed on rank {self.rank}, and other ranks have not shut down: {failure!r}")
            for link in self._departures.links:
                link.operations.progress()
            time.sleep(0.002)

    def announce(self, why: str) -> None:
        """This rank ends the job; for those whom the launcher does not reach."""
        self._tell(f"abort {why}")

    def stop(self) -> None:
        """The end of watching and being watched."""
        if self._process is not None and self._thread is not None:
            self._process.say_goodbye()
            self._thread.join()
            self._process.close()

    def _tell(self, line: str) -> None:
        if self._process is not None:
            self._process.tell(line)

    # ---- the thread

    def _serve(self, process: HeartbeatProcess) -> None:
        told_left = False
        while not process.stopping:
            for line in process.hear(_TICK):
                self._handle_line(line)
            if not told_left and self._leaving_since is not None and time.monotonic() - self._leaving_since > _LEAVING:
                told_left = True
                self._tell(f"left {self._departures.own()}")
            if (why := self._departures.hopeless()) is not None:
                self._end(why)

    def _handle_line(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "left":
            rank, _, counts = rest.partition(" ")
            self._departures.note(int(rank), counts)
        elif command == "end":
            self._end()

    def _end(self, why: str | None = None) -> None:
        """End this process, and through the launcher the job. Without `why`, the process beside it has said it."""
        from mpi4py import MPI

        if why is not None:
            self.announce(why)
            os.write(2, f"mpi_backend: {why}; ending the job on all ranks.\n".encode())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a script's own stream may raise anything, or be none: what is in it is lost, and the rank ends
                stream.flush()
        time.sleep(0.2)  # for the announcement to leave
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            # At the end of the interpreter no thread can be started; then nothing would end an abort that, behind a cut link, never returns.
            with contextlib.suppress(RuntimeError):
                threading.Timer(1.0, os._exit, (1,)).start()
                self._comm.Abort(1)
        os._exit(1)


def _configuration(comm: MPI.Comm, port: int, settings: Settings, outlives: Sequence[int]) -> str:
    """What the process beside this rank must know: who the others are, and where. Collective. `port`: of this rank's socket."""
    here = network_identity(), socket.gethostname(), os.getpid(), addresses(), port
    everyone = comm.allgather(here)
    token: str = comm.bcast(os.urandom(16).hex())
    config = {
        "rank": comm.Get_rank(),
        "parent": os.getpid(),
        "timeout": settings.timeout,
        "outlives": list(outlives),
        "token": token,
        "names": [f"rank {r} (process {pid} on {host})" for r, (_, host, pid, _, _) in enumerate(everyone)],
        "addresses": [
            [["127.0.0.1", port]] if identity == here[0] else [[address, port] for address in addresses]
            for identity, _, _, addresses, port in everyone
        ],
    }
    return json.dumps(config)
