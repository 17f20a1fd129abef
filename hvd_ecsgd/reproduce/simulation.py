"""Training on simulated workers, and running many such trainings on all cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..compression import AnyCompression
from ..optimizer import DistributedOptimizer
from ..transport import Transport, run_simulated

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
    """What one training ended with. `curve`: (step, figures). `sent`: bytes that left one worker; `dense`: those of an uncompressed ring."""

    figures: dict[str, float]
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    sent: int = 0
    dense: int = 0


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
        model = problem.model(seed)
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
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
        return Trained(curve[-1][1] if curve else {}, curve, traffic.sent, traffic.dense)

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
