"""The communication thread: takes submitted collectives, negotiates which are ready on all ranks, and carries them out in one order everywhere.

One thread per process serves all process sets, each of which is a `Channel` with communicators of its own. Nothing in a channel's turn blocks, so
no channel can hold up another. The thread sleeps until there is work; while it waits for other ranks it looks at shorter, then longer intervals;
while data is on its way, which every rank is ready for, it looks often. It needs MPI_THREAD_MULTIPLE. Without it (or with
MPI_BACKEND_THREAD=0) the caller takes the turns, inside of submissions, `poll` and `synchronize`: results are the same, overlap is less, and
nobody notices a stall while the coordinator computes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from mpi4py import MPI

from hvd_ecsgd.transport.patience import Patience

from ..environment import switch, whole_number
from ..errors import HorovodInternalError, RankLostError
from ..transport import may_be_lost
from ..transport.operation import Operations
from .channel import Channel
from .negotiation import StallCheck
from .pending import Finished
from .timeline import Timeline

__all__ = ["Engine", "fusion_bytes", "threads_available"]

log = logging.getLogger("mpi_backend")


_FUSION_BYTES = 4 * 2**20  # of more, copying into one buffer costs what a message saves
_SHORTEST, _LONGEST, _IDLE = 20e-6, 2e-3, 0.1
"""Seconds between looks: from and to, while waiting for other ranks; and without any work, where a coordinator must still notice stalls."""


def threads_available() -> bool:
    """Whether the communication thread may run: MPI allows calls from several threads, and MPI_BACKEND_THREAD is not 0."""
    return switch("MPI_BACKEND_THREAD") and MPI.Query_thread() == MPI.THREAD_MULTIPLE


def fusion_bytes() -> int:
    """Of all-reduces that travel together, at most. Raises ValueError for a variable that is no number."""
    return whole_number("HOROVOD_FUSION_THRESHOLD", _FUSION_BYTES, "a number of bytes, 0 for no fusion")


class Engine:
    """Serves channels, by a thread of its own if `threaded`, else in turns that callers take."""

    def __init__(self, threaded: bool, fusion_bytes: int, stall: StallCheck) -> None:
        self.fusion_bytes, self.stall = fusion_bytes, stall
        self.threaded = threaded
        self.timeline: Timeline | None = None
        self.finished: Finished | None = None
        """Where the job outlives its ranks, asked at the end of each collective."""
        self._channels: tuple[Channel, ...] = ()
        self._lock = threading.RLock()  # of the turn, and of the list of channels
        self._work = threading.Event()
        self._stop = False
        self._meanwhile: Callable[[], None] | None = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="mpi_backend", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def add(self, comm: MPI.Comm, ranks: Sequence[int]) -> Channel:
        """A new channel; collective over `comm`."""
        channel = Channel(self, comm, ranks)
        with self._lock:
            self._channels = (*self._channels, channel)
        self._work.set()
        return channel

    def remove(self, channel: Channel) -> None:
        """Complete what all ranks submitted there, and free it; collective."""
        if self.failure is not None:
            return
        channel.leave().wait()
        with self._lock:
            self._channels = tuple(c for c in self._channels if c is not channel)
        channel.close()

    def leave(self) -> None:
        """Complete what all ranks submitted, and take nothing more; collective."""
        for leaving in [c.leave() for c in self._channels if not c.closed]:  # all at once: ranks need not have them in the same order
            leaving.wait()

    def close(self, meanwhile: Callable[[], None]) -> None:
        """Complete what all ranks submitted, and end the thread; collective. `meanwhile` is called now and then, while others are waited for."""
        self._meanwhile = meanwhile
        if self.failure is None:
            self.leave()
        self._stop = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()
        if self.failure is None:
            for channel in self._channels:
                channel.fail_all(HorovodInternalError("mpi_backend was shut down before all ranks submitted this."))
                channel.close()
            self._channels = ()

    def revoke(self) -> None:
        """A rank is gone: whatever waits on any channel fails, on all ranks."""
        for channel in self._channels:
            channel.revoke()

    def give_up(self) -> None:
        """End the thread; what waits has failed, as a rank is gone. The communicators stay, as MPI may hold what was sent there."""
        self._stop = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()
        if self.failure is None:
            self._fail(RankLostError("a rank is gone"))

    def nudge(self) -> None:
        """There is new work."""
        if self.threaded:
            self._work.set()
        else:
            self.help()

    def help(self) -> None:
        """Take a turn, if that is the callers' job."""
        if not self.threaded:
            try:
                self._turn()
            except Exception as error:
                self._fail(error)

    def wait(self, event: threading.Event) -> None:
        """Return when `event` is set."""
        if self.threaded:
            event.wait()
            return
        pause, patience = _SHORTEST, Patience()
        while not event.is_set():
            self.help()
            if event.is_set():
                return
            if any(c.in_flight for c in self._channels):
                time.sleep(patience.pause())
            else:
                time.sleep(pause)
                pause, patience = min(pause * 1.5, _LONGEST), Patience()

    def raise_failure(self) -> None:
        """Raise what ended the engine, if something has."""
        if self.failure is not None:
            raise self._kind_of_failure()(f"communication has failed earlier: {self.failure!r}") from self.failure

    def _kind_of_failure(self) -> type[HorovodInternalError]:
        error = self.failure
        lost = isinstance(error, RankLostError) or (isinstance(error, MPI.Exception) and may_be_lost(error))
        return RankLostError if lost else HorovodInternalError

    def _turn(self) -> bool:
        with self._lock:
            if self._meanwhile is not None:
                self._meanwhile()
            Operations.carry_on()
            return any([channel.turn() for channel in self._channels])

    def _serve(self) -> None:
        pause, patience = _SHORTEST, Patience()
        try:
            while not self._stop:
                self._work.clear()
                if self._turn():
                    pause, patience = _SHORTEST, Patience()
                elif any(c.in_flight for c in self._channels):
                    self._work.wait(patience.pause())
                elif any(c.waiting for c in self._channels):
                    self._work.wait(pause)
                    pause = min(pause * 1.5, _LONGEST)
                else:
                    self._work.wait(_IDLE)
                    pause = _SHORTEST
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        if self.finished is None:
            log.error("mpi_backend: communication failed; the next call will raise this.", exc_info=error)
        failed = self._kind_of_failure()(f"communication failed: {error!r}")
        failed.__cause__ = error
        for channel in self._channels:
            channel.fail_all(failed)
