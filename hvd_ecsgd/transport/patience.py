"""How one waits for what is on its way without taking the processor from others, and without sleeping through its arrival."""

from __future__ import annotations

import time

__all__ = ["Patience"]

_SHARE = 1 / 50
_SHORTEST, _LONGEST = 20e-6, 500e-6


class Patience:
    """The pauses of one wait: a fiftieth of the time that it has lasted, so that it does not end much later than it could, and few looks are made.

    Between 20 µs, since a look takes about as long, and 500 µs, in which a link of 1 Gbit/s carries 60 KiB: far less than is on its way at once.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> float:
        """Seconds until the next look."""
        return min(max((time.perf_counter() - self._since) * _SHARE, _SHORTEST), _LONGEST)
