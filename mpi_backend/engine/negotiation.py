"""When does a named tensor run, and with which others: the coordinator's decisions. No MPI, no threads, no clock of its own.

The coordinator of a process set (its first rank) hears of every request, and answers with a list of decisions that all ranks carry out in that
order. So ranks may submit in any order; what runs first is what was complete first *there*. A name is free again once it has been decided on.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..environment import seconds, switch

__all__ = ["Coordinator", "Decision", "Fail", "Join", "Joined", "JoinFailed", "Leave", "Left", "Message", "Reduce", "Request", "Run", "StallCheck",
           "Withdraw", "automatic_name"]  # fmt: skip

_SHOWN = 360
"""Characters of a request's text in an error message; of a longer one its beginning, and the place where it differs."""

_UNNAMED = "noname."


@dataclass(frozen=True)
class Reduce:
    """What a rank needs to know to take part in an all-reduce that it has not submitted itself (after `join`)."""

    op: str
    average: bool
    prescale: float
    postscale: float
    tensors: tuple[tuple[torch.dtype, int], ...]
    """Type and number of elements of each."""

    @property
    def bytes(self) -> int:
        return sum(dtype.itemsize * n for dtype, n in self.tensors)

    @property
    def key(self) -> tuple[Any, ...] | None:
        """Requests with equal keys may run as one; None: this one runs alone."""
        dtypes = {dtype for dtype, _ in self.tensors}
        return (self.op, self.average, self.prescale, self.postscale, *dtypes) if len(dtypes) == 1 else None


@dataclass(frozen=True)
class Request:
    """A rank is ready for the collective `name`. `text` must be equal on all ranks; `extra` need not, and everybody's reaches everybody."""

    name: str
    text: str
    extra: Any = None
    reduce: Reduce | None = None
    """Set for all-reduces, the only collectives that go on without ranks that have joined."""


def automatic_name(joins: int, number: int) -> str:
    """Of a collective that the user gave none: its number among those of its rank, since the last join. It does not say which kind it is: so a
    mix-up is noticed, not waited for."""
    return f"{_UNNAMED}{joins}.{number}"


def _number(name: str) -> tuple[int, int] | None:
    """Of a collective without a name, or one that it is made of (`….sz`)."""
    joins, number, *_ = [*name.removeprefix(_UNNAMED).split("."), ""]
    return (int(joins), int(number)) if name.startswith(_UNNAMED) and joins.isdecimal() and number.isdecimal() else None


def _step(name: str) -> tuple[int, str] | None:
    """Of what is announced of an optimizer's step: its number, and the optimizer."""
    found = re.fullmatch(r"step (\d+) of (DistributedOptimizer \d+)", name)
    return None if found is None else (int(found[1]), found[2])


@dataclass(frozen=True)
class Join:
    """The rank has no more data: all-reduces go on with zeros from it until all ranks have joined."""


@dataclass(frozen=True)
class Leave:
    """The rank shuts down: what it has not submitted by now will never come."""


@dataclass(frozen=True)
class Withdraw:
    """The rank waits for the collective `name` no more. It fails there, unless it has been decided on."""

    name: str


Message: TypeAlias = Request | Withdraw | Join | Leave


@dataclass(frozen=True)
class Run:
    """Run these together, now. `extras[i]` are those of name i, by rank; None for ranks that have joined."""

    names: tuple[str, ...]
    extras: tuple[tuple[Any, ...], ...]
    reduces: tuple[Reduce, ...] = ()


@dataclass(frozen=True)
class Fail:
    """The collective `name` fails on `ranks`. `mismatch`: because they submitted different things."""

    name: str
    ranks: frozenset[int]
    message: str
    mismatch: bool = False


@dataclass(frozen=True)
class Joined:
    """Everybody has joined; `last` was the last."""

    last: int


@dataclass(frozen=True)
class JoinFailed:
    """The joining of `ranks` fails, because somebody left and will never join."""

    ranks: frozenset[int]
    message: str


@dataclass(frozen=True)
class Left:
    """Everybody shuts down."""


Decision: TypeAlias = Run | Fail | Joined | JoinFailed | Left


@dataclass
class _Entry:
    since: float
    requests: dict[int, Request] = field(default_factory=dict)
    warned: float = 0.0


