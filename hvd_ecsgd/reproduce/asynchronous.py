"""Asynchronous DoubleSqueeze (Tang et al. 2019): staleness × compression, the number of workers, and a slow one, in simulated time."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..asynchronous import plan_of
from ..asynchronous.attendance import Attendance, Cutoff, Row, Stand, Together
from ..asynchronous.simulated import Event, SimulatedJob
from ..compression import Compression
from .report import Claim, Report, Spread, Table, seeds
from .simulation import Problem, Size, run_all

__all__ = ["claims", "run"]

METHODS = ("uncompressed", "1 bit", "top-k 2.7 %")
TAUS = (7, 16, 64)
WORKERS = (1, 2, 4, 8)
SLOW = 5.0
RATE = 0.025
"""Of each push."""
DELAY = 0.05
"""Of a message, in units of the median time that a worker takes for a gradient."""
TARGET = 1.0
"""Training loss."""


def _compression(method: str) -> Compression:
    if method == "uncompressed":
        return Compression.none()
    from ..compressors import Sign, TopK

    return Compression.double_squeeze(Sign() if method == "1 bit" else TopK(1 / 0.027), dense_below=0, dense_1d=False)


def _evaluated(problem: Problem, model: torch.nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return dict(problem.evaluate(model))


def one(method: str, workers: int, tau_max: int, slow: float, seed: int, pushes: int, until: float) -> dict[str, float]:
    """Train asynchronously for so many pushes, or until the training loss is `until`. `slow`: how much longer worker 0 takes. Times are lognormal."""
    from .problems import Digits

    torch.set_num_threads(1)
    problem = Digits(256)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = problem.model(seed)
        return model, torch.optim.SGD(model.parameters(), lr=RATE)

    job = SimulatedJob(plan_of(_compression(method).method, workers, tau_max, mean=False), make)
    random = torch.Generator().manual_seed(seed)
    steps = [0] * workers

    def lasts(event: Event) -> float:
        if event.what != "compute":
            return DELAY
        return math.exp(0.2 * float(torch.randn(1, generator=random))) * (slow if event.worker == 0 else 1.0)

    def backward(w: int, model: torch.nn.Module) -> None:
        inputs, labels = problem.batch(w, workers, steps[w], seed)
        steps[w] += 1
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]

    (server,), (master,) = job.servers, job.masters
    times: dict[Event, float] = {}
    now, figures = 0.0, _evaluated(problem, master)
    while server.version < pushes and figures["loss"] > until:
        for event in job.possible():
            if event not in times:
                times[event] = now + lasts(event)
        event = min(times, key=lambda e: (times[e], e.what, e.worker))
        now, before = times.pop(event), server.version
        job.happen(event, backward)
        if server.version > before and server.version % 20 == 0:
            figures = _evaluated(problem, master)
    figures = _evaluated(problem, master)
    sent = sum(w.sent + w.received for w in job.workers) / max(1, server.version)
    return {**figures, "time": now, "stalest": float(max(server.staleness, default=0)), "kilobytes": sent / 1e3, "pushes": float(server.version)}


def synchronous(slow: float, seed: int, steps: int, until: float, workers: int = 8) -> dict[str, float]:
    """The same with a mean over all workers in each step, whose time is that of the slowest, and the rate of all their pushes together."""
    from .problems import Digits

    torch.set_num_threads(1)
    problem = Digits(256)
    model = problem.model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE * workers)
    random = torch.Generator().manual_seed(seed)
    now, step = 0.0, 0
    while step < steps and _evaluated(problem, model)["loss"] > until:
        optimizer.zero_grad()
        for w in range(workers):
            inputs, labels = problem.batch(w, workers, step, seed)
            (torch.nn.functional.cross_entropy(model(inputs), labels) / workers).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        draws = torch.exp(0.2 * torch.randn(workers, generator=random))
        draws[0] *= slow
        now, step = now + float(draws.max()) + 2 * DELAY, step + 1
    return {**_evaluated(problem, model), "time": now}


def cut_off(slow: float, seed: int, steps: int, until: float, workers: int = 8) -> dict[str, float]:
    """The same with a straggler cutoff: a step is taken once the c-th gradient is there, and takes all that are; who is late goes on computing at the
    x that it was given, and its gradient goes into a later step."""
    from .problems import Digits

    torch.set_num_threads(1)
    problem = Digits(256)
    model = problem.model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE * workers)
    random = torch.Generator().manual_seed(seed)
    attendance = Attendance(Cutoff(slack=0.0), workers)
    gradients: list[list[torch.Tensor]] = [[] for _ in range(workers)]
    begun, lasts, turns = [0.0] * workers, [0.0] * workers, [0] * workers
    now, step, idle = 0.0, 0, set(range(workers))
    while step < steps and _evaluated(problem, model)["loss"] > until:
        for w in sorted(idle):
            inputs, labels = problem.batch(w, workers, turns[w], seed)
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            gradients[w] = list(torch.autograd.grad(loss, list(model.parameters())))
            begun[w], turns[w] = now, turns[w] + 1
            lasts[w] = math.exp(0.2 * float(torch.randn(1, generator=random))) * (slow if w == 0 else 1.0)
        decision = None
        for at in sorted(max(now, b + last) for b, last in zip(begun, lasts, strict=True)):
            there = [b + last <= at for b, last in zip(begun, lasts, strict=True)]
            rows = [
                Row(Stand.READY if here else Stand.COMPUTING, at, last if here else at - b, 0, ())
                for here, b, last in zip(there, begun, lasts, strict=True)
            ]
            if isinstance(decision := attendance.decide(rows), Together):
                break
        assert isinstance(decision, Together)
        idle = {w for w, present in enumerate(decision.present) if present}
        for i, p in enumerate(model.parameters()):
            p.grad = sum((gradients[w][i] for w in sorted(idle)), torch.zeros_like(p)) / workers
        optimizer.step()
        now, step = at + 2 * DELAY, step + 1
    return {**_evaluated(problem, model), "time": now, "late": float(sum(attendance.late))}


Figures = dict[str, dict[str, dict[str, Spread]]]
"""table → row → figure → over seeds"""


def claims(figures: Figures) -> list[Claim]:
    """What is claimed of asynchronous and compressed training, and whether these figures agree."""
    grid, time = figures["grid"], figures["time"]
    result = []
    for tau in TAUS:
        plain = grid[f"uncompressed, τ_max {tau}"]["accuracy"].mean
        others = {m: grid[f"{m}, τ_max {tau}"]["accuracy"].mean for m in METHODS[1:]}
        text = ", ".join(f"{m} {a:.3f}" for m, a in others.items())
        result.append(
            Claim(
                f"compressed both ways, asynchronous training is as good as uncompressed (τ_max {tau})",
                f"accuracy {text}, uncompressed {plain:.3f} (agreement: within one point)",
                all(a >= plain - 0.01 for a in others.values()),
            )
        )
    worst = {f"τ_max {tau}": max(grid[f"{m}, τ_max {tau}"]["stalest"].mean for m in METHODS) for tau in TAUS}
    result.append(
        Claim(
            "(a contract of this library) no gradient is staler than τ_max, though one worker is slow",
            ", ".join(f"{name}: at most {stalest:.0f}" for name, stalest in worst.items()),
            all(worst[f"τ_max {tau}"] <= tau for tau in TAUS),
        )
    )
    for method in METHODS[:2]:
        speedup = time[f"{method}, 1 worker"]["time"].mean / time[f"{method}, 8 workers"]["time"].mean
        result.append(
            Claim(
                f"the speed-up is linear in the number of workers ({method})",
                f"8 workers reach the loss {speedup:.1f} times as fast as 1 (agreement: 6 times or more)",
                speedup >= 6,
            )
        )
    fast, slow = time["1 bit, 8 workers, one 5x slower"]["time"].mean, time["synchronous, 8 workers, one 5x slower"]["time"].mean
    result.append(
        Claim(
            "with one slow worker asynchronous training reaches the loss sooner than synchronous training",
            f"{fast:.1f} and {slow:.1f} (agreement: in half of the time)",
            fast <= slow / 2,
        )
    )
    cut = time["cutoff, 8 workers, one 5x slower"]["time"].mean
    result.append(
        Claim(
            "with one slow worker synchronous training with a cutoff reaches the loss sooner than without",
            f"{cut:.1f} and {slow:.1f} (agreement: in half of the time)",
            cut <= slow / 2,
        )
    )
    return result


def run(size: Size) -> Report:
    """Train the grid, with one slow worker, and to a target loss with 1 to 8 workers."""
    pushes, until = size.pick(40, 1600, 4000), 2.25 if size.smoke else TARGET
    rows: dict[tuple[str, str], tuple[Any, ...]] = {("grid", f"{method}, τ_max {tau}"): (method, 8, tau, SLOW) for tau in TAUS for method in METHODS}
    for method in METHODS[:2]:
        for n in WORKERS:
            rows["time", f"{method}, {n} worker{'s' * (n > 1)}"] = (method, n, 64, 1.0)
    rows["time", "1 bit, 8 workers, one 5x slower"] = ("1 bit", 8, 64, SLOW)
    keys = [(*row, seed) for row in rows for seed in range(size.seeds)]
    jobs = [(*rows[table, row], seed, pushes * (1 if table == "grid" else 4), 0.0 if table == "grid" else until) for table, row, seed in keys]
    trained = dict(zip(keys, run_all(one, jobs, size, "async"), strict=True))
    for kind, how in (("synchronous", synchronous), ("cutoff", cut_off)):
        for row, slow in ((f"{kind}, 8 workers", 1.0), (f"{kind}, 8 workers, one 5x slower", SLOW)):
            rows["time", row] = ()
            for seed in range(size.seeds):
                trained["time", row, seed] = how(slow, seed, pushes, until)

    figures: Figures = {"grid": {}, "time": {}}
    for table, row in rows:
        results = [trained[table, row, seed] for seed in range(size.seeds)]
        figures[table][row] = {name: Spread(tuple(r[name] for r in results)) for name in results[0]}
    grid = Table(
        f"Staleness × compression, 8 workers of which one takes {SLOW:g} times as long, {pushes} pushes, {seeds(size.seeds)}",
        ("method", "final training loss", "test accuracy", "stalest gradient", "kB per push and pull"),
    )
    for row, f in figures["grid"].items():
        grid.rows.append((row, f"{f['loss']:.4f}", f"{f['accuracy']:.3f}", f"{f['stalest'].mean:.0f}", f"{f['kilobytes'].mean:.1f}"))
    time = Table(f"Simulated time until the training loss is {until:g}, {seeds(size.seeds)}", ("", "time", "times as fast as 1 worker"))
    for row, f in figures["time"].items():
        alone = figures["time"][f"{'1 bit' if row.startswith('1 bit') else 'uncompressed'}, 1 worker"]["time"].mean
        time.rows.append((row, f"{f['time']:.1f}", f"{alone / f['time'].mean:.1f}"))

    def draw(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
        for method in METHODS[:2]:
            names = [f"{method}, {n} worker{'s' * (n > 1)}" for n in WORKERS]
            means = [figures["time"][name]["time"].mean for name in names]
            axis.plot(WORKERS, [means[0] / t for t in means], marker="o", label=method)
        axis.plot(WORKERS, WORKERS, linestyle="--", color="gray", label="linear")
        axis.set(xlabel="workers", ylabel="times as fast as one worker")
        axis.grid(alpha=0.3)
        axis.legend()
        figure.suptitle("Asynchronous training: simulated time to a training loss, digits")
        return figure

    setting = (
        f"digits (real images), network 64-256-10, batches of 16, SGD at {RATE} a push, one server, times of gradients lognormal (σ = 0.2) "
        f"in units of their median, messages {DELAY:g}; synchronous training takes the rate times the number of workers, in each step the time of "
        "the slowest, with a cutoff that of the c-th"
    )
    return Report("Asynchronous training (Tang et al. 2019, a reconstruction)", setting, [grid, time], claims(figures), {"figures": figures}, draw)
