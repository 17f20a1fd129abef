"""How one waits for what is on its way without taking the processor from others, and without sleeping through its arrival."""

from __future__ import annotations

import time

__all__ = ["Patience", "note_arrival"]

_SHARE = 1 / 20
_SHORTEST, _LONGEST = 20e-6, 500e-6
_LENGTHENED = 4

_arrivals = 0


def note_arrival() -> None:
    """Tell all who wait in this process that something has come since somebody looked last: others look soon."""
    global _arrivals
    _arrivals += 1


class Patience:
    """The pauses of one wait: a twentieth of the time that it has lasted, so that it does not end much later than it could, and few looks are made.

    They take 20 µs or more, since a look takes about as long. And no more than 500 µs, in which a link of 1 Gbit/s carries 60 KiB, far less
    than is on its way at once. But where arrivals are noted, and none was since the last look, the link is slower: then this doubles, and doubles
    again, as a look costs the processor what a backward pass needs. Of what nobody notes, as a message that MPI cuts by itself, looks may be what
    carries it on.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._longest, self._seen, self._noted = _LONGEST, _arrivals, False

    def pause(self) -> float:
        """Seconds until the next look."""
        if self._seen != _arrivals:
            self._longest, self._seen, self._noted = _LONGEST, _arrivals, True
        pause = max((time.perf_counter() - self._since) * _SHARE, _SHORTEST)
        if pause > self._longest:
            pause = self._longest
            if self._noted:
                self._longest = min(2 * self._longest, _LENGTHENED * _LONGEST)
        return pause