@dataclass(frozen=True)
class StallCheck:
    """Horovod's variables. `warn`: seconds until a tensor that some ranks do not submit is reported, again after as many; `fail`: until it fails.
    None, from 0: never."""

    warn: float | None
    fail: float | None

    @staticmethod
    def from_environment() -> StallCheck:
        if switch("HOROVOD_STALL_CHECK_DISABLE", False):
            return StallCheck(None, None)
        return StallCheck(seconds("HOROVOD_STALL_CHECK_TIME_SECONDS", 60.0) or None, seconds("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0.0) or None)


class Coordinator:
    """Collects requests of `size` ranks and decides. `names_of_ranks`: how they are called in messages (their global ranks).

    `fusion_bytes`: all-reduces of at most so many bytes together, alike in type, operation and factors and complete at the same time, run as one.
    """

    def __init__(self, names_of_ranks: Sequence[int], fusion_bytes: int, stall: StallCheck) -> None:
        self._ranks = list(names_of_ranks)
        self._everyone = frozenset(range(len(self._ranks)))
        self._fusion_bytes = fusion_bytes
        self.stall = stall
        self._entries: dict[str, _Entry] = {}
        self._complete: list[_Entry] = []
        self._decided: list[Decision] = []
        self._joined: dict[int, None] = {}  # in the order of joining
        self._left: set[int] = set()
        self._unnamed: dict[int, tuple[int, int]] = {}  # by rank: the last number of an unnamed collective
        self._stalled: dict[str, tuple[set[int], str]] = {}  # failed names → ranks that have yet to submit them, and will be told

    def receive(self, rank: int, messages: Iterable[Message], now: float) -> None:
        """What a rank said, in the order in which it said it."""
        for message in messages:
            if isinstance(message, Request):
                self._submitted(rank, message, now)
                continue
            if isinstance(message, Withdraw):
                entry = self._entries.get(message.name)
                if entry is not None and entry.requests.pop(rank, None) is not None:
                    self._decided.append(Fail(message.name, frozenset({rank}), f"{message.name} was withdrawn."))
                    if not entry.requests:
                        del self._entries[message.name]
                continue
            if isinstance(message, Join):
                self._joined[rank] = None
                if len(self._joined) == len(self._everyone):
                    self._decided += self._fuse()
                    self._decided.append(Joined(self._ranks[rank]))
                    self._joined.clear()
            else:
                self._left.add(rank)
            for name in list(self._entries):
                self._look_at(name)
            if self._joined and (gone := self._left - self._joined.keys()):
                why = f"join: {self._list(gone)} shut down without joining. That rank finished, or ended after an error."
                self._decided += [*self._fuse(), JoinFailed(frozenset(self._joined), why)]
                self._joined.clear()
            if self._left == self._everyone:
                self._decided += [*self._fuse(), Left()]

    def take(self) -> list[Decision]:
        """What was decided since last time, to be carried out by all ranks in this order."""
        decided, self._decided = [*self._decided, *self._fuse()], []
        return decided

    def _submitted(self, rank: int, request: Request, now: float) -> None:
        if (number := _number(request.name)) is not None:
            self._unnamed[rank] = max(number, self._unnamed.get(rank, number))
        missing, why = self._stalled.get(request.name, (set(), ""))
        if rank in missing:
            missing.discard(rank)
            self._decided.append(Fail(request.name, frozenset({rank}), why))
            return
        self._entries.setdefault(request.name, _Entry(now)).requests[rank] = request
        self._look_at(request.name)

    def _look_at(self, name: str) -> None:
        entry = self._entries[name]
        submitted = entry.requests.keys()
        first = next(iter(entry.requests.values()))
        if gone := self._left - submitted:
            self._fail(name, f"{first.text}: {self._list(gone)} shut down without it. That rank finished, or ended after an error.")
        elif submitted | self._joined.keys() >= self._everyone:
            del self._entries[name]
            texts = {r.text for r in entry.requests.values()}
            if len(texts) > 1:
                self._decided.append(Fail(name, frozenset(submitted), self._differences(entry), mismatch=True))
            elif submitted != self._everyone and (first.reduce is None or first.reduce.op != "sum"):
                joined = self._list(self._everyone - submitted)
                self._decided.append(
                    Fail(name, frozenset(submitted), f"{first.text}: {joined} joined; only all-reduces with Average and Sum go on then.")
                )
            else:
                self._complete.append(entry)

    def _fail(self, name: str, why: str) -> None:
        entry = self._entries.pop(name)
        self._decided.append(Fail(name, frozenset(entry.requests), why))

    def _fuse(self) -> list[Decision]:
        """The complete requests, those that may run as one together."""
        runs: list[list[_Entry]] = []
        open_runs: dict[Any, tuple[list[_Entry], int]] = {}
        for entry in self._complete:
            reduce = next(iter(entry.requests.values())).reduce
            key = reduce.key if reduce else None
            if reduce is None or key is None or reduce.bytes > self._fusion_bytes:
                runs.append([entry])
                continue
            run, filled = open_runs.get(key, ([], 0))
            if not run or filled + reduce.bytes > self._fusion_bytes:
                run, filled = [], 0
                runs.append(run)
            run.append(entry)
            open_runs[key] = run, filled + reduce.bytes
        self._complete = []
        return [self._run(run) for run in runs]

    def _run(self, entries: list[_Entry]) -> Run:
        firsts = [next(iter(e.requests.values())) for e in entries]
        extras = tuple(tuple(e.requests[r].extra if r in e.requests else None for r in range(len(self._ranks))) for e in entries)
        return Run(tuple(f.name for f in firsts), extras, tuple(f.reduce for f in firsts if f.reduce is not None))

    # ---- stalls

    def check_stalls(self, now: float) -> list[str]:
        """Warnings to be printed. Names that have waited too long fail, on every rank: on those that submit them later, then."""
        warnings = []
        for name, entry in list(self._entries.items()):
            missing = self._everyone - entry.requests.keys() - self._joined.keys()
            text, age = next(iter(entry.requests.values())).text, now - entry.since
            if self.stall.fail is not None and age >= self.stall.fail:
                why = (
                    f"{text}: submitted by {self._list(entry.requests)}, but not by {self._list(missing)} within {self.stall.fail:g} seconds "
                    f"(HOROVOD_STALL_SHUTDOWN_TIME_SECONDS).{self._numbered_apart(name)}{self._meanwhile(missing)}"
                )
                self._fail(name, why)
                self._stalled[name] = set(missing), why
            elif self.stall.warn is not None and age - entry.warned >= self.stall.warn:
                entry.warned = age
                apart = self._numbered_apart(name)
                warnings.append(
                    f"{text}: submitted by {self._list(entry.requests)} {age:.0f} seconds ago, still missing on {self._list(missing)}"
                    f"{'.' * bool(apart)}{apart}"
                )
        return warnings

    def _numbered_apart(self, name: str) -> str:
        """Of a stalled collective without a name: how many of them each rank has submitted; of an optimizer's step: in which others ranks wait."""
        number = _number(name)
        if number is None:
            return self._steps_apart(name)
        counts: dict[int, list[int]] = {}
        for rank in sorted(self._everyone):
            joins, last = self._unnamed.get(rank, (number[0], -1))
            counts.setdefault(last + 1 if joins == number[0] else 0, []).append(rank)
        said = ", ".join(f"{count} on {self._list(ranks)}" for count, ranks in counts.items())
        return (
            f" Collectives without a name are matched by their number, and there have been {said}: a call that only some ranks make, or an error "
            "that only some ranks catch, takes the numbers apart. Name them, or make the same calls on all ranks."
        )

    def _steps_apart(self, name: str) -> str:
        waiting = [(step, self._entries[other]) for other in self._entries if (step := _step(other)) is not None]
        mine = _step(name)
        ranks = {step: self._list(entry.requests) for (step, optimizer), entry in waiting if mine is not None and optimizer == mine[1]}
        if len(ranks) < 2:
            return ""
        said = ", ".join(f"{ranks[step]} in step {step}" for step in sorted(ranks))
        return (
            f" The steps of this optimizer are numbered apart, {said}: after an error that only some ranks caught, or state that only some loaded. "
            "Let such errors end the program, and load one checkpoint on all ranks."
        )

    # ---- words

    def _meanwhile(self, ranks: Iterable[int]) -> str:
        """What the first of the ranks that are waited for waits for itself."""
        waits = [(r, next(iter(e.requests.values())).text) for r in sorted(ranks) for e in self._entries.values() if r in e.requests]
        return "".join(f" Meanwhile {self._list([r])} waits: {text}." for r, text in waits[:1])

    def _list(self, ranks: Iterable[int]) -> str:
        named = sorted(self._ranks[r] for r in ranks)
        return f"rank{'s' * (len(named) > 1)} {', '.join(map(str, named))}"

    def _differences(self, entry: _Entry) -> str:
        ranks_of: dict[str, list[int]] = {}
        for rank in sorted(entry.requests):
            ranks_of.setdefault(entry.requests[rank].text, []).append(rank)
        alike = sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*ranks_of, strict=False)))
        said = "; ".join(f"{self._list(ranks)}: {_shown(text, alike)}" for text, ranks in ranks_of.items())
        return f"Ranks submitted different collectives under one name. {said}. Names, types, shapes and options must be equal on every rank."


def _shown(text: str, alike: int) -> str:
    if len(text) <= _SHOWN:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    begin = max(100, alike - 40)
    return f"{text[:100]} … {text[begin : begin + _SHOWN - 100]} … (its hash: {digest})"
