"""Who waits looks seldom, ends soon after it could, and sleeps through nothing that comes often."""

from __future__ import annotations

import pytest

from hvd_ecsgd.transport import patience
from hvd_ecsgd.transport.patience import Patience, note_arrival


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(patience.time, "perf_counter", lambda: self.now)

    def waited(self, seconds: float, arrivals_every: float | None = None) -> list[float]:
        """The pauses of a wait of so long, in which something comes now and then, and whoever looks after that notes it."""
        begin, one, pauses, seen = self.now, Patience(), list[float](), 0
        while self.now - begin < seconds:
            pauses.append(one.pause())
            self.now += pauses[-1]
            if arrivals_every and (arrived := int((self.now - begin) / arrivals_every)) > seen:
                seen = arrived
                note_arrival()
        return pauses


@pytest.mark.parametrize("seconds", [1e-5, 1e-3, 0.02, 0.3])
@pytest.mark.parametrize("every", [None, 1e-4, 5e-3])
def test_a_wait_is_a_twentieth_longer_at_most(monkeypatch: pytest.MonkeyPatch, seconds: float, every: float | None) -> None:
    clock = Clock(monkeypatch)
    assert seconds <= sum(clock.waited(seconds, every)) <= max(1.06 * seconds, seconds + 21e-6)


def test_what_comes_often_is_not_slept_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast link carries in half a millisecond a part of what is on its way: longer pauses would leave it idle."""
    clock = Clock(monkeypatch)
    often, seldom, unseen = clock.waited(0.5, 4e-4), clock.waited(0.5, 5e-3), clock.waited(0.5)
    assert max(often) <= 0.51e-3
    assert 1e-3 < max(seldom) <= 2e-3 and len(seldom) < 0.6 * len(often), "where little comes few looks are made"
    assert max(unseen) <= 0.51e-3, "looks may be what carries on what nobody notes"
