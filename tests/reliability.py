"""The table of docs/reliability.md: methods × {resume, resize, overflow, schedule}, made of what tests found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tests.cases import CASES, Case, bound_method
from tests.unit.test_invariants import Record, largest_violation, mean, server_residual, trajectory
from tests.unit.test_mixed_precision import bad_step

__all__ = ["overflow", "render", "rows", "schedule"]

START, END = "<!-- table: made by the tests -->", "<!-- end of table -->"
SCHEDULE = (0.0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.005, 0.0, 0.02)
"""Warm-up from zero, a drop by ten, cosine to zero, and a restart."""

Results = dict[tuple[int, int], dict[str, list[dict[str, Any]]]]
"""(saved by, loaded by) so many ranks → method → what each rank found."""


def resume(found: dict[str, Results], case: Case) -> str:
    """Where the resumed run is the run: backend and numbers of ranks."""
    runs = {backend: results for backend, results in found.items() if case.name in results[2, 2]}
    exact = {backend: [n for n in (2, 3) if all(r["bit-exact"] for r in results[n, n][case.name])] for backend, results in runs.items()}
    if all(ns == [2, 3] for ns in exact.values()):
        return "bit for bit" + ("" if set(exact) == set(found) else f", on {', '.join(exact)} only")
    return "; ".join(f"{b}: bit for bit on {ns or 'none'}" for b, ns in exact.items())


def resize(found: dict[str, Results], case: Case) -> str:
    ranks = [r for results in found.values() for sizes in ((2, 3), (3, 2)) for r in results[sizes].get(case.name, [])]
    change = max(r["change"] for r in ranks)
    if not all(r["equal"] for r in ranks) or change > 2.0**-24:
        return f"mean residual off by {change:.0e}"
    return "mean residual kept" if change else "nothing to keep"


def overflow(case: Case) -> str:
    """A step with a NaN on one of two workers: what is left of it in all numbers that training goes on from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        off, off_exact = (
            max(float((before[k] - after[k]).abs().sum()) for before, after in bad_step(case, exact) for k in before) for exact in (False, True)
        )
    if off_exact:
        return f"with exact=True off by {off_exact:.0e}"
    return "undone" if off < 1e-3 else f"off by {off:.0e}"


def in_update_units(records: list[list[Record]], lrs: Sequence[float]) -> float:
    """Violation of z⁺ = z − η·mean g, z = x − mean e − E, without momentum."""
    z, worst = None, 0.0
    for t, (ranks, lr) in enumerate(zip(records, lrs, strict=True)):
        now = ranks[0].x - mean(r.e for r in ranks) - server_residual(ranks)
        if z is not None and t:
            worst = max(worst, (now - (z - lr * mean(r.gradient for r in ranks))).abs().max().item())
        z = now
    return worst


def schedule(case: Case) -> str:
    """Whether what is not sent keeps its worth when η changes, and x rests while η is 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = trajectory(case.make, SCHEDULE)
    for before, after, lr in zip(records, records[1:], SCHEDULE[1:]):
        if not all(torch.equal(r.x, after[0].x) for r in after):
            return "replicas differ"
        if lr == 0 and not torch.equal(before[0].x, after[0].x):
            return "moves at η = 0"
    worth = [next((lr for lr in reversed(SCHEDULE[: t + 1]) if lr), 1.0) for t in range(len(SCHEDULE))]
    gradient = bound_method(case).feedback.unit == "gradient"
    violation = largest_violation(records, SCHEDULE, worth) if gradient else in_update_units(records, SCHEDULE)
    return "nothing lost" if violation < 1e-12 else "followed"


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each row, by the method's name."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    return {name.strip("`"): rest for name, *rest in cells}


def render(found: dict[str, Results], held: dict[str, list[str]]) -> str:
    """The table in Markdown, one row for each method of tests/cases.py; that of a method with which not all numbers of ranks ran is as in `held`."""
    lines = ["| method | resume | resize 2 ↔ 3 | overflow | schedule |", "|---|---|---|---|---|"]
    for case in CASES:
        runs = [case.name in by_name for results in found.values() for by_name in results.values() if case.name in results[2, 2]]
        if runs and all(runs):
            cells = [resume(found, case), resize(found, case), overflow(case), schedule(case)]
        else:
            cells = held.get(case.name, ["not run"])
        lines.append(f"| `{case.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)
