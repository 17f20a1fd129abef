"""n workers in one process, one thread each: the same code as on n machines, with every sum formed in rank order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from ..errors import TransportError
from .base import Handle, sum_by_rank_

__all__ = ["SimulatedTransport", "run_simulated"]

T = TypeVar("T")

_GLANCE = 1e-5  # seconds in which others may get their turn, of a worker that looks whether something is done


class _Hub:
    """Where the workers meet. Collective number i of one rank belongs to number i of the others; the names must agree."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self.changed = threading.Condition()
        self.posted: dict[int, dict[int, tuple[str, Any]]] = {}
        self.taken: dict[int, int] = {}
        self.failure: str | None = None
        self.turn = threading.Lock()

    def fail(self, why: str) -> None:
        with self.changed:
            self.failure = self.failure or why
            self.changed.notify_all()

    def post(self, number: int, rank: int, name: str, value: Any) -> None:
        with self.changed:
            slot = self.posted.setdefault(number, {})
            for other, (other_name, _) in slot.items():
                if other_name != name:
                    self.failure = self.failure or (
                        f"collective {number}: rank {rank} started '{name}', rank {other} '{other_name}'; "
                        "every rank must start the same collectives in the same order."
                    )
            slot[rank] = (name, value)
            if len(slot) == self.size or self.failure is not None:
                self.changed.notify_all()

    def complete(self, number: int) -> bool:
        if self.failure is not None:
            raise TransportError(self.failure)
        return len(self.posted.get(number, {})) == self.size

    def collect(self, number: int, name: str) -> list[Any]:
        with self.changed:
            if not self.changed.wait_for(lambda: self.complete(number), self.timeout):
                missing = sorted(set(range(self.size)) - set(self.posted.get(number, {})))
                self.failure = f"'{name}': ranks {missing} did not start it within {self.timeout:g} s."
                self.changed.notify_all()
                raise TransportError(self.failure)
            parts = [self.posted[number][r][1] for r in range(self.size)]
            self.taken[number] = self.taken.get(number, 0) + 1
            if self.taken[number] == self.size:  # everybody has it: let the memory go
                del self.posted[number], self.taken[number]
            return parts


class _Turn:
    """One worker computes at a time: threads that all do spend most of their time on handing the interpreter lock around (half of it, measured)."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting = 0  # threads of this worker
        self._over = False
        self._changing = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        with self._changing:
            self._over = True
            if self._waiting == 0:
                self._lock.release()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let other workers compute meanwhile."""
        with self._changing:
            self._waiting += 1
            if self._waiting == 1 and not self._over:
                self._lock.release()
        try:
            yield
        finally:
            with self._changing:
                self._waiting -= 1
                if self._waiting == 0 and not self._over:
                    self._lock.acquire()


class _Handle(Generic[T]):
    def __init__(self, hub: _Hub, turn: _Turn, number: int, name: str, finish: Callable[[list[Any]], T]) -> None:
        self._hub, self._turn, self._number, self._name, self._finish = hub, turn, number, name, finish
        self._result: list[T] = []

    def done(self) -> bool:
        with self._hub.changed:
            if self._result or self._hub.complete(self._number):
                return True
        with self._turn.aside():
            time.sleep(_GLANCE)
        return False

    def wait(self) -> T:
        if not self._result:
            with self._turn.aside():
                parts = self._hub.collect(self._number, self._name)
            self._result.append(self._finish(parts))
        return self._result[0]


class SimulatedTransport:
    """Worker `rank` of a simulated group; made by `run_simulated`.

    What is handed over is copied at once, as a network would; all-reduce sums in rank order (16-bit types in float32, rounded once).
    """

    def __init__(self, hub: _Hub, rank: int, turn: _Turn) -> None:
        self.rank = rank
        self.size = hub.size
        self.divisor = hub.size
        self._hub, self._turn = hub, turn
        self._number = 0

    def _start(self, name: str, value: Any, finish: Callable[[list[Any]], T]) -> Handle[T]:
        number = self._number
        self._number += 1
        self._hub.post(number, self.rank, name, value)
        return _Handle(self._hub, self._turn, number, name, finish)

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        def finish(parts: list[torch.Tensor]) -> torch.Tensor:
            for r, part in enumerate(parts):
                if part.shape != t.shape or part.dtype != t.dtype:
                    raise TransportError(
                        f"all-reduce '{name}': rank {self.rank} holds {tuple(t.shape)} {t.dtype}, rank {r} sent {tuple(part.shape)} {part.dtype}."
                    )
            return sum_by_rank_(t, [parts[0].clone(), *parts[1:]])  # the parts are everybody's

        return self._start(name, t.clone(), finish)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        return self._start(name, t.clone(), lambda parts: list(parts))

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        if len(splits) != self.size or sum(splits) != t.shape[0]:
            raise TransportError(f"all-to-all '{name}': splits {list(splits)} must be {self.size} numbers that add up to {t.shape[0]} rows.")
        return self._start(name, list(torch.split(t.clone(), list(splits))), lambda parts: [sent[self.rank] for sent in parts])

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        return self._start(name, t.clone() if self.rank == root else None, lambda parts: t.copy_(parts[root]))


def run_simulated(size: int, worker: Callable[[SimulatedTransport], T], timeout: float = 120.0) -> list[T]:
    """Run `worker(transport)` on `size` threads and return the results by rank.

    They take turns in computing (torch's own threads within an operation are another matter), so a worker that waits for another one otherwise than
    in a collective waits for ever. The first exception of a worker is raised here, after the others were told. A collective that some rank does not
    start within `timeout` seconds is an error. Workers share the process: draw data from generators of their own, not from the global one.
    """
    hub = _Hub(size, timeout)
    results: dict[int, T] = {}
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        with (turn := _Turn(hub.turn)):
            try:
                results[rank] = worker(SimulatedTransport(hub, rank, turn))
            except BaseException as error:
                errors.append((rank, error))
                hub.fail(f"rank {rank} failed: {error!r}")

    threads = [threading.Thread(target=run, args=(r,), name=f"worker-{r}", daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0][1]
    return [results[r] for r in range(size)]
