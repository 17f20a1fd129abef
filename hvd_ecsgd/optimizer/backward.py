"""Which backward pass a gradient comes from, whether that is one within another, and whether it came to its end."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import FrameType

import torch

from .executor import Observer

__all__ = ["BackwardTimer", "BackwardPass", "BackwardPasses"]

_engine_run = getattr(torch.autograd.graph, "_engine_run_backward", None)
_RUNS = frozenset(f.__code__ for f in ([_engine_run] if _engine_run else [torch.autograd.backward, torch.autograd.grad]))  # torch before 2.4
"""Of the functions in which a script's thread waits while torch's engine runs a backward pass: one of them is on its stack for each."""

_WHOLE = "of hvd_ecsgd: stands for this call"
"""No name that a function could give to a variable of its own."""

_NODE = torch.autograd.function.BackwardCFunction.apply.__code__
"""Of what the engine calls for a node written in Python; with nothing below it on the stack in a thread of the engine's own."""


@dataclass(frozen=True, eq=False)
class BackwardPass:
    """One that a gradient has come from. Compared by identity."""

    whole: object
    """The same object for all passes within one that a script has started."""
    reentrant: bool
    """One within another: of torch.utils.checkpoint(…, use_reentrant=True), say."""


class BackwardPasses:
    """Those that gradients have come from since `forget`. Costs one look at a number for each gradient, and one callback for each pass."""

    def __init__(self) -> None:
        self._reentrant = False  # met once
        self._task, self._current = -1, BackwardPass(object(), False)
        self._open: dict[int, BackwardPass] = {}
        self.forget()

    def forget(self) -> None:
        """What was interrupted is dealt with."""
        self.interrupted = False
        if int(torch._C._current_graph_task_id()) == -1:
            self._task, self._open = -1, {}

    def current(self) -> BackwardPass:
        """In the hook of a gradient: the pass that it comes from."""
        task = int(torch._C._current_graph_task_id())
        if task != self._task or task == -1:
            whole, reentrant, here = _look(self._reentrant)
            if not here and self._open and _running() > 1:  # a reentrant one, part of which runs in another thread (of another device)
                reentrant = True
            self._reentrant = self._reentrant or reentrant
            self._task, self._current = task, BackwardPass(whole or object(), reentrant)
            if task != -1:
                self._begin(task)
        return self._current

    def _begin(self, task: int) -> None:
        if task in self._open:  # goes on after one within it
            return
        before = [p for p in self._open.values() if not p.reentrant and p.whole is not self._current.whole]
        if before and not self._current.reentrant:
            self.interrupted = True
            self._open = {}
        self._open[task] = self._current
        opened = self._open

        def ended() -> None:
            opened.pop(task, None)

        torch.autograd.Variable._execution_engine.queue_callback(ended)  # not called when something raises; torch's own DDP uses it, too

    def check_ended(self) -> None:
        """After a backward pass: one that has not come to its end was interrupted by an exception."""
        if self._open and int(torch._C._current_graph_task_id()) == -1:
            self.interrupted = True


def _look(everywhere: bool) -> tuple[object | None, bool, bool]:
    """What stands for the whole backward pass (None if that cannot be seen), whether this is one within it, and whether a call of one was seen in
    this thread.

    `everywhere`: looks for it in other threads too.
    """
    frame: FrameType | None = sys._getframe(2)
    bottom = frame
    outermost, count = None, 0
    while frame is not None:
        if frame.f_code in _RUNS:
            outermost, count = frame, count + 1
        bottom, frame = frame, frame.f_back
    assert bottom is not None
    in_engine = bottom.f_code is _NODE  # and the script's thread waits elsewhere
    reentrant = count > (0 if in_engine else 1)
    if in_engine or (outermost is None and everywhere):
        waiting = [calls[-1] for calls in map(_calls, sys._current_frames().values()) if calls and calls[-1] is not outermost]
        outermost = waiting[0] if len(waiting) == 1 else None
    # What is laid beside a call's variables stays there until the call returns. Referred to for longer, it keeps none of them alive.
    return (None if outermost is None else outermost.f_locals.setdefault(_WHOLE, object())), reentrant, count > 0


def _running() -> int:
    """How many backward passes are running in this process."""
    return sum(len(_calls(frame)) for frame in sys._current_frames().values())


def _calls(frame: FrameType | None) -> list[FrameType]:
    """Of backward passes, on this stack, innermost first."""
    found = []
    while frame is not None:
        if frame.f_code in _RUNS:
            found.append(frame)
        frame = frame.f_back
    return found


class BackwardTimer:
    """Tells `observer`, if there is one, of each backward pass, from its first complete gradient to its end."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._running = False

    def start(self) -> None:
        """A gradient is complete. Called within a backward pass."""
        observer = self._observer
        if observer is None or self._running:
            return
        self._running, begin = True, time.perf_counter()

        def ended() -> None:
            self._running = False
            observer("backward", "BACKWARD", begin, time.perf_counter())

        torch.autograd.Variable._execution_engine.queue_callback(ended)  # as torch's own DDP does

    def reset(self) -> None:
        """The step is over, also where its backward pass never came to its end."""
        self._running = False
