"""Skips that keep their promise: which assumption of CompSkipDSGD breaks, one factor at a time, and what mends it, on three tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..compression import AnyCompression, Compression
from ..compressors import Identity, Sign
from ..exchange import Bernoulli, CompSkip, Every, Rounds
from ..feedback import ErrorFeedback, LocalMomentum
from .problems import Bytes, Digits, Logistic
from .report import Claim, Report, Spread, Table, seeds
from .simulation import Problem, Size, Trained, run_all, train

__all__ = ["claims", "limit", "run"]

EVERYTHING: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
WORKERS = 4
TURNS, ALWAYS, SECOND, FOURTH = Every(2), Every(1), Rounds(2), Rounds(4)

Way = tuple[Callable[[], AnyCompression], dict[str, Any]]
"""A method, and what is changed of a task's settings: `momentum` 0 at ten times the rate, `batch`, and whether the rate `falls`."""
NO_MOMENTUM = {"momentum": 0.0}

METHODS: dict[str, Way] = {
    "no skips": (lambda: Compression.dist_ef_sgd(**EVERYTHING), {}),
    "both every 2nd, workers in turns": (lambda: Compression.comp_skip(TURNS, SECOND, **EVERYTHING), {}),
    "together every 2nd": (lambda: Compression.comp_skip(SECOND, SECOND, **EVERYTHING), {}),
    "together every 4th, step-ahead": (lambda: Compression(Sign(), LocalMomentum(1.0), CompSkip(FOURTH, FOURTH), **EVERYTHING), {}),
    "no skips, without momentum": (lambda: Compression.dist_ef_sgd(**EVERYTHING), NO_MOMENTUM),
    "together every 2nd, without momentum": (lambda: Compression.comp_skip(SECOND, SECOND, **EVERYTHING), NO_MOMENTUM),
    "together every 4th, without momentum": (lambda: Compression.comp_skip(FOURTH, FOURTH, **EVERYTHING), NO_MOMENTUM),
}
PLAIN, BROKEN = "no skips", "both every 2nd, workers in turns"
SHIPPED = ("together every 2nd, without momentum", "together every 4th, step-ahead")
TASKS: dict[str, tuple[Callable[[], Problem], float, int, bool]] = {
    "digits": (lambda: Digits(64), 0.02, 400, False),
    "logistic regression": (lambda: Logistic(), 0.2, 400, False),
    "bytes": (lambda: Bytes(32, batch=8), 0.02, 300, True),
}
"""Data and model, learning rate, steps, and whether the rate falls at 1/2 and 3/4. Momentum is .9, weight decay 1e-4."""

FACTORS: dict[str, Way] = {
    "server: always answers": (lambda: Compression.comp_skip(TURNS, ALWAYS, **EVERYTHING), {}),
    "server: it alone skips": (lambda: Compression.comp_skip(ALWAYS, SECOND, **EVERYTHING), {}),
    "workers: drawn, q = 1/2": (lambda: Compression.comp_skip(Bernoulli(0.5), SECOND, **EVERYTHING), {}),
    "cap: drawn, at most 1 skip in a row": (lambda: Compression.comp_skip(Bernoulli(0.5, cap=1), SECOND, **EVERYTHING), {}),
    "compressor: none": (lambda: Compression.comp_skip(TURNS, SECOND, Identity(), **EVERYTHING), {}),
    "momentum: none, at ten times the rate": (METHODS[BROKEN][0], NO_MOMENTUM),
    "momentum: after the exchange": (lambda: Compression(Sign(), ErrorFeedback(), CompSkip(TURNS, SECOND), **EVERYTHING), {}),
    "units: updates": (lambda: Compression(Sign(), LocalMomentum(0.0), CompSkip(TURNS, SECOND), **EVERYTHING), {}),
    "noise: batches of 128": (METHODS[BROKEN][0], {"batch": 128}),
    "rate: falls to 1/10 and 1/100": (METHODS[BROKEN][0], {"falls": True}),
    "rate: the same, and no skips": (METHODS[PLAIN][0], {"falls": True}),
    "gradients: at x − e (step-ahead)": (lambda: Compression(Sign(), LocalMomentum(1.0), CompSkip(TURNS, SECOND), **EVERYTHING), {}),
}
"""What is changed of `BROKEN` on digits, one at a time."""

