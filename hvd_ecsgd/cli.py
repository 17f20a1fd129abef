"""The `hvd-ecsgd` command: what is installed and works, which methods there are, which to take, what a run did, and the papers' comparisons."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from inspect import getdoc, isfunction
from pathlib import Path

from . import advisor, doctor
from .compression import AutoCompression, Compression
from .presets import needs_attach
from .reproduce import PAPERS, reproduce
from .reproduce.simulation import Size
from .telemetry.command import add_report_arguments, add_watch_arguments, report, show
from .version import __version__

__all__ = ["main"]


def presets() -> dict[str, Compression]:
    """Every preset of `Compression` with its default arguments, by name: first those that need not be called. `auto`, which chooses one, is none."""
    found = {name: what for name, what in vars(Compression).items() if not name.startswith("_") and callable(what) and not isfunction(what)}
    made = {name: getattr(Compression, name)() for name in sorted(found, key=lambda name: isinstance(found[name], staticmethod))}
    return {name: compression for name, compression in made.items() if not isinstance(compression, AutoCompression)}


def methods() -> int:
    """Print the presets: what they are made of, the unit of their residual, and whether an unmodified Horovod can run them."""
    rows: list[tuple[str, ...]] = [("preset", "compressor", "feedback", "exchange", "unit", "stock Horovod")]
    for name, compression in presets().items():
        m = compression.method
        parts = [repr(part) for part in (m.compressor, m.feedback, m.exchange)]
        rows.append((name, *parts, m.feedback.unit, "attached" if needs_attach(m) else "yes"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


COMMANDS: dict[str, Callable[[], int]] = {"methods": methods, "env": doctor.environment}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hvd-ecsgd", description="Gradient compression with error feedback.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=(getdoc(command) or "").split("\n")[0])
    advisor.add_arguments(
        commands.add_parser("advise", help="On the ranks of a job: say which method this model should be trained with on this network, or none.")
    )
    doctor.add_arguments(
        commands.add_parser("doctor", help="Say what is installed here, try two ranks on each road, and what to do about what does not work.")
    )
    add_report_arguments(commands.add_parser("report", help="Of runs that telemetry.Logger has logged: a table, and plots in a file."))
    add_watch_arguments(commands.add_parser("watch", help="Show such a run in the terminal while it goes on."))
    again = commands.add_parser("reproduce", help="Run the central comparison of a paper, and say where its claims hold here.")
    again.add_argument("paper", choices=list(PAPERS))
    again.add_argument("--seeds", type=int, default=None, help="default 3; with --full 5, with --smoke 1")
    again.add_argument("--out", type=Path, default=Path("results"), help="folder for PAPER.json, PAPER.md and PAPER.png")
    how_much = again.add_mutually_exclusive_group()
    how_much.add_argument("--full", action="store_true", help="larger models, more steps and seeds: up to hours")
    how_much.add_argument("--smoke", action="store_true", help="seconds, to see that it runs; the figures mean nothing")
    options = parser.parse_args(arguments)
    run = {"advise": advisor.advise, "doctor": doctor.doctor, "report": report, "watch": show}.get(options.command)
    if run is not None:
        return run(options)
    if options.command != "reproduce":
        return COMMANDS[options.command]()
    seeds = options.seeds if options.seeds is not None else 5 if options.full else 1 if options.smoke else 3
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    reproduce(options.paper, Size(seeds, options.smoke, options.full), options.out)
    return 0
