"""Which methods are said to reach the accuracy of dense training: those that do in the curves that are shown; and tables are made of results."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvd_ecsgd.evidence import STEPS, fastest

REPO = Path(__file__).resolve().parents[2]


def module(file: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = REPO / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, made)  # dataclasses look for it there
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(made)
    return made


@dataclass(frozen=True)
class Shown:
    """Of docs/results, where nothing is trained."""

    curves: Mapping[str, Any]

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        return self.curves[key]


def test_what_is_said_to_reach_dense_accuracy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, pages = module("benchmarks/time_to_accuracy.py", monkeypatch), module("docs/accuracy.py", monkeypatch)
    shown = Shown(json.loads((REPO / "docs" / "results" / "accuracy_curves.json").read_text()))
    taken: dict[str, list[float]] = {}
    for name, steps in (("digits", 440), ("bytes", 240)):
        trainings = benchmark.Trainings(name, None, steps, benchmark.RATES, shown)
        needed = benchmark.steps_to(pages.PROBLEMS[name][1], trainings.curves([*STEPS], 3))
        for method, reached in needed.items():
            assert None not in reached, (name, method, reached)
            taken.setdefault(method, []).append(statistics.mean(reached) / statistics.mean(needed["none"]))
    assert all(statistics.mean(taken[method]) <= max(1.2, STEPS[method]) for method in STEPS), taken
    others = [method for method in benchmark.METHODS if method not in STEPS]
    missed = benchmark.steps_to("loss", trainings.curves(["none", *others], 3))
    assert all(None in missed[method] for method in others), f"control: {missed}"


def test_the_first_one_is_chosen_where_it_is_worth_it() -> None:
    assert fastest({"a": 1.0, "b": 0.5, "c": 0.1}, {"a": 1.0, "b": 1.5}, "a") == "b"
    assert fastest({"a": 1.0, "b": 0.61}, {"a": 1.0, "b": 1.5}, "a") == "a", "nine tenths are not worth it"


def test_the_table_over_pressures_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = module("docs/accuracy.py", monkeypatch)
    results = json.loads(pages.RESULTS.read_text(encoding="utf-8"))
    assert pages.updated(results) == pages.FILE.read_text(encoding="utf-8"), "run: python docs/accuracy.py"
    assert pages.at(0.1, [(0.3, 2.0), (3.0, 4.0)]) == 2.0 and pages.at(6.0, [(1.0, 2.0), (3.0, 4.0)]) == 7.0
    advice = [pages.row(results, [n for n in pages.PROBLEMS if n in results], p)[-1] for p in (0.1, 1000)]
    assert advice[1] == "compress", advice