PATTERNS: dict[str, tuple[list[list[int]], list[int]]] = {
    "no skips": ([[1, 1]], [1]),
    "both every 2nd, workers in turns": ([[1, 0], [0, 1]], [0, 1]),
    "together every 2nd": ([[0, 0], [1, 1]], [0, 1]),
    "together every 4th": ([[0, 0], [0, 0], [0, 0], [1, 1]], [0, 0, 0, 1]),
}
"""Of two workers, and of the server, by step: who sends."""


def limit(workers: Sequence[Sequence[int]], server: Sequence[int], mu: float, delta: float, lambda_: float) -> float:
    """The least η·L/(1 − μ) for which the method is unstable on L·x²/2, C(v) being δ·v; at most 40.

    x, each worker's momentum and residual, and the server's residual are linear in what they were, so this is a matter of eigenvalues.
    """
    n = len(workers[0])

    def radius(s: float) -> float:
        whole = np.eye(2 * n + 2)
        for sends, serves in zip(workers, server, strict=True):
            now = np.eye(2 * n + 2)
            x, m, e, kept = now[0], now[1 : n + 1], now[n + 1 : 2 * n + 1], now[2 * n + 1]
            m = mu * m + s * (x - lambda_ * e)
            c = delta * (e + m) * np.array(sends)[:, None]
            arrived = kept + c.mean(0)
            out = delta * serves * arrived
            whole = np.vstack([x - out, m, e + m - c, arrived - out]) @ whole
        return float(np.abs(np.linalg.eigvals(whole)).max())

    tried = np.geomspace(1e-2, 40, 200)
    return float(next((s for s in tried if radius(s * (1 - mu)) > 1 + 1e-9), tried[-1]))


def limits() -> dict[str, dict[str, float]]:
    """Of every pattern: uncompressed, compressed by δ = .6 both ways, that without momentum, and that with gradients at x − e."""
    settings = {"δ = 1": (0.9, 1.0, 0.0), "δ = .6": (0.9, 0.6, 0.0), "δ = .6, μ = 0": (0.0, 0.6, 0.0), "δ = .6, step-ahead": (0.9, 0.6, 1.0)}
    return {pattern: {s: limit(*who, *values) for s, values in settings.items()} for pattern, who in PATTERNS.items()}


