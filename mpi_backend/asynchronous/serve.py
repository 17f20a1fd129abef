"""A serving rank: it carries out what workers send until all of them are done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from hvd_ecsgd.asynchronous import Kind, Message, Server
from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.patience import Patience

from ..engine.negotiation import StallCheck
from ..transport.operation import Operations
from .post import Post

__all__ = ["serve"]


def serve(server: Server, post: Post, together: Callable[[Message], None]) -> None:
    """Return when all workers are done. `together`: saves or loads a checkpoint, once all workers have asked for the same."""
    asked: dict[int, Message] = {}
    stall, waits = _Stall(StallCheck.from_environment()), Patience()
    while not server.finished:
        message = post.receive()
        if message is None:
            stall.look(server)
            Operations.carry_on()
            time.sleep(waits.pause())
            continue
        waits = Patience()
        if message.kind not in (Kind.SAVE, Kind.LOAD):
            for answer in server.on(message):
                post.send(answer, answer.worker)
            continue
        asked[message.worker] = message
        if len({m.kind for m in asked.values()}) > 1:
            raise TransportError("asynchronous training: some workers save a checkpoint, and others load one; call the same on all of them.")
        if len(asked) + len(server.done) == server.plan.workers:
            asked.clear()
            together(message)
    post.flush()


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
