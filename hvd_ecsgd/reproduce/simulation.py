"""Training on simulated workers, and running many such trainings on all cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch

from ..compression import AnyCompression
from ..optimizer import DistributedOptimizer
from ..transport import Transport, run_simulated
from ..transport.base import Handle

__all__ = ["Problem", "Size", "Trained", "run_all", "train"]


@dataclass(frozen=True)
class Size:
    """How much to run. `smoke`: seconds, for tests; its figures mean nothing. `full`: larger, and the learning-rate grid for every seed."""

    seeds: int = 3
    smoke: bool = False
    full: bool = False
    processes: int = 0
    """0: as many as there are cores, at most 8."""

    def pick(self, smoke: int, normal: int, full: int) -> int:
        return smoke if self.smoke else full if self.full else normal


class Problem(Protocol):
    """Data and model. What is drawn depends on the arguments alone."""

    def model(self, seed: int) -> torch.nn.Module: ...

    def batch(self, rank: int, workers: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Worker `rank`'s inputs and labels in this step."""
        ...

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, float]:
        """Figures of a model, over all the data they are about."""
        ...


@dataclass
class Trained:
    """What one training ended with. `curve`: (step, figures). `sent`: bytes that left one worker; `dense`: those of an uncompressed ring;
    `by_pass`: of `sent`, what left it in an exchange of two passes, to servers ("push") and as a server ("pull")."""

    figures: dict[str, float]
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    sent: int = 0
    dense: int = 0
    by_pass: dict[str, int] = field(default_factory=dict)


class Passes:
    """A transport that counts what leaves this worker in each pass, by the last part of the collective's name."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self.sent = transport, dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _count(self, name: str, n_bytes: int) -> None:
        what = name.rpartition(".")[2]
        self.sent[what] = self.sent.get(what, 0) + n_bytes

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        self._count(name, t.nbytes - splits[self._transport.rank] * t.element_size())
        return self._transport.alltoall(t, splits, name, received)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        self._count(name, (self._transport.size - 1) * t.nbytes)
        return self._transport.allgather(t, name, sizes)


Watch = Callable[[int, torch.nn.Module, Any, Transport], None]
"""Called on every worker with (step, model, optimizer, transport): after each backward pass (`before_step`), or after each step."""


def train(
    problem: Problem,
    make: Callable[[], AnyCompression],
    *,
    steps: int,
    lr: float,
    seed: int,
    workers: int = 8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    milestones: Sequence[int] = (),
    points: int = 20,
    before_step: Watch | None = None,
    after_step: Watch | None = None,
) -> Trained:
    """SGD on simulated workers, evaluated at x about `points` times; the learning rate is multiplied by .1 at `milestones`."""
    every = steps // points or steps

    def worker(transport: Transport) -> Trained:
        model, passes = problem.model(seed), Passes(transport)
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=cast(Transport, passes))
        curve: list[tuple[int, dict[str, float]]] = []

        def look(step: int) -> None:
            if transport.rank == 0:
                with optimizer.compression.at("averaged"), torch.no_grad():
                    curve.append((step, dict(problem.evaluate(model))))

        for step in range(steps):
            if step % every == 0:
                look(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.1 ** sum(step >= m for m in milestones)
            optimizer.zero_grad()
            inputs, labels = problem.batch(transport.rank, workers, step, seed)
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            if before_step is not None:
                before_step(step, model, optimizer, transport)
            optimizer.step()
            if after_step is not None:
                after_step(step, model, optimizer, transport)
        look(steps)
        traffic = optimizer.compression.traffic
        return Trained(curve[-1][1] if curve else {}, curve, traffic.sent, traffic.dense, passes.sent)

    return run_simulated(workers, worker, timeout=600.0)[0]


def _begin() -> None:
    """Of each process: one core; and silence about steps undone, as of runs that diverge at the largest rate of a grid."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "a gradient or a payload held an inf or NaN")


def run_all(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], size: Size, what: str) -> list[Any]:
    """[function(*job) for job in jobs], on all cores unless it is a smoke run. `function` is a module's, arguments and results are picklable."""
    processes = min(size.processes or min(os.cpu_count() or 1, 8), len(jobs))
    if size.smoke or processes == 1:
        return [function(*job) for job in jobs]
    results: dict[int, Any] = {}
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, context, initializer=_begin) as pool:
        numbers = {pool.submit(function, *job): i for i, job in enumerate(jobs)}
        for done, future in enumerate(as_completed(numbers), 1):
            results[numbers[future]] = future.result()
            end = "\n" if done == len(jobs) or not sys.stderr.isatty() else "\r"
            if sys.stderr.isatty() or done == len(jobs) or done % max(1, len(jobs) // 5) == 0:
                print(f"{what}: {done} of {len(jobs)} runs", end=end, file=sys.stderr, flush=True)
    return [results[i] for i in range(len(jobs))]
