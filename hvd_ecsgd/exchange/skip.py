"""When a worker or a server stays silent for a step: policies for `CompSkip` and `SkipAllReduce`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..arguments import check_integer, check_number
from ..segments import Key, Segment

__all__ = ["Bernoulli", "Every", "NormBased", "Rounds", "SkipPolicy"]


@runtime_checkable
class SkipPolicy(Protocol):
    """Decides who sends in a step. A frozen dataclass: configuration only; consecutive skips are counted in the exchange's state."""

    @property
    def cap(self) -> int | None:
        """Most skips in a row: the step after them is sent whatever the policy says. None: no limit."""
        ...

    @property
    def predictable(self) -> bool:
        """The decision depends on the key only: every rank can compute every rank's, at the start of the step."""
        ...

    def sends(self, key: Key, energy: float, movement: float) -> bool:
        """Whether to send. `key` names step and rank (None: one decision for all ranks).

        `energy` is the squared norm of the update that waits to be sent, `movement` a running mean of that of the model's steps; both are NaN
        for predictable policies.
        """
        ...


def _check_cap(cap: int | None, who: str) -> None:
    if cap is not None:
        check_integer(cap, f"{who}: cap", "None or an integer ≥ 0 (skips in a row)", least=0)


@dataclass(frozen=True)
class Every:
    """Send in every k-th step: when step − offset is divisible by k. `offset` None is the worker's rank, so that workers take turns; 0 for
    servers and in an all-reduce, where all decide together. `Every(1)` never skips."""

    k: int = 1
    offset: int | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.k, "Every: k", "an integer ≥ 1 (send in every k-th step)", least=1)
        if self.offset is not None:
            check_integer(self.offset, "Every: offset", "an integer, or None for the rank")
        _check_cap(self.cap, "Every")

    @property
    def predictable(self) -> bool:
        return True

    def sends(self, key: Key, energy: float, movement: float) -> bool:
        offset = (key.rank or 0) if self.offset is None else self.offset
        return (key.step - offset) % self.k == 0


@dataclass(frozen=True)
class Rounds:
    """For both sides: all workers and all servers send in the last of every k steps, and nobody sends in the others. A *reconstruction*, ours.

    Where servers are silent in steps in which workers send, what was sent waits once more; here it waits on the workers alone. Momentum does not bear
    waiting: on a quadratic, compressed, it makes the largest stable lr/(1 − momentum) three to six times smaller, whoever skips. So
    `comp_skip(Rounds(2), Rounds(2))` is best over SGD with momentum 0 at the rate lr/(1 − momentum). What that keeps, and what else was tried:
    `hvd-ecsgd reproduce skips`, docs/reproduce.md.
    """

    k: int = 2
    cap: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.k, "Rounds: k", "an integer ≥ 1 (send in the last of k steps)", least=1)
        _check_cap(self.cap, "Rounds")

    @property
    def predictable(self) -> bool:
        return True

    def sends(self, key: Key, energy: float, movement: float) -> bool:
        return (key.step + 1) % self.k == 0


@dataclass(frozen=True)
class Bernoulli:
    """Send with probability q, drawn for each step and worker (once for all servers) from a hash of `seed`, the method's seed, step and rank.

    A sender with C contracting by δ then contracts by qδ. Without `cap` there is no bound on skips in a row.
    """

    q: float = 0.5
    seed: int = 0
    cap: int | None = None

    def __post_init__(self) -> None:
        check_number(self.q, "Bernoulli: q", "a probability of sending in (0, 1]", lambda q: 0 < q <= 1)
        check_integer(self.seed, "Bernoulli: seed", "an integer (the same on every rank)")
        _check_cap(self.cap, "Bernoulli")

    @property
    def predictable(self) -> bool:
        return True

    def sends(self, key: Key, energy: float, movement: float) -> bool:
        return key.bits(Segment("", 0, 0), f"bernoulli.{self.seed}") < self.q * 2**64


@dataclass(frozen=True)
class NormBased:
    """Send when ‖η·u‖² ≥ threshold · (running mean of ‖x⁺ − x‖²): when what waits is large against how the model moves. Ours, after LAG
    (Chen, Giannakis, Sun, Yin 2018), which compares a change of gradients with recent steps of the model.

    Decided by each worker for each bucket, and by each server for its pieces of it, so results depend on `bucket_bytes`. Larger thresholds skip
    more. With noisy gradients and a strong compressor what waits is far above the movement: with signs both ways on a small problem (3
    workers, momentum .9, 60 steps) workers skipped 0, 5, 55 % at thresholds 8, 16, 64, and servers, alone, 13, 18, 21 %.
    """

    threshold: float = 32.0
    cap: int | None = 16

    def __post_init__(self) -> None:
        check_number(self.threshold, "NormBased: threshold", "a finite number ≥ 0 (0 never skips)", lambda threshold: threshold >= 0)
        _check_cap(self.cap, "NormBased")

    @property
    def predictable(self) -> bool:
        return False

    def sends(self, key: Key, energy: float, movement: float) -> bool:
        return energy >= self.threshold * movement
