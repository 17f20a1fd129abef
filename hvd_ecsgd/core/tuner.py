"""Which of several methods is fastest here: tried in the training itself, decided by all ranks alike.

Steps of the training are what is timed, so computation, kernels, network, other jobs and whatever the script does between steps count as they do for
the user. What one method holds back the next one sends, since all of them have the feedback rule in common (see `switch`).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..arguments import check_integer
from ..errors import CompressionError
from ..evidence import fastest
from ..transport.base import Transport
from .method import Method

__all__ = ["DENSE", "Candidate", "Decision", "Tuner"]

DENSE = "none"
"""The candidate that sends everything."""
WINDOW = 100
"""Steps over which a median is taken that is compared with the one before."""
DRIFT = 1.5
"""By so much a step has become slower or faster before all is tried again."""

_log = logging.getLogger("hvd_ecsgd")


class Candidate(Protocol):
    """`Compression.<preset>(…)`."""

    @property
    def method(self) -> Method: ...


class Tuned(Protocol):
    """What is switched: a bound compression."""

    @property
    def steps_taken(self) -> int:
        """By the aggregator, undone ones too."""
        ...

    @property
    def transport(self) -> Transport: ...

    def switch(self, compression: Candidate) -> None: ...

    def check_together(self, what: str) -> None: ...


@dataclass(frozen=True)
class Decision:
    """What was decided after `step` steps, and by which figures: the median seconds of a step of each method, of the slowest rank."""

    step: int
    chosen: str
    seconds: Mapping[str, float]
    why: str

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in self.seconds.items())
        return f"after {self.step} steps ({self.why}): {self.chosen}; a step took {figures}"


class StepTimes:
    """Seconds of steps, from the end of one to the end of the next. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.taken: list[float] = []
        self.step = 0
        """The number of steps that have ended."""
        self._since: float | None = None

    def end(self, step: int, counts: bool) -> bool:
        """The last of `step` steps has ended, and `counts`. False when it had before: an unmodified Horovod's optimizer ends each twice."""
        passed = step - self.step
        if passed == 0:
            return False
        now, self.step = self.clock(), step
        if counts and passed > 0 and self._since is not None:  # less than none: state was loaded
            self.taken.append((now - self._since) / passed)
        return True

    def begin(self) -> None:
        """The next step begins."""
        self._since = self.clock()

    def forget(self) -> None:
        """Of what was taken so far, and when the step began that is under way."""
        self.taken, self._since = [], None


class Tuner:
    """Tries `candidates` for `trial` steps each, of which the first is not counted, and goes on with the fastest; with the dense one where no other
    takes less than nine tenths of its time. `steps`: of a candidate that needs more steps than dense training, how many times as many.

    All is tried again after `every` steps, if that is given, and when the median of a hundred steps has changed by half from one hundred to the
    next.
    """

    def __init__(
        self, candidates: Mapping[str, Candidate], trial: int = 5, every: int | None = None, steps: Mapping[str, float] | None = None
    ) -> None:
        if DENSE not in candidates or len(candidates) < 2:
            raise CompressionError(f"auto(): expected candidates for '{DENSE}' and at least one other name, got {sorted(candidates)}.")
        dense = candidates[DENSE].method
        for name, candidate in candidates.items():
            if candidate.method.feedback != dense.feedback:
                raise CompressionError(
                    f"auto(): candidate '{name}' has the feedback rule {candidate.method.feedback}, and '{DENSE}' {dense.feedback}; what one holds "
                    "back could not be sent by the other. Name methods with one rule (presets in gradient units have ErrorFeedback())."
                )
        check_integer(trial, "auto(): trial", "a number of steps ≥ 2, the first of which is not counted", least=2)
        if every is not None:
            check_integer(every, "auto(): every", f"more steps than one trial of all takes ({trial * len(candidates)}), or None", least=1)
            if every <= trial * len(candidates):
                raise CompressionError(f"auto(): every={every}: expected more steps than a trial of all takes, {trial * len(candidates)}, or None.")
        self.candidates, self.trial, self.every = dict(candidates), trial, every
        self.steps = {name: 1.0 for name in candidates} | dict(steps or {})
        self.decisions: list[Decision] = []
        self.times = StepTimes()
        self.begin("training began")

    def __repr__(self) -> str:
        """What must be equal on all ranks."""
        return f"auto({', '.join(f'{name}: {c.method}' for name, c in self.candidates.items())}; trial={self.trial}, every={self.every})"

    def begin(self, why: str, current: str = DENSE) -> None:
        """Try all, from the next step on; `current` is what is done now, and comes first."""
        self.current, self._why = current, why
        self._waiting = [name for name in self.candidates if name != current]
        self._tried: dict[str, float] = {}
        self._usual: float | None = None
        self.times.forget()

    def went_back(self) -> None:
        """State of what is done now is loaded: all is tried anew."""
        self.begin("state was loaded", self.current)

    def went_on_as(self, fits: Callable[[Method], bool], of: Method) -> Candidate | None:
        """The candidate that, switched to from `of`, `fits`; with that one all is tried anew."""
        for name, candidate in self.candidates.items():
            if fits(of.switched(candidate.method)):
                self.begin("state was loaded", name)
                return candidate
        return None

    def after_step(self, tuned: Tuned) -> None:
        """A step has ended, or another optimizer's. Collective where a trial or a window ends, which is at the same step on all ranks."""
        step = tuned.steps_taken
        if self.times.end(step, counts=step > self.candidates[self.current].method.warmup_steps):
            if self.trying:
                self._try(tuned)
            else:
                self._watch(tuned)
            self.times.begin()

    @property
    def trying(self) -> bool:
        """No decision is made yet, or all is being tried again."""
        return len(self._tried) < len(self.candidates)

    def _try(self, tuned: Tuned) -> None:
        """Go on to the next method when this one was tried for long enough, and after the last one decide."""
        if len(self.times.taken) < self.trial:
            return
        self._tried[self.current] = self._of_slowest(tuned, statistics.median(self.times.taken[1:]))
        if self._waiting:
            next_ = self._waiting.pop(0)
        else:
            seconds = {name: self._tried[name] for name in self.candidates}
            next_ = fastest(seconds, self.steps, DENSE)
            self.decisions.append(Decision(self.times.step, next_, seconds, self._why))
            if tuned.transport.rank == 0:
                _log.info("Compression.auto %s.", self.decisions[-1])
        if next_ != self.current:
            tuned.switch(self.candidates[next_])
            self.current = next_
        self.times.forget()

    def _watch(self, tuned: Tuned) -> None:
        """After the decision: whether to try again."""
        if self.every is not None and self.times.step - self.decisions[-1].step >= self.every:
            self.begin(f"every {self.every} steps", self.current)
        elif len(self.times.taken) >= WINDOW:
            usual, before = self._of_slowest(tuned, statistics.median(self.times.taken)), self._usual
            self._usual = usual
            self.times.forget()
            if before is not None and not 1 / DRIFT < usual / before < DRIFT:
                self.begin(f"a step took {1e3 * usual:.1f} ms and {1e3 * before:.1f} ms before", self.current)

    def _of_slowest(self, tuned: Tuned, mine: float) -> float:
        """The largest of all ranks, the same bits on all."""
        tuned.check_together("Compression.auto")
        tensor, transport = torch.tensor([mine], dtype=torch.float64, device="cpu"), tuned.transport
        return max(float(t) for t in transport.allgather(tensor, f"auto.{self.times.step}", [1] * transport.size).wait())
