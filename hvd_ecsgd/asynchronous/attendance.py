"""When a step goes on without the slowest workers, and without whom: decided on every rank alike, from a table that all ranks have."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ..arguments import check_integer, check_number

__all__ = ["Attendance", "Cutoff", "Met", "Over", "Row", "Stand", "Together", "best_cutoff"]


@dataclass(frozen=True)
class Cutoff:
    """How many workers a step waits for.

    `least`: so many at least; None: as many as maximise c / E[time until the c-th has its gradient], by the times of each worker's last `window`
    gradients, chosen anew after each step. `slack`: a share of the time of a gradient; who is expected so soon after the c-th is waited for. `cap`:
    most steps in a row without a worker; then it is waited for. It bounds how stale a gradient is, and how many steps' means a late worker holds.
    """

    least: int | None = None
    slack: float = 0.1
    window: int = 16
    cap: int = 32

    def __post_init__(self) -> None:
        if self.least is not None:
            check_integer(self.least, "Cutoff: least", "None, or a number of workers ≥ 1 that a step waits for", least=1)
        check_number(self.slack, "Cutoff: slack", "a finite number ≥ 0 (a share of a step's time)", lambda slack: slack >= 0)
        check_integer(self.window, "Cutoff: window", "a number of gradients ≥ 1 whose times count", least=1)
        check_integer(self.cap, "Cutoff: cap", "a number of steps ≥ 0 (0: every step waits for all)", least=0)


class Stand(IntEnum):
    """What a worker's script does."""

    COMPUTING = 0
    READY = 1
    """Its gradient is there, and it waits for the step in which it takes part."""
    HOLDING = 2
    """It has met the others, and holds x."""
    MEETING = 3
    """It waits until all others do so too, or are done."""
    FINISHED = 4


@dataclass(frozen=True)
class Row:
    """What a worker says of itself in a round. `clock`: seconds, by its own; `seconds`: that it has computed its gradient for, or did. `steps`: that
    its script has taken. `numbers`: its hyper-parameters."""

    stand: Stand
    clock: float
    seconds: float
    steps: int
    numbers: Sequence[float]

    def told(self) -> list[float]:
        return [float(self.stand), self.clock, self.seconds, float(self.steps), *self.numbers]

    @staticmethod
    def of(told: Sequence[float]) -> Row:
        return Row(Stand(int(told[0])), told[1], told[2], int(told[3]), told[4:])


@dataclass(frozen=True)
class Together:
    """A step is taken with the gradients of those `present`, by rank, and the hyper-parameters of `chief`."""

    present: tuple[bool, ...]
    chief: int


@dataclass(frozen=True)
class Met:
    """All workers meet, or are done: x is the same on all once each has applied what there was."""


@dataclass(frozen=True)
class Over:
    """All workers are done."""


def best_cutoff(times: Sequence[Sequence[float]]) -> int:
    """The c that maximises c / E[T_(c)], T_(c) being the time until c workers have their gradients; the largest of those that do equally well.

    `times`: by worker, seconds of its last gradients, one at least. The j-th last of all workers are one draw; of who has fewer, from the first anew.
    """
    draws = max(len(own) for own in times)
    ordered = [sorted(own[j % len(own)] for own in times) for j in range(draws)]
    means = [math.fsum(draw[c] for draw in ordered) / draws for c in range(len(times))]
    return max(range(1, len(times) + 1), key=lambda c: (c / means[c - 1] if means[c - 1] > 0 else math.inf, c))


class Attendance:
    """Of `size` workers. All ranks are shown the same tables in the same order, so all decide alike, and count alike."""

    def __init__(self, cutoff: Cutoff, size: int) -> None:
        if cutoff.least is not None:
            check_integer(cutoff.least, "Cutoff: least", f"a number of workers from 1 to the {size} that there are", least=1, most=size)
        self.cutoff, self.size = cutoff, size
        self.missed = [0] * size
        """By rank, steps in a row without it."""
        self.late = [0] * size
        """By rank, all steps without it, while it computed."""
        self.waited_for: list[int] = []
        """Ranks that compute while others wait, in the last round."""
        self._times: list[deque[float]] = [deque(maxlen=cutoff.window) for _ in range(size)]
        self._since: float | None = None

    @property
    def c(self) -> int:
        """Workers that the next step waits for; all, until each has been measured."""
        if self.cutoff.least is not None:
            return self.cutoff.least
        return best_cutoff(self._times) if all(self._times) else self.size

    def decide(self, rows: Sequence[Row]) -> Together | Met | Over | None:
        """What happens next; None: another round."""
        ready = [r for r, row in enumerate(rows) if row.stand is Stand.READY]
        busy = [r for r, row in enumerate(rows) if row.stand in (Stand.COMPUTING, Stand.HOLDING)]
        self.waited_for = busy if ready or len(busy) < self.size else []
        if not ready:
            if busy:
                return None
            return Over() if all(row.stand is Stand.FINISHED for row in rows) else Met()
        if not self._may_go(rows, ready, busy):
            return None
        self._since = None
        for r, row in enumerate(rows):
            if r in ready:
                self._times[r].append(row.seconds)
                self.missed[r] = 0
            elif r in busy:
                self.missed[r] += 1
                self.late[r] += 1
        chief = max(ready, key=lambda r: (rows[r].steps, -r))
        return Together(tuple(r in ready for r in range(self.size)), chief)

    def pause(self, rows: Sequence[Row]) -> float:
        """Seconds after which a worker that has nothing new to say may say so again: a fiftieth of the fastest's gradient, between half a millisecond
        and twenty; while nobody is there, half of the time until the first is expected."""
        fastest = min((self._expected(r) for r in range(self.size)), default=0.0)
        pause = min(max(fastest / 50, 5e-4), 2e-2)
        if any(row.stand is Stand.READY for row in rows):
            return pause
        coming = [self._expected(r) - row.seconds for r, row in enumerate(rows) if row.stand is Stand.COMPUTING]
        return min(max(pause, min(coming, default=0.0) / 2), 2e-2)

    def _expected(self, r: int) -> float:
        """Seconds of a gradient of this worker; 0 before one was measured."""
        return statistics.fmean(self._times[r]) if self._times[r] else 0.0

    def _may_go(self, rows: Sequence[Row], ready: Sequence[int], busy: Sequence[int]) -> bool:
        if not busy:
            return True
        if any(self.missed[r] >= self.cutoff.cap for r in busy) or len(ready) < min(self.c, len(ready) + len(busy)):
            self._since = None
            return False
        clock = rows[0].clock  # one clock for all
        self._since = clock if self._since is None else self._since
        slack = self.cutoff.slack * min(rows[r].seconds for r in ready)
        return clock - self._since >= slack or not any(self._comes_within(slack, r, rows[r]) for r in busy)

    def _comes_within(self, slack: float, r: int, row: Row) -> bool:
        """By its last gradients; not of a worker that takes twice as long already, as something has happened to it."""
        expected = self._expected(r)
        return row.stand is Stand.COMPUTING and expected - slack <= row.seconds <= 2 * expected
