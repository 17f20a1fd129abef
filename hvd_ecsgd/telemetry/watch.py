"""`hvd-ecsgd watch`: a run in the terminal while it goes on."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from .report import method_of, summary
from .runs import Run

__all__ = ["screen", "watch"]

_BARS = "▁▂▃▄▅▆▇█"
_CURVES = {
    "sent_bytes": ("sent, kB", 1e-3),
    "relative_error": ("relative error", 1.0),
    "residual_to_gradient": ("residual ÷ gradient", 1.0),
    "step_seconds": ("step, ms", 1e3),
    "kernel_seconds": ("kernels, ms", 1e3),
    "wait_seconds": ("waiting, ms", 1e3),
}
_COLUMNS = ("steps", "undone", "MB sent", "MB received", "ratio", "error", "residual", "skips", "stale", "step ms")


def _curve(values: Sequence[float], width: int, quantile: float = 1.0) -> str:
    """The values, averaged to `width` bars between the least of them and their `quantile`, above which all are as high."""
    parts = min(width, len(values))
    means = [sum(cut) / len(cut) for i in range(parts) if (cut := values[i * len(values) // parts : (i + 1) * len(values) // parts])]
    low, high = min(means), sorted(means)[int(quantile * (len(means) - 1))]
    if high - low <= 1e-9 * abs(high):
        return _BARS[3] * len(means)
    return "".join(_BARS[min(7, int(8 * (m - low) / (high - low)))] for m in means)


def screen(run: Run, width: int = 100, height: int = 40) -> str:
    """What there is to see of a run, in lines of at most `width` characters."""
    records = run.records
    last = records[-1] if records else {}
    size, rank = run.about["size"], run.about["rank"]
    lines = [f"{run.path}  rank {rank} of {size}", *textwrap.wrap(method_of(run), width, max_lines=2, placeholder=" …"), ""]
    if not last:
        return "\n".join([*lines, "No step is over yet."])
    undone = f", {last['undone_steps']} undone" if last["undone_steps"] else ""
    ago = max(0.0, time.time() - last["unix_seconds"])
    lines.append(f"step {last['step']}{undone}, {last['outcome']}, {ago:.0f} s ago")
    room = max(10, width - 52)
    recent = records[-20 * room :]
    for field, (label, factor) in _CURVES.items():
        values = [factor * r[field] / (r["steps"] if field.endswith(("bytes", "seconds")) else 1) for r in recent if field in r]
        if values and all(math.isfinite(v) for v in values):
            spread = f"{min(values):.3g} … {max(values):.3g}"
            curve = _curve(values, room, 0.95 if field.endswith("seconds") else 1.0)  # the first step must not hide the others
            lines.append(f"{label:<20}{values[-1]:>9.3g}  {curve:<{room}}  {spread}"[:width])
    lines.append("")
    rows = summary([run], _COLUMNS).text().splitlines()[2:]
    lines += [row[:width] for row in rows[: max(2, height - len(lines) - 6)]]
    for warning in run.warnings[-2:]:
        lines += textwrap.wrap(f"warning, step {warning['step']}: {warning['text']}", width, max_lines=4, placeholder=" …")
    return "\n".join(lines)


def watch(path: Path, interval: float = 1.0, once: bool = False) -> int:
    """Show the run until Ctrl-C; `once`, or where nobody looks (a pipe): as it is now. Waits for a file that is not there yet.

    Raises `CompressionError`, for `once`, as `Run.read` does.
    """
    if once or not sys.stdout.isatty():
        print(screen(Run.read(path), shutil.get_terminal_size((100, 40)).columns))
        return 0
    run = Run(path)
    try:
        while True:
            columns, rows = shutil.get_terminal_size((100, 40))
            try:
                run.look()
                text = screen(run, columns, rows) if run.about else f"{path} has no records yet. Ctrl-C ends."
            except OSError as error:
                text = f"Waiting for {path} ({error.strerror}). Ctrl-C ends."
            sys.stdout.write("\x1b[H\x1b[2J" + text + "\n")
            sys.stdout.flush()
            time.sleep(interval)
    except KeyboardInterrupt:
        return 0
