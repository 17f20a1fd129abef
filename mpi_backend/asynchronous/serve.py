"""A serving rank: it carries out what workers send until all of them are done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable

from hvd_ecsgd.asynchronous import Kind, Message, Server
from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.patience import Patience

from ..engine.negotiation import StallCheck
from ..errors import HorovodInternalError
from ..transport.operation import Operations
from .post import Post

__all__ = ["Serving"]


class Serving:
    """Carries `server`, which is the `first` one or another, by `post`."""

    def __init__(self, server: Server, post: Post, first: bool) -> None:
        self._server, self._post, self._first = server, post, first
        self._asked: dict[int, Message] = {}
        """By worker: to save a checkpoint, or to load one."""

    def run(self, together: Callable[[Message], None]) -> None:
        """Return when all workers are done. `together`: saves or loads a checkpoint, once all workers have asked for the same. Raises
        `HorovodInternalError` when all have died."""
        stall, waits = _Stall(StallCheck.from_environment()), Patience()
        while not self._server.finished:
            self.let_go(self._post.newly_lost())
            message = self._post.receive()
            if message is not None:
                waits = Patience()
                self._take(message)
            if self._asked and len(self._asked) + len(self._server.done) == len(self._server.living):
                asked = next(iter(self._asked.values()))
                self._asked.clear()
                together(asked)
            elif message is None:
                stall.look(self._server)
                Operations.carry_on()
                time.sleep(waits.pause())
        self._post.flush()

    def let_go(self, lost: Iterable[int]) -> None:
        """These ranks have died. (Of one that serves the job's end says so.)"""
        server = self._server
        for worker in lost:
            if worker not in server.living or worker in server.done:
                continue
            self._asked.pop(worker, None)
            for answer in server.on_lost(worker):
                self._post.send(answer, answer.worker)
            if not server.living:
                raise HorovodInternalError(
                    f"all {server.plan.workers} workers have died; the last was rank {worker}. Go on from the last checkpoint."
                )
            if self._first:
                self._tell(worker)

    def _take(self, message: Message) -> None:
        if message.worker in self._server.lost:
            return
        if message.kind is Kind.LOST:
            self.let_go(message.absent)
        elif message.kind not in (Kind.SAVE, Kind.LOAD):
            for answer in self._server.on(message):
                self._post.send(answer, answer.worker)
        else:
            self._asked[message.worker] = message
            if len({m.kind for m in self._asked.values()}) > 1:
                raise TransportError("asynchronous training: some workers save a checkpoint, and others load one; call the same on all of them.")

    def _tell(self, worker: int) -> None:
        server, left = self._server, len(self._server.living)
        text = (
            f"mpi_backend: rank {worker}, a worker, has died. {server.pushes[worker]} of its gradients have moved x, and what it held back is lost."
        )
        text += f" The job goes on with {left} worker{'s' * (left > 1)}"
        if server.plan.share != 1.0:
            text += f", and a gradient takes {f'1/{left} of ' * (left > 1)}its learning rate"
        os.write(2, f"{text} (MPI_BACKEND_ON_FAILURE=shrink).\n".encode())


class _Stall:
    """Says who has waited for x for long, and for whose gradients."""

    def __init__(self, check: StallCheck) -> None:
        self._every = check.warn
        self._since: dict[int, float] = {}

    def look(self, server: Server) -> None:
        held, now = server.held_back(), time.monotonic()
        self._since = {worker: self._since.get(worker, now) for worker in held}
        for worker, since in self._since.items():
            if self._every and now - since > self._every:
                self._since[worker] = now
                print(
                    f"mpi_backend: worker {worker} has waited {self._every:g} s for x, as gradients of {held[worker]} (workers by rank) have not "
                    f"come, and tau_max is {server.plan.tau_max}. A worker that does something else for long is to be in optimizer.consistent().",
                    file=sys.stderr,
                    flush=True,
                )
