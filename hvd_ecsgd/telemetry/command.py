"""The commands `report` and `watch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import CompressionError
from .report import draw, summary, warnings_of
from .runs import Run
from .watch import watch

__all__ = ["add_report_arguments", "add_watch_arguments", "report", "show"]


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.jsonl", help="files that telemetry.Logger has written; several are compared")
    parser.add_argument("--plot", type=Path, help="file of the plots, .png or .svg (default: the first run's name with .png)")
    parser.add_argument("--no-plot", action="store_true", help="print the table alone")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `watch`."""
    parser.add_argument("run", type=Path, metavar="RUN.jsonl", help="the file that telemetry.Logger writes, or will write")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="print what there is, and end")


def report(options: argparse.Namespace) -> int:
    """Print the table and what was warned of, and draw the plots. 1, with the reason, where that cannot be done."""
    try:
        runs = [Run.read(path) for path in options.runs]
        table = summary(runs)
        print(table.markdown() if options.markdown else table.text())
        for text in warnings_of(runs):
            print(f"\n{text}")
        if not options.no_plot:
            file = options.plot or options.runs[0].with_suffix(".png")
            draw(runs, file)
            print(f"\nwrote {file}")
    except CompressionError as error:
        print(f"hvd-ecsgd report: {error}", file=sys.stderr)
        return 1
    return 0


def show(options: argparse.Namespace) -> int:
    """Watch a run."""
    try:
        return watch(options.run, max(0.05, options.interval), options.once)
    except CompressionError as error:
        print(f"hvd-ecsgd watch: {error}", file=sys.stderr)
        return 1
