"""A thread that compresses and communicates while the backward pass goes on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..transport.devices import current_device, use_device
from ..transport.patience import Patience

__all__ = ["Background"]

_A_WHILE = 1.0


class Background:
    """An `Executor` with a thread of its own, which starts with the first work, and sleeps without.

    After an exception what is left is dropped; the exception is raised by the next call, whichever that is. `waits`: entered by whoever has waited
    for a second in `drain`, until it waits no more; what it gives is then called now and then, and may raise.
    `carry_on`: called now and then while there is no work, as long as it says that anything is on its way.
    """

    concurrent = True
    waits: Callable[[], AbstractContextManager[Callable[[], None]]] | None = None

    def __init__(self, name: str, carry_on: Callable[[], bool] = lambda: False) -> None:
        self._name = name
        self._carry_on = carry_on
        self._changed = threading.Condition()
        self._queue: deque[tuple[int | None, Callable[[], None]]] = deque()
        self._busy = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._threads = torch.get_num_threads()
        """A property of each thread that computes, like the GPU."""

    def submit(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._raise()
            if self._closed:
                raise RuntimeError(f"{self._name}: closed, as mpi_backend was shut down; make a new DistributedOptimizer after init().")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._queue.append((current_device(), work))
            self._changed.notify_all()

    def drain(self) -> None:
        def done() -> bool:
            return not self._queue and not self._busy

        with self._changed:
            if not self._changed.wait_for(done, _A_WHILE) and self.waits is not None:
                with self.waits() as look:
                    while not self._changed.wait_for(done, 0.1):
                        look()
            self._changed.wait_for(done)
            self._raise()

    def abandon(self) -> None:
        """Drop what is left, and return when the thread does nothing; that must have failed, or be about to. What was raised is forgotten."""
        with self._changed:
            self._queue.clear()
            self._changed.wait_for(lambda: not self._busy)
            self._error = None

    def close(self) -> None:
        """End the thread, after what it has been given."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():  # a collector may run in any thread
            self._thread.join()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _has_work(self) -> bool:
        return bool(self._queue) or self._closed

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            patience, working = Patience(), False
            while not working and self._carry_on():
                with self._changed:
                    working = self._changed.wait_for(self._has_work, patience.pause())
            with self._changed:
                self._changed.wait_for(self._has_work)
                if not self._queue:
                    return
                (device, work), self._busy = self._queue.popleft(), True
            try:
                use_device(device)
                work()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._queue.clear()
            del work  # it holds gradients
