"""The tables of presets in the documentation are those that `hvd_ecsgd.presets` gives, and say what is true."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvd_ecsgd import Compression
from hvd_ecsgd.cli import main, presets
from hvd_ecsgd.presets import PRESETS, RULES, Preset

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written() -> Any:
    spec = importlib.util.spec_from_file_location("tables_of_presets", REPO / "docs" / "presets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", ["docs/choosing.md", "docs/methods.md", "docs/guarantees.md", "docs/algorithms.md"])
def test_tables_are_as_written(written: Any, file: str) -> None:
    """And a row that is changed, added or left out would be seen."""
    now = (REPO / file).read_text(encoding="utf-8")
    assert written.updated(file) == now, "run `python docs/presets.py`"
    changed = replace(PRESETS[3], exchange="carrier pigeon", paper="Nobody 1900")
    for other in ([*PRESETS[:3], changed, *PRESETS[4:]], PRESETS[1:], [*PRESETS, replace(changed, section="0")]):
        assert written.updated(file, other) != now


def test_every_preset_has_a_row() -> None:
    assert {p.name for p in PRESETS} == set(presets())
    assert len({p.call for p in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.call)
def test_rows_are_true(row: Preset) -> None:
    """Arguments have the names of the preset's, its rule is described, and its section is there."""
    assert row.rule in RULES
    assert re.search(rf"^## {row.section}\. ", (REPO / "docs" / "algorithms.md").read_text(), re.MULTILINE)
    call = ast.parse(row.call.replace("…", "0"), mode="eval").body
    if isinstance(call, ast.Call):
        named = [ast.unparse(a) for a in call.args] + [str(k.arg) for k in call.keywords]
        assert set(named) <= set(inspect.signature(getattr(Compression, row.name)).parameters)


def test_what_must_be_attached_is_told_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """By the command and by the tables; a method that needs the learning rate only is one of them."""
    assert main(["methods"]) == 0
    attached = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()[-1] == "attached"}
    assert attached == set(re.findall(r"^\| `(\w+)[^|]*` † \|", (REPO / "docs" / "choosing.md").read_text(), re.MULTILINE))
    assert "hessian_aided" in attached and "top_k" not in attached
