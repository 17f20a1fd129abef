"""`hvd-ecsgd report`: a table and plots of runs that were logged."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CompressionError
from ..tables import Table
from .runs import Run

__all__ = ["COLUMNS", "draw", "method_of", "summary", "warnings_of"]


def _total(run: Run, field: str, group: int | None) -> float | None:
    values = run.series(field, group)[1]
    return sum(values) if values else None


def _median(run: Run, field: str, group: int | None) -> float | None:
    values = run.series(field, group)[1]
    return statistics.median(values) if values else None


def _per_step(run: Run, field: str, group: int | None) -> float | None:
    """Median over records of what a step took."""
    values = [part[field] / record["steps"] for record in run.records for part in Run._parts(record, group) if field in part]
    return statistics.median(values) if values else None


def _ratio(run: Run, group: int | None) -> float | None:
    sent, dense = _total(run, "sent_bytes", group), _total(run, "dense_bytes", group)
    return dense / sent if sent and dense else None


def _last(run: Run, field: str, group: int | None) -> float | None:
    values = run.series(field, group)[1]
    return values[-1] if values else None


def _most(run: Run, field: str, group: int | None) -> float | None:
    """The largest, of what groups alone have."""
    values = [value for g in (run.groups if group is None else [group]) for value in run.series(field, g)[1]]
    return max(values) if values else None


def _stalest(run: Run, group: int | None) -> float | None:
    """In steps of a worker that is silent or late; of asynchronous training, whose records have it as a whole, in updates."""
    updates = run.series("staleness_updates", group)[1]
    return max(updates) if updates else _most(run, "staleness_steps", group)


def _scaled(value: float | None, factor: float = 1.0, form: str = ".3g") -> str:
    return "–" if value is None else f"{factor * value:{form}}"


Column = Callable[[Run, int | None], str]
COLUMNS: dict[str, Column] = {
    "steps": lambda run, g: str(sum(r["steps"] for r in run.records)),
    "undone": lambda run, g: "" if g is not None else _scaled(_last(run, "undone_steps", g), form=".0f"),
    "MB sent": lambda run, g: _scaled(_total(run, "sent_bytes", g), 1e-6, ".2f"),
    "MB received": lambda run, g: _scaled(_total(run, "received_bytes", g), 1e-6, ".2f"),
    "ratio": lambda run, g: _scaled(_ratio(run, g), form=".1f"),
    "error": lambda run, g: _scaled(_median(run, "relative_error", g), form=".3f"),
    "residual": lambda run, g: _scaled(_last(run, "residual_to_gradient", g)),
    "skips": lambda run, g: _scaled(_most(run, "skips", g), form=".0f"),
    "stale": lambda run, g: _scaled(_stalest(run, g), form=".0f"),
    "step ms": lambda run, g: "" if g is not None else _scaled(_per_step(run, "step_seconds", g), 1e3),
    "kernels ms": lambda run, g: _scaled(_per_step(run, "kernel_seconds", g), 1e3),
    "wire ms": lambda run, g: "" if g is not None else _scaled(_per_step(run, "wire_seconds", g), 1e3),
    "wait ms": lambda run, g: "" if g is not None else _scaled(_per_step(run, "wait_seconds", g), 1e3),
    "telemetry": lambda run, g: "" if g is not None else _share(run),
}


def _share(run: Run) -> str:
    """Of the time of steps, over all but the first record."""
    pairs = [(r["telemetry_seconds"], r["step_seconds"]) for r in run.records if "step_seconds" in r]
    total = sum(step for _, step in pairs)
    return f"{sum(own for own, _ in pairs) / total:.2%}" if total else "–"


def summary(runs: Sequence[Run], columns: Sequence[str] = tuple(COLUMNS)) -> Table:
    """A row for each run, and for each param group where it has several; `columns` of `COLUMNS`. Without `skips` and `stale` where no worker was
    silent or behind."""
    columns = [c for c in columns if c not in ("skips", "stale") or any(COLUMNS[c](run, None) != "–" for run in runs)]
    table = Table(
        "error: relative, median; residual: what waits, in steps' gradients, at the end; times: medians, of one step",
        ["run", *columns],
    )
    for run in runs:
        groups: list[int | None] = [None, *(run.groups if len(run.groups) > 1 else [])]
        for g in groups:
            table.rows.append([run.name if g is None else f"  group {g}", *(COLUMNS[column](run, g) for column in columns)])
    return table


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """What was warned of, and what a reader should know."""
    said = []
    for run in runs:
        said += [f"{run.name}: step {w['step']}: {w['text']}" for w in run.warnings]
        if run.starts > 1:
            said.append(f"{run.name}: this run was started {run.starts} times; of steps that were taken again the last ones are shown.")
        if run.broken:
            said.append(f"{run.name}: {run.broken} lines are no records, and were left out.")
    return said


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Running medians: single steps that wait for something else must not hide the others."""
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _by_step(run: Run, field: str) -> tuple[list[int], list[float]]:
    """Steps, and what one of the record's steps had."""
    found = [(r["step"], r[field] / r["steps"]) for r in run.records if field in r]
    return [step for step, _ in found], [value for _, value in found]


