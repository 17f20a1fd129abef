"""Ends this rank when another one is gone for good: dead, cut off, or left while this one waits for it. Nobody waits for ever.

Every rank has a small process beside it, `heartbeat.py`; those of all ranks watch each other by UDP. That process says when this rank must end, and
why, and ends it if need be: a rank can be deep in a call of MPI that will never return, and behind a cut link no launcher's order arrives.
A rank that computes for long, or stands still in a debugger, is alive to the others, since the process beside it is.

A rank *leaves* when it shuts down, by the end of its script or `sys.exit`; what it never submitted will never come. So a rank that has been shutting
down for a second tells how many collectives it took part in on each transport, and one that has started a later one ends the job. So it is on the
transports of optimizers that a rank has dropped before it joined.

Variables: MPI_BACKEND_WATCHDOG=0, on any rank, turns all of this off on all. MPI_BACKEND_WATCHDOG_TIMEOUT: seconds of silence after which a rank
counts as cut off (6). MPI_BACKEND_INTERFACE: network interfaces or networks (10.0.0.0/8), comma-separated, that signs of life take (those that Open
MPI was told, or all).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_ecsgd.optimizer import driver_of

from ..environment import seconds, switch
from .interfaces import addresses, network_identity

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..transport import Link

__all__ = ["Settings", "Watchdog"]

_TICK = 0.25  # seconds between looks
_LEAVING = 1.0  # seconds of shutting down after which others are told: mostly all ranks shut down together
_FAILED = 3.0  # seconds in which ranks whose communication failed must meet to shut down
_ELSEWHERE = ""  # among counts by transport: the others, on which a rank goes on


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
    """Collective over `comm` to create. `stop` when all ranks are known to have shut down, or the others will miss this one."""

    def __init__(self, comm: MPI.Comm, settings: Settings) -> None:
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._links: dict[str, tuple[Link, tuple[int, ...]]] = {}
        self._watched: Counter[tuple[int, ...]] = Counter()  # how many `watch`es there have been, which is equal on all members
        self._left: dict[int, dict[str, int | None]] = {}
        self._leaving_since: float | None = None
        self._suspect: str | None = None  # why this rank waited for nothing at the last look
        self._stop = False
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._config = ""
        self._thread: threading.Thread | None = None
        everyone_enabled = all(comm.allgather(settings.enabled))
        if self.size == 1 or not everyone_enabled:
            self._socket.close()
            return
        self._socket.bind(("", 0))
        self._config = self._configuration(settings)
        self._start()
        self._thread = threading.Thread(target=self._serve, name="mpi_backend watchdog", daemon=True)
        self._thread.start()

    # ---- what the runtime tells

    def watch(self, link: Link, ranks: Sequence[int]) -> None:
        """Ranks that leave are compared with what this rank waits for on `link`, of which `ranks`, equal on all of them, are the members.

        Again, for another user of it: what ranks have said of the one before no longer counts.
        """
        members = tuple(ranks)
        digest = hashlib.blake2b(repr(members).encode(), digest_size=4).hexdigest()
        others = {key: known for key, known in self._links.items() if known[0] is not link}
        self._links = {**others, f"{digest}.{self._watched[members]}": (link, members)}  # a new one: the thread reads it
        self._watched[members] += 1

    def leaving(self) -> None:
        """This rank shuts down. If that takes long, because others wait for something else, they are told."""
        self._leaving_since = time.monotonic()

    def tell_dropped(self, dropped: Sequence[Link]) -> None:
        """This rank waits for others, and will never start anything on these links again; none: it waits no more."""
        counts = {key: link.operations.submitted() for key, (link, _) in self._links.items() if any(link is d for d in dropped)}
        self._tell(f"left {json.dumps({**counts, _ELSEWHERE: None}) if counts else ''}")

    def wait_for_all(self, failure: BaseException | None = None) -> None:
        """Return when all ranks are here, on their way out. What others still wait for in transports is carried on meanwhile.

        After a `failure` of this rank's communication the others may wait for it where nobody answers: then the job ends, soon.
        """
        request, since = self._comm.Ibarrier(), time.monotonic()
        while not request.Test():
            if failure is not None and time.monotonic() - since > _FAILED:
                self._end(f"communication failed on rank {self.rank}, and other ranks have not shut down: {failure!r}")
            for link, _ in self._links.values():
                link.operations.progress()
            time.sleep(0.002)

    def announce(self, why: str) -> None:
        """This rank ends the job; for those whom the launcher does not reach."""
        self._tell(f"abort {why}")

    def stop(self) -> None:
        """The end of watching and being watched."""
        self._stop = True
        self._tell("bye")
        if self._thread is not None:
            self._thread.join()
        self._socket.close()
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.stdout.close()
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    # ---- starting

    def _configuration(self, settings: Settings) -> str:
        port: int = self._socket.getsockname()[1]
        here = network_identity(), socket.gethostname(), os.getpid(), addresses(), port
        everyone = self._comm.allgather(here)
        token: str = self._comm.bcast(os.urandom(16).hex())
        config = {
            "rank": self.rank,
            "parent": os.getpid(),
            "timeout": settings.timeout,
            "token": token,
            "names": [f"rank {r} (process {pid} on {host})" for r, (_, host, pid, _, _) in enumerate(everyone)],
            "addresses": [
                [["127.0.0.1", port]] if identity == here[0] else [[address, port] for address in addresses]
                for identity, _, _, addresses, port in everyone
            ],
        }
        return json.dumps(config)

    def _start(self) -> None:
        """Start the process beside this rank; again, if it was killed, and the others take it for the one they know."""
        pipe, socket_ = subprocess.PIPE, self._socket.fileno()
        program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("heartbeat.py")), str(socket_)]
        try:
            # A session of its own: what a terminal or a launcher sends to the rank's group is the rank's matter.
            self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, pass_fds=[socket_], start_new_session=True, bufsize=0, cwd="/")
        except OSError as error:
            warnings.warn(f"mpi_backend: rank {self.rank} cannot start its watchdog ({error}); it will not be watched.", RuntimeWarning, stacklevel=4)
            return
        self._tell(self._config)

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            data = memoryview(line.replace("\n", " ").encode() + b"\n")
            try:
                while data:
                    data = data[self._process.stdin.write(data) :]
            except (OSError, ValueError):
                pass  # it is gone; we go on unwatched

    # ---- the thread

    def _serve(self) -> None:
        buffer, told_left = b"", False
        while not self._stop:
            out = None if self._process is None else self._process.stdout
            readable, _, _ = select.select([] if out is None else [out], [], [], _TICK)
            now = time.monotonic()
            if out is not None and readable:
                data = os.read(out.fileno(), 65536)
                if not data and not self._stop:
                    self._restart()
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._handle_line(line.decode())
            if not told_left and self._leaving_since is not None and now - self._leaving_since > _LEAVING:
                told_left = True
                self._tell(f"left {json.dumps({key: link.operations.started() for key, (link, _) in self._links.items()})}")
            self._look_at_those_who_left()

    def _restart(self) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        status, self._process = self._process.wait(), None
        os.write(2, f"mpi_backend: rank {self.rank}: its watchdog ended (status {status}) and is started again.\n".encode())
        time.sleep(_TICK)
        self._start()

    def _handle_line(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "left":
            rank, _, counts = rest.partition(" ")
            self._left[int(rank)] = json.loads(counts)
        elif command == "end":
            self._end()

    def _look_at_those_who_left(self) -> None:
        links = self._links
        hopeless = [why for key in links for r in sorted(self._left) if (why := self._never_answered(key, *links[key], r)) is not None]
        why = hopeless[0] if hopeless else None
        if why is not None and why == self._suspect:
            self._end(why)
        self._suspect = why

    def _never_answered(self, key: str, link: Link, members: tuple[int, ...], rank: int) -> str | None:
        """Why something that this rank has started on a link will never be answered by `rank`; None if it may be."""
        counts = self._left[rank]
        joined = _ELSEWHERE in counts
        turn = counts.get(key, None if joined else 0)
        if rank not in members or turn is None or (what := link.operations.started_beyond(turn)) is None:
            return None
        optimizer = link.user()
        if optimizer is not None and (called := driver_of(optimizer).step.called):
            return f"{called} was called on rank {self.rank}, and rank {rank} ended without it; call it on every rank"
        if not joined:
            return f"rank {rank} left (by the end of the script, or sys.exit) without a collective that rank {self.rank} has started: {what}"
        if optimizer is None:  # dropped here too: nobody waits
            return None
        names = [name for name, _ in driver_of(optimizer).compression.named]
        return (
            f"rank {rank} joined after it had dropped the DistributedOptimizer of {', '.join(map(repr, names[:3]))}{', …' * (len(names) > 3)} "
            f"({len(names)} parameters), which rank {self.rank} still uses; keep it on all ranks until all have joined, or drop it on all"
        )

    def _end(self, why: str | None = None) -> None:
        """End this process, and through the launcher the job. Without `why`, the process beside it has said it."""
        from mpi4py import MPI

        if why is not None:
            self.announce(why)
            os.write(2, f"mpi_backend: {why}; ending the job on all ranks.\n".encode())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        time.sleep(0.2)  # for the announcement to leave
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            with contextlib.suppress(RuntimeError):  # at the end of the interpreter threads cannot be started
                threading.Timer(1.0, os._exit, (1,)).start()  # behind a cut link an abort may not return
            self._comm.Abort(1)
        os._exit(1)
