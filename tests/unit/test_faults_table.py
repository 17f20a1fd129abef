"""The table of faults in docs/reliability.md is that of its results, and says of none that it ended wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import PAGE, Cell, cell_text, cells, table, updated, verdict

REPO = Path(__file__).resolve().parents[2]
CELLS = {(cell.fault, cell.moment, cell.backend): cell for cell in cells()}


def test_the_page_has_the_table_of_the_results() -> None:
    results = json.loads((REPO / "docs" / "results" / "faults.json").read_text(encoding="utf-8"))["cells"]
    page = PAGE.read_text(encoding="utf-8")
    assert updated(results, page) == page, "run: python benchmarks/faults.py --repeat 0 --json docs/results/faults.json --page"
    for made in results:
        cell = CELLS[made["fault"], made["moment"], made["backend"]]
        assert not made["wrong"] and len(made["seconds"]) == made["repeat"] and max(made["seconds"]) <= cell.limit, made


def test_a_row_says_what_went_wrong() -> None:
    made: dict[str, Any] = {"fault": "kill", "moment": "forward", "backend": "two_pass", "repeat": 2, "wrong": "", "seconds": [1.0, 3.0]}
    assert cell_text(made) == "ends, names the rank, 2.0 s (3.0)"
    assert "**hangs**" in table([made | {"wrong": "hangs"}])
    assert table([made]).count("\n| ") == 2


WENT = "".join(f"rank {r} went from step 0 to 4\n" for r in range(3))


@pytest.mark.parametrize(
    ("fault", "output", "seconds", "wrong"),
    [
        ("kill", "rank 1 was killed", 2.0, ""),
        ("kill", "rank 1 was killed", 10.5, "takes longer than 10 s"),
        ("kill", "somebody was killed", 2.0, "names nobody"),
        ("kill", WENT, 2.0, "is not noticed"),
        ("kill", "rank 1: wrong bits", 2.0, "trains wrongly"),
        ("stop", WENT, 22.0, ""),
        ("stop", "rank 1 ended", 22.0, "does not go on"),
    ],
)
def test_what_is_as_it_must_be(fault: str, output: str, seconds: float, wrong: str) -> None:
    cell: Cell = CELLS[fault, "forward", "two_pass"]
    assert verdict(cell, output, seconds, r"\brank 1\b") == wrong


def test_a_job_that_shrinks_must_go_on_without_the_victim() -> None:
    cell = CELLS["kill shrink", "forward", "asynchronous"]
    two = "".join(f"rank {r} went from step 0 to 4\n" for r in (0, 2))
    assert verdict(cell, "rank 1, a worker, has died\n" + two, 2.0, r"\brank 1\b") == ""
    assert verdict(cell, two, 2.0, r"\brank 1\b") == "names nobody"
    assert verdict(cell, "rank 1 was killed", 2.0, r"\brank 1\b") == "does not go on"
    assert verdict(cell, WENT, 2.0, r"\brank 1\b") == "does not go on"