def _bytes_axes(axes: Any, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        steps, sent = _by_step(run, "sent_bytes")
        received = _by_step(run, "received_bytes")[1]
        if any(sent) or any(received):  # a logarithm has no zero, and one worker sends nothing
            label = f"{run.name}, {'sent = received' if sent == received else 'sent'}"
            axes.plot(steps, [max(1.0, v) for v in sent], color=f"C{i}", label=label, linewidth=1.3)
        if sent != received:
            axes.plot(steps, [max(1.0, v) for v in received], ":", color=f"C{i}", label=f"{run.name}, received", linewidth=1.3)
    if runs and any((dense := _by_step(runs[0], "dense_bytes"))[1]):
        axes.plot(*dense, "--", color="gray", linewidth=1, label="sent without compression")
    axes.set(title="bytes of one worker in a step", yscale="log", ylabel="bytes")


def _norm_axes(axes: Any, runs: Sequence[Run], field: str, title: str, **how: Any) -> None:
    for i, run in enumerate(runs):
        groups: list[int | None] = list(run.groups) if len(run.groups) > 1 else [None]
        for k, g in enumerate(groups):
            steps, values = run.series(field, g)
            if steps:
                label = run.name if g is None else f"{run.name}, group {g}"
                style = ("-", "--", ":", "-.")[k % 4]
                axes.plot(steps, values, style, marker="." if len(steps) < 60 else None, color=f"C{i}", label=label, linewidth=1.3)
    axes.set(title=title, **how)


def _time_axes(axes: Any, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        for field, style, label in (("step_seconds", "-", "step"), ("wait_seconds", "--", "waiting"), ("kernel_seconds", ":", "kernels")):
            steps, values = _by_step(run, field)
            if steps:
                smooth = _smooth([1e3 * value for value in values])
                axes.plot(steps, smooth, style, color=f"C{i}", label=f"{run.name}, {label}", linewidth=1.2)
    axes.set(title="milliseconds of a step (running medians)", yscale="log", ylabel="ms")


def _mark_undone(axes: Any, runs: Sequence[Run]) -> None:
    undone = [r["step"] for run in runs for r in run.records if r["outcome"] in ("undone", "discarded")]
    for i, step in enumerate(undone):
        axes.axvline(step, color="red", linewidth=0.8, alpha=0.5, label="undone" if not i else None)


def draw(runs: Sequence[Run], file: Path) -> None:
    """Four plots over steps in one picture. Raises `CompressionError` without matplotlib, and where `file` cannot be written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise CompressionError(
            f"plots need matplotlib ({error}): pip install matplotlib, or '.[telemetry]' in a clone; --no-plot prints the table alone."
        ) from error
    figure, grid = pyplot.subplots(2, 2, figsize=(12, 7.5))
    _bytes_axes(grid[0, 0], runs)
    _norm_axes(grid[0, 1], runs, "relative_error", "relative compression error ‖u − C(u)‖ ÷ ‖u‖")
    grid[0, 1].set_ylim(0, 1.05 * max((max(line.get_ydata()) for line in grid[0, 1].lines), default=1.0) or 1.0)
    _norm_axes(grid[1, 0], runs, "residual_to_gradient", "residual ÷ gradient: steps' gradients that wait", yscale="log")
    _time_axes(grid[1, 1], runs)
    for axes in grid.flat:
        _mark_undone(axes, runs)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, framealpha=0.7, ncol=max(1, len(axes.get_legend_handles_labels()[0]) // 4))
        else:
            axes.text(0.5, 0.5, "none was measured", transform=axes.transAxes, ha="center", color="gray")
    titles = [textwrap.fill(f"{run.name}: {method_of(run)}, {run.about['size']} workers", 150) for run in runs]
    figure.suptitle("\n".join(titles), fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise CompressionError(f"the plot cannot be written to {file} ({error}). Give another file, .png or .svg, by --plot.") from error
    finally:
        pyplot.close(figure)


def method_of(run: Run) -> str:
    """Compressor, feedback rule and exchange."""
    return " × ".join(str(run.about[part]) for part in ("compressor", "feedback", "exchange"))
