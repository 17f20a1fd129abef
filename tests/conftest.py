"""Options and reports for all tests."""

from __future__ import annotations

import gc
import signal
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from hvd_ecsgd.kernels.library import what_is_missing
from hvd_ecsgd.kernels.native import native_library

TESTS = Path(__file__).parent
KINDS = ("unit", "property", "conformance", "mpi", "horovod", "torch", "convergence", "launch")
MISSING_KERNELS = pytest.StashKey[str]()
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability-table", action="store_true", help="write the table of docs/reliability.md anew from what the tests find")
    parser.addoption("--roads-table", action="store_true", help="write the tables of docs/roads.md anew from what the tests find")
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`: they take minutes, or others stand for them")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")  # as Ctrl-C: the jobs that tests have started are ended


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, _terminated)
    config.stash[MISSING_KERNELS] = what_is_missing()  # said at the top, and not in the first test that compresses


def pytest_report_header(config: pytest.Config) -> str:
    library = native_library()
    return f"kernels: {library.variant if library else 'reference'}" + (f" ({reason})" if (reason := config.stash[MISSING_KERNELS]) else "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="runs with --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there by now stays, half a million objects; a test that collects garbage need not look at it."""
    gc.collect()
    gc.freeze()


def _kind(node_id: str) -> str:
    parts = node_id.split("::", 1)[0].split("/")
    return parts[1] if len(parts) > 2 and parts[0] == TESTS.name else "other"


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """How many tests of which kind (folder) ran, and what came of them."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            counts[_kind(report.nodeid)][outcome] += 1
    shown = [o for o in OUTCOMES if o in OUTCOMES[:4] or any(c[o] for c in counts.values())]
    kinds = [*KINDS, *sorted(set(counts) - set(KINDS))]
    terminalreporter.section("tests by kind")
    terminalreporter.write_line(f"{'kind':<14}" + "".join(f"{o:>9}" for o in shown))
    for kind in kinds:
        terminalreporter.write_line(f"{kind:<14}" + "".join(f"{counts[kind][o]:>9}" for o in shown))
    total: Counter[str] = sum(counts.values(), Counter())
    terminalreporter.write_line(f"{'all':<14}" + "".join(f"{total[o]:>9}" for o in shown))
