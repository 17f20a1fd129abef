"""Rules of CONTRIBUTING.md that can be read off the source, each with a control. The order of imports is in test_rooms.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hvd_ecsgd.protocols import NO_SEGMENTS
from tests.cases import CASES, bound_method

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


LARGEST = {"lines of a file": 450, "lines of a class": 300, "attributes": 16}
"""What is much above the 400, 250 and a dozen of CONTRIBUTING.md."""
REASONS = {
    "kernels/cuda/loops.py": "the loops are one language, and one file is what Triton compiles",
    "kernels/cuda/__init__.py": "a method for each kernel",
    "Cuda": "a method for each kernel",
    "protocols.py": "the seams in one place, which a method of one's own reads from the first to the last",
    "compression.py": "a factory for each preset, and most of it is what users read",
    "Task": "a value: all that an exchange is given of one bucket, and what it says of it",
    "CutoffWorker": "two threads share it, and each attribute says whose it is",
}


def sizes(name: str, source: str) -> dict[str, dict[str, int]]:
    """By kind, what is measured of a module and of its classes."""
    found: dict[str, dict[str, int]] = {"lines of a file": {name: source.count("\n")}, "lines of a class": {}, "attributes": {}}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
            fields |= {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}
            found["lines of a class"][node.name] = (node.end_lineno or 0) - node.lineno + 1
            found["attributes"][node.name] = len(fields)
    return found


def test_what_is_large_has_a_reason() -> None:
    """Also: no reason outlives what it is for."""
    measured = [(f, sizes(f.relative_to(REPO).as_posix().partition("/")[2], f.read_text(encoding="utf-8"))) for f in SOURCES]
    large = {name for _, found in measured for kind, limit in LARGEST.items() for name, size in found[kind].items() if size > limit}
    assert large == set(REASONS), "look for the object inside; or for a reason"
    method = "    def f{0}(self):\n        self.a{0} = 0\n"
    planted = sizes("m.py", "class C:\n" + "".join(method.format(i) for i in range(160)))
    assert planted == {"lines of a file": {"m.py": 321}, "lines of a class": {"C": 321}, "attributes": {"C": 160}}


def names_in(files: list[Path], names: set[str]) -> list[str]:
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append(f"{file.relative_to(REPO).as_posix()}:{node.lineno}")
    return found


def test_who_carries_state_knows_no_slot_by_its_name() -> None:
    """But asks for its role. Names are the methods' own (control: these have them)."""
    methods = {"feedback", "exchange"}
    table = [bound_method(c) for c in CASES]
    slots = {slot for m in table for rule in (m.feedback, m.dense().feedback) for slot in rule.slots(NO_SEGMENTS)} | {
        s for m in table for s in m.exchange.slots(2)
    }
    slots -= {"momentum"}  # an option of SGD, too
    assert {"residual", "server_residual", "x", "q", "skips"} <= slots
    others = {"reproduce", "kernels", "compressors", "presets.py"}
    others |= {"telemetry", "meter.py", "asynchronous"}  # fields of records, and of a server's file, that are called alike
    files = [f for f in (REPO / "hvd_ecsgd").rglob("*.py") if not others & set(f.parts)]
    assert len(names_in([f for f in files if methods & set(f.parts)], slots)) > 20
    assert names_in([f for f in files if not methods & set(f.parts)], slots) == []
