"""Write the table over pressures ρ into docs/choosing.md, from docs/results/time_to_accuracy.json: python docs/accuracy.py

How long a step takes at a ρ that was not measured lies on the line between those that were, and beyond them on that line's end.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_ecsgd.evidence import WORTH
from hvd_ecsgd.tables import markdown_row

FILE, RESULTS = Path(__file__).with_name("choosing.md"), Path(__file__).parent / "results" / "time_to_accuracy.json"
START, END = "<!-- accuracy: written by docs/accuracy.py -->\n", "<!-- end of accuracy -->"
PRESSURES = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
PROBLEMS = {"digits": ("digits", "errors"), "bytes": ("language model", "loss")}
"""How each is called here, and by what its accuracy is measured."""


def at(pressure: float, points: Sequence[tuple[float, float]]) -> float:
    """On the line through `points`, from small to large; what is before the first is as there."""
    if pressure <= points[0][0]:
        return points[0][1]
    right = next((i for i in range(1, len(points)) if pressure <= points[i][0]), len(points) - 1)
    (a, t), (b, u) = points[right - 1], points[right]
    return t + (u - t) / (b - a) * (pressure - a)


def seconds(problem: Mapping[str, Any], what: str, pressure: float) -> dict[str, float]:
    """To the dense run's accuracy, of the methods that come there."""
    cells = sorted((float(p), cell["steps"]["seconds"]) for p, cell in problem["pressures"].items())
    found = {}
    for method, reached in problem["reached"][what].items():
        if None not in reached:
            found[method] = statistics.mean(reached) * at(pressure, [(p, statistics.median(steps[method])) for p, steps in cells])
    return found


def row(results: Mapping[str, Any], names: Sequence[str], pressure: float) -> list[str]:
    cells, saved = [f"{pressure:g}"], []
    for name in names:
        taken = seconds(results[name], PROBLEMS[name][1], pressure)
        best = min(taken, key=lambda method: taken[method])
        saved.append(taken[best] / taken["none"])
        cells.append(f"`none`, {taken['none']:.3g} s" if saved[-1] >= WORTH else f"`{best}`, {taken[best]:.3g} s of {taken['none']:.3g}")
    least, most = min(saved), max(saved)
    advice = "do not compress" if least >= WORTH else "compress" if most < WORTH else "try `auto`"
    return [*cells, advice]


def updated(results: Mapping[str, Any]) -> str:
    """The text of docs/choosing.md with its table made anew."""
    before, _, rest = FILE.read_text(encoding="utf-8").partition(START)
    names = [name for name in PROBLEMS if name in results]
    rows = [["ρ", *(f"{PROBLEMS[name][0]}: first there" for name in names), "what to do"], ["---"] * (2 + len(names))]
    rows += [row(results, names, pressure) for pressure in PRESSURES]
    return before + START + "".join(markdown_row(cells) + "\n" for cells in rows) + END + rest.partition(END)[2]


if __name__ == "__main__":
    FILE.write_text(updated(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