def one(task: str, what: str, seed: int, steps: int) -> Trained:
    """Train by one of `METHODS`, or of `FACTORS`."""
    make_problem, lr, _, falls = TASKS[task]
    make, changed = (METHODS | FACTORS)[what]
    problem = Digits(64, changed["batch"]) if "batch" in changed else make_problem()
    momentum = changed.get("momentum", 0.9)
    return train(
        problem,
        make,
        steps=steps,
        lr=lr if momentum else 10 * lr,
        seed=seed,
        workers=WORKERS,
        momentum=momentum,
        weight_decay=1e-4,
        milestones=(steps // 2, steps * 3 // 4) if changed.get("falls", falls) else (),
        points=1,
    )


Figures = Mapping[str, Mapping[str, Mapping[str, Spread]]]


def claims(figures: Figures, stable: Mapping[str, Mapping[str, float]]) -> list[Claim]:
    """Of task → method → figure → over seeds, and of what `limits` tells."""
    made = []
    for task in TASKS:
        rows = figures[task]
        plain = rows[PLAIN]["accuracy"].mean
        sent = {method: f["up"].mean + f["down"].mean for method, f in rows.items()}
        for method in (BROKEN, *SHIPPED):
            whose = "skipping on top of compression" if method == BROKEN else "(a promise of this library) skipping in this way"
            accuracy, fewer = rows[method]["accuracy"].mean, sent[PLAIN] / sent[method]
            measured = f"accuracy {accuracy:.3f}, without skips {plain:.3f}; {fewer:.2f} times fewer bytes"
            made.append(
                Claim(
                    f"{task}: {whose} keeps the accuracy and saves more ({method})",
                    f"{measured} (agreement: within one point, and 1.5 times)",
                    accuracy > plain - 0.01 and fewer >= 1.5,
                )
            )
    skipping = [row for pattern, row in stable.items() if pattern != PLAIN]
    for claim, with_, without in (
        ("momentum does not bear that compressed gradients wait", "δ = .6", "δ = .6, μ = 0"),
        ("with gradients that foresee what waits on the worker it does", "δ = .6", "δ = .6, step-ahead"),
    ):
        factors = [row[without] / row[with_] for row in skipping]
        measured = f"the limits of stability are {min(factors):.1f} to {max(factors):.1f} times as large ({without}; agreement: at least 3 times)"
        made.append(Claim(f"(an explanation of ours) {claim}", measured, min(factors) >= 3))
    return made


def _table(title: str, rows: Mapping[str, Mapping[str, Spread]], methods: Sequence[str]) -> Table:
    table = Table(title, ("method", "final loss", "test accuracy", "kB up", "kB down", "fewer bytes"))
    sent = {method: rows[method]["up"].mean + rows[method]["down"].mean for method in methods}
    for method in methods:
        f = rows[method]
        fewer = f"{sent[PLAIN] / sent[method]:.2f}x" if sent[method] else "–"
        table.rows.append((method, f"{f['loss']:.4f}", f"{f['accuracy']:.3f}", *(f"{f[way].mean / 1000:.1f}" for way in ("up", "down")), fewer))
    return table


def run(size: Size) -> Report:
    """Train on three tasks by all policies, on digits with one factor after the other changed, and look for the limits of stability."""
    of = {task: [*METHODS, *(FACTORS if task == "digits" else ())] for task in TASKS}
    keys = [(task, what, seed) for task in TASKS for what in of[task] for seed in range(size.seeds)]
    jobs = [(*key, size.pick(4, TASKS[key[0]][2], 3 * TASKS[key[0]][2])) for key in keys]
    trained = dict(zip(keys, run_all(one, jobs, size, "skips"), strict=True))

    def spreads(task: str, what: str) -> dict[str, Spread]:
        results = [trained[task, what, seed] for seed in range(size.seeds)]
        made = {figure: Spread(tuple(r.figures[figure] for r in results)) for figure in ("loss", "accuracy")}
        return made | {way: Spread(tuple(float(r.by_pass.get(name, 0)) for r in results)) for way, name in (("up", "push"), ("down", "pull"))}

    figures = {task: {what: spreads(task, what) for what in whats} for task, whats in of.items()}
    of_seeds = seeds(size.seeds)
    tables = [_table(f"{task}, {of_seeds}", figures[task], list(METHODS)) for task in TASKS]
    tables.append(_table(f"digits, one change of “{BROKEN}” in each row, {of_seeds}", figures["digits"], [PLAIN, BROKEN, *FACTORS]))
    stable = limits()
    table = Table("The least η·L/(1 − μ) that is unstable on a quadratic, C(v) = δ·v both ways, μ = .9", ("who sends", *stable[PLAIN]))
    table.rows = [(pattern, *(f"{value:.2f}" for value in row.values())) for pattern, row in stable.items()]
    tables.append(table)

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, len(TASKS), figsize=(14, 4.5), constrained_layout=True)
        for axis, task in zip(axes, TASKS, strict=True):
            for method in METHODS:
                f = figures[task][method]
                kilobytes = (f["up"].mean + f["down"].mean) / 1000
                axis.errorbar(kilobytes, f["accuracy"].mean, f["accuracy"].sd, fmt="o", capsize=4, label=method)
            axis.set(title=task, xlabel="kB sent per worker", ylabel="test accuracy")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
        return figure

    setting = (
        f"signs with ℓ1 scales both ways, {WORKERS} workers, SGD with momentum .9 and weight decay 1e-4; digits: network 64-64-10, batches of 16, "
        "0.02, 400 steps; logistic regression: 100 badly scaled features, 10 classes, batches of 16, 0.2, 400 steps; bytes: a transformer of "
        "width 32 on Python's library, 8 windows of 16 bytes, 0.02 and × .1 at 1/2 and 3/4, 300 steps"
    )
    everything = {**figures, "limits": stable}
    return Report("Skips that keep their promise (a reconstruction)", setting, tables, claims(figures, stable), {"figures": everything}, draw)
