"""`hvd-ecsgd reproduce PAPER`: the central comparison of each paper, small enough for two cores. One file per paper over shared machinery.

A paper's module has `run(size) -> Report`. Workers are simulated in this process; the methods are the library's own.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from .report import Report
from .simulation import Size

__all__ = ["PAPERS", "reproduce"]

PAPERS = {
    "doublesqueeze": "doublesqueeze",
    "def": "detached",
    "compskip": "compskip",
    "skips": "skips",
    "hessian": "hessian",
    "topk": "topk",
    "async": "asynchronous",
    "stale": "stale",
}
"""Command → module."""


def reproduce(paper: str, size: Size, out: Path) -> Report:
    """Run, print the table and what the paper claims, and write PAPER.json, PAPER.md and PAPER.png to the folder `out`."""
    started = time.perf_counter()
    report: Report = importlib.import_module(f".{PAPERS[paper]}", __name__).run(size)
    report.seconds = time.perf_counter() - started
    print(report.text())
    for file in report.save(out, paper):
        print(f"wrote {file}")
    return report
