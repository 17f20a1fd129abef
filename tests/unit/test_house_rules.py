"""Rules of CONTRIBUTING.md that can be read off the source, each with a control. The order of imports is in test_rooms.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SOURCES = sorted(f for package in ("hvd_ecsgd", "mpi_backend") for f in (REPO / package).rglob("*.py"))


SPELT_OUT = re.compile(r"isinstance\([^()]*, bool\) or not isinstance|not isinstance\([^()]*, bool\):|isinstance\([^()]*, bool\) or [^:]* not in ")


def test_checks_have_one_place() -> None:
    assert [f for f in SOURCES if SPELT_OUT.search(f.read_text())] == [REPO / "hvd_ecsgd" / "arguments.py"], "these have a check there"
    for planted in (
        "if isinstance(k, bool) or not isinstance(k, int) or k < 1:",
        "if not isinstance(flag, bool):",
        "if isinstance(b, bool) or b not in _T:",
    ):
        assert SPELT_OUT.search(planted)


def undocumented(source: str) -> list[str]:
    """The functions and classes of a module's `__all__` without a docstring."""
    body = ast.parse(source).body
    lists = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" and isinstance(n.value, ast.List)]
    public = {item.value for names in lists for item in names.elts if isinstance(item, ast.Constant)}
    defined = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return [n.name for n in defined if n.name in public and not ast.get_docstring(n)]


def test_public_names_have_docstrings() -> None:
    assert [(f.name, name) for f in SOURCES for name in undocumented(f.read_text(encoding="utf-8"))] == []
    assert undocumented('__all__ = ["f", "C"]\ndef f(): ...\ndef g(): ...\nclass C:\n    "It."') == ["f"]
