"""Tasks that go on side by side: each starts messages, waits until they are complete, and goes on. Stages, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeAlias

from mpi4py import MPI

from .lost import Look
from .memory import Copy

__all__ = ["Lanes", "Stages", "Task", "after"]

Task: TypeAlias = Generator[Sequence[MPI.Request] | Copy, None, None]
"""A part of a collective: it starts messages, yields the requests, or the copy, that must be complete before it goes on, and holds what MPI reads or
writes."""
Stages: TypeAlias = Iterator[Iterable[Task]]
"""A collective: tasks that go on side by side, and when all have come to their ends, those that follow. It is asked for them only then."""


def after(copy: Copy | None, stages: Callable[[], Stages]) -> Stages:
    """Stages that begin when the copy is over, if there is one."""
    if copy is not None:
        yield [_awaited(copy)]
    yield from stages()


def _awaited(copy: Copy) -> Task:
    yield copy


class _Lane:
    """A task, and how many requests it waits for."""

    __slots__ = ("missing", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.missing = 0


class Lanes:
    """A lane for each task of a stage, until it comes to its end; one stage of `stages` after the other."""

    def __init__(self, stages: Stages, look: Look) -> None:
        self._stages, self._look_at = stages, look
        self.ended = False
        """Whether the last stage has come to its end. Between two stages no lane is open, which who looks then must not take for the end."""
        self._open: set[_Lane] = set()  # those that have not come to their ends
        self._unbegun: deque[_Lane] = deque()  # of these, those that have no room yet
        self._ready: deque[_Lane] = deque()  # lanes that wait for nothing
        self._requests: list[MPI.Request] = []
        self._owners: list[_Lane | None] = []  # of the requests; None of those that are complete
        self._copies: list[tuple[Copy, _Lane]] = []  # that lanes wait for
        self._go_on()

    @property
    def active(self) -> int:
        """Lanes that have begun."""
        return len(self._open) - len(self._unbegun)

    def advance(self, room: int) -> bool:
        """Go on as far as possible without waiting, in at most so many lanes at once. Whether anything was done. Raises what a task raises."""
        moved = False
        while self._begin(room) or self._look():
            moved = True
            while self._ready:
                self._step(self._ready.popleft())
        return moved

    def _go_on(self) -> None:
        """Take the next stage in which there is anything to do, if no lane is open."""
        while not self._open:
            if (tasks := next(self._stages, None)) is None:
                self.ended = True
                return
            lanes = [_Lane(task) for task in tasks]
            self._open.update(lanes)
            (self._ready if len(lanes) == 1 else self._unbegun).extend(lanes)  # what is small waits for nobody

    def _begin(self, room: int) -> bool:
        """Whether lanes are ready to go on."""
        while self._unbegun and self.active < room:
            self._ready.append(self._unbegun.popleft())
        return bool(self._ready)

    def _step(self, lane: _Lane) -> None:
        """Let a task go on to where it waits again."""
        try:
            requests = next(lane.task)
        except StopIteration:
            self._open.remove(lane)
            self._go_on()
            return
        if isinstance(requests, Copy):
            self._copies.append((requests, lane))
            return
        if not requests:
            self._ready.append(lane)
        lane.missing = len(requests)
        self._requests += requests
        self._owners += [lane] * len(requests)

    def _look(self) -> bool:
        """Whether requests have become complete; lanes without others are ready then. One look at all: each lets MPI look at the network."""
        over = [(copy, lane) for copy, lane in self._copies if copy.over]
        for pair in over:
            self._copies.remove(pair)
            self._ready.append(pair[1])
        if not self._requests:
            return bool(over)
        complete = self._look_at(self._requests)
        for i in complete or ():
            lane, self._owners[i] = self._owners[i], None
            assert lane is not None
            lane.missing -= 1
            if lane.missing == 0:
                self._ready.append(lane)
        for i in sorted(complete or (), reverse=True):  # the last one takes the place of each
            request, owner = self._requests.pop(), self._owners.pop()
            if i < len(self._requests):
                self._requests[i], self._owners[i] = request, owner
        return bool(complete or over)
