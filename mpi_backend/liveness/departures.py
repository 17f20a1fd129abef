"""Ranks that have left, compared with what this rank still waits for: whatever a rank never submitted will never come."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..transport import Link

__all__ = ["Departures"]

_ELSEWHERE = ""  # among counts by transport: the others, on which a rank goes on


class Departures:
    """As rank `rank` sees them. It is told of links and departures, and asked, in two threads."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._links: dict[str, tuple[Link, tuple[int, ...]]] = {}  # replaced, never changed: another thread reads it
        self._watched: Counter[tuple[int, ...]] = Counter()  # how many `watch`es there have been, which is equal on all members
        self._left: dict[int, dict[str, int | None]] = {}
        self._suspect: str | None = None  # why this rank waited for nothing at the last look

    def watch(self, link: Link, ranks: Sequence[int]) -> None:
        """See `Watchdog.watch`."""
        members = tuple(ranks)
        digest = hashlib.blake2b(repr(members).encode(), digest_size=4).hexdigest()
        others = {key: known for key, known in self._links.items() if known[0] is not link}
        self._links = {**others, f"{digest}.{self._watched[members]}": (link, members)}
        self._watched[members] += 1

    @property
    def links(self) -> list[Link]:
        return [link for link, _ in self._links.values()]

    # ---- what ranks tell of themselves, as text

    def own(self) -> str:
        """In how many collectives this rank, which leaves, took part on each link."""
        return json.dumps({key: link.operations.started() for key, (link, _) in self._links.items()})

    def own_on(self, dropped: Sequence[Link]) -> str:
        """Likewise on these links alone, as the rank goes on elsewhere; empty where it takes part in none of them."""
        counts = {key: link.operations.submitted() for key, (link, _) in self._links.items() if any(link is d for d in dropped)}
        return json.dumps({**counts, _ELSEWHERE: None}) if counts else ""

    def note(self, rank: int, counts: str) -> None:
        """Another rank has told its own."""
        self._left[rank] = json.loads(counts)

    # ---- what follows for this rank

    def hopeless(self) -> str | None:
        """Why this rank waits for what will never come, when that was so at the last call, too: what was on its way then has arrived."""
        links = self._links
        found = [why for key in links for r in sorted(self._left) if (why := self._never_answered(key, *links[key], r)) is not None]
        before, self._suspect = self._suspect, found[0] if found else None
        return self._suspect if self._suspect == before else None

    def _never_answered(self, key: str, link: Link, members: tuple[int, ...], rank: int) -> str | None:
        """Why something that this rank has started on a link will never be answered by `rank`; None if it may be."""
        counts = self._left[rank]
        joined = _ELSEWHERE in counts
        turn = counts.get(key, None if joined else 0)
        if rank not in members or turn is None or (what := link.operations.started_beyond(turn)) is None:
            return None
        user = link.user()
        if user is not None and user.called:
            return f"{user.called} was called on rank {self._rank}, and rank {rank} ended without it; call it on every rank"
        if not joined:
            return f"rank {rank} left (by the end of the script, or sys.exit) without a collective that rank {self._rank} has started: {what}"
        if user is None:  # dropped here too: nobody waits
            return None
        names = user.names
        return (
            f"rank {rank} joined after it had dropped the DistributedOptimizer of {', '.join(map(repr, names[:3]))}{', …' * (len(names) > 3)} "
            f"({len(names)} parameters), which rank {self._rank} still uses; keep it on all ranks until all have joined, or drop it on all"
        )
