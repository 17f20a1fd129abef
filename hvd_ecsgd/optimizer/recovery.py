"""Going on without workers that die: who finds out whether a step was exchanged by all, or must be taken again among fewer."""

from __future__ import annotations

from typing import Protocol

from ..errors import PeerLostError

__all__ = ["Recovery"]


class Recovery(Protocol):
    """Of a job that outlives its workers. The transports of its optimizers are brought among those that live, who are numbered anew in the order
    of their ranks; then each driver's `take_back`, `prepare_fewer` and `begin_again` are called."""

    def finished(self, error: PeerLostError | None) -> bool:
        """Whether this exchange, which ended on this worker with `error`, or without one, did so without one on all; the same on all.

        If not, those that live go on among themselves from here on, and the exchange must be made again. Collective: each worker calls it after each
        exchange, in one order.
        """
        ...
