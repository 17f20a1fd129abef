"""Imports point down only. The rooms and their order are docs/design.md's; each rule is also tried on a planted violation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

BOTTOM = {"arguments", "segments", "errors", "verdicts", "version", "values", "protocols", "transport"}
BELOW_CORE = {"exchange", "feedback", "compressors", "kernels", "evidence", *BOTTOM}
# file of hvd_ecsgd/core → the others there that it may import, beside all rooms below it
CORE: dict[str, set[str]] = {
    "__init__": set(),
    "talk": set(),
    "guard": set(),
    "trees": set(),
    "schedule": set(),
    "refusal": set(),
    "method": {"schedule"},
    "tuner": {"method"},
    "bucket": {"method"},
    "state": {"method", "bucket"},
    "meter": {"method", "bucket", "state"},
    "step": {"method", "bucket", "meter"},
    "fewer": {"method", "bucket", "state"},
    "copies": set(),
    "gradients": {"method", "bucket", "state"},
    "points": {"copies", "method", "bucket", "state"},
    "saved_state": {"method", "bucket", "state"},
    "attached": {"method", "bucket", "state"},
    "closures": set(),
    "step_hooks": {"closures"},
    "agreement": {"talk", "refusal", "method", "bucket", "state"},
    "switch": {"agreement", "points", "method", "bucket", "state"},
    "beside": {"step", "meter", "method", "bucket", "state"},
    "aggregator": {
        *("agreement", "beside", "copies", "points", "saved_state", "switch", "gradients", "refusal"),
        *("step", "meter", "method", "bucket", "state"),
    },
    "bound": {"tuner", "step_hooks", "aggregator", "attached", "copies", "meter", "points", "saved_state", "trees", "method", "bucket", "state"},
}
IN_CORE = {f"core.{room}" for room in CORE}
# room (a module or a folder of hvd_ecsgd, of core each file) → the other rooms of hvd_ecsgd that it may import
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "arguments": {"errors"},
    "version": set(),
    "tables": set(),
    "verdicts": set(),
    "evidence": set(),
    "segments": {"errors"},
    "transport": {"segments", "errors", "version"},
    "values": {"segments", "verdicts", "errors"},
    "protocols": {"values", "verdicts", "segments", "errors", "version", "transport"},
    "kernels": {"segments", "verdicts", "errors", "version", "protocols"},
    "compressors": {"kernels", "protocols", "verdicts", "segments", "arguments", "errors"},
    "feedback": {"compressors", "kernels", *BOTTOM},
    "exchange": {"compressors", "kernels", *BOTTOM},
    **{f"core.{room}": {*(f"core.{other}" for other in others), *BELOW_CORE} for room, others in CORE.items()},
    "horovod": {*IN_CORE, *BELOW_CORE},
    "compression": {"horovod", *IN_CORE, *BELOW_CORE},
    "presets": {"compression", "feedback", "core.method"},
    "optimizer": {"compression", *IN_CORE, *BELOW_CORE},
    "torch_backend": {"optimizer", "compression", *IN_CORE, *BELOW_CORE},
    "ddp": {"optimizer", "compression", *IN_CORE, *BELOW_CORE},
    "fsdp": {"checkpoint", "optimizer", "compression", *IN_CORE, *BELOW_CORE},
    "gradient_exchange": {"optimizer", "compression", *IN_CORE, *BELOW_CORE},
    "central_vr": {"gradient_exchange", "compression", "kernels", "transport", "verdicts", "errors", "arguments"},
    "advisor": {"gradient_exchange", "optimizer", "compression", *IN_CORE, *BELOW_CORE},
    "doctor": {"compression", *IN_CORE, *BELOW_CORE},
    "checkpoint": {*IN_CORE, *BELOW_CORE},
    "telemetry": {"tables", *IN_CORE, *BELOW_CORE},
    "asynchronous": {"checkpoint", "optimizer", "compression", *IN_CORE, *BELOW_CORE},
}
# The package itself and the command line may import every room.
MAY_IMPORT["reproduce"] = set(MAY_IMPORT)
MAY_IMPORT["__init__"] = MAY_IMPORT["cli"] = MAY_IMPORT["__main__"] = {"__init__", "cli", *MAY_IMPORT}

# The same for mpi_backend, with type-checking imports counted.
COLLECTIVE = {"tracing", "runtime", "engine", "process_sets", "errors", "environment"}
MPI_MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "environment": set(),
    "process_sets": set(),
    "compression": set(),
    "tracing": set(),
    "transport": {"environment"},
    "engine": {"transport", "environment", "errors", "tracing"},
    "liveness": {"transport", "environment"},
    "job_end": {"liveness"},
    "runtime": {"job_end", "liveness", "engine", "process_sets"},
    "about": {"transport"},
    "sets": {"runtime", "process_sets", "tracing"},
    "basics": {"runtime"},
    "collectives": COLLECTIVE,
    "functions": {"basics", "collectives", *COLLECTIVE},
    "sync_batch_norm": {"basics", "collectives", "tracing"},
    "optimizer": {"collectives", "transport", *COLLECTIVE},
    "asynchronous": {"collectives", "transport", *COLLECTIVE},
    "assembly": {"liveness", *COLLECTIVE},
    "recovery": {"assembly", "optimizer", "job_end", "transport", *COLLECTIVE},
    "lifecycle": {"recovery", "assembly", "asynchronous", "optimizer", "sets", "liveness", "job_end", "transport", *COLLECTIVE},
}
MPI_MAY_IMPORT["mpi_ops"] = set(MPI_MAY_IMPORT)
MPI_MAY_IMPORT["__init__"] = set(MPI_MAY_IMPORT)
ORDERS = {"hvd_ecsgd": MAY_IMPORT, "mpi_backend": MPI_MAY_IMPORT}

NEVER = {
    "hvd_ecsgd": {"mpi_backend", "mpi4py", "horovod", "tests", "examples", "benchmarks", "launch"},
    "mpi_backend": {"horovod", "tests", "examples", "benchmarks", "launch"},
}
# The one exception, inside functions only: importing that module must work without Horovod.
HOROVOD_IN_FUNCTIONS = "hvd_ecsgd/horovod/transport.py"


@dataclass(frozen=True)
class Import:
    module: str  # absolute and dotted, e.g. hvd_ecsgd.transport.base
    names: tuple[str, ...]  # of `from module import …`
    line: int
    in_function: bool


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """All imports of a file: at any depth, relative ones resolved, and the literal ones of importlib.import_module and __import__."""
    package = list(file.relative_to(root).parent.parts)

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield Import(".".join([*base, *filter(None, [node.module])]), tuple(a.name for a in node.names), node.lineno, in_function)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                name = node.args[0].value
                level = len(name) - len(name.lstrip("."))
                base = package[: len(package) - level + 1] if level else []
                yield Import(".".join([*base, name.lstrip(".")]), (), node.lineno, in_function)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8"), str(file)), False)


def room_of(parts: Sequence[str]) -> str:
    """Of a module's names below its package."""
    return ".".join(parts[: 1 + (parts[0] == "core")])


def rooms_imported(found: Import, root: Path, top: str) -> set[str]:
    """The rooms of the package `top` an import reaches; `from top import x` reaches room x, or the package itself when x is no module."""
    first, *rest = found.module.split(".")
    if first != top:
        return set()
    if rest == ["core"]:
        return {f"core.{n}" if f"core.{n}" in MAY_IMPORT else "core.__init__" for n in found.names} or {"core.__init__"}
    if rest:
        return {room_of(rest)}
    if not found.names:
        return {"__init__"}
    package = root / top
    return {n if (package / n).is_dir() or (package / f"{n}.py").exists() else "__init__" for n in found.names}


def violations(root: Path) -> list[str]:
    problems = []
    for top, never in NEVER.items():
        for file in sorted((root / top).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            room = room_of(file.relative_to(root / top).with_suffix("").parts)
            if room not in ORDERS[top]:
                remedy = "give it one in ORDERS of tests/unit/test_rooms.py and in docs/design.md"
                problems.append(f"{path}: '{room}' has no place in the order of rooms; {remedy}")
                continue
            for found in imports_of(file, root):
                outside = found.module.split(".")[0]
                if outside in never and not (outside == "horovod" and path == HOROVOD_IN_FUNCTIONS and found.in_function):
                    problems.append(f"{path}:{found.line}: imports {found.module}, which {top} never does")
                for target in sorted(rooms_imported(found, root, top) - ORDERS[top][room] - {room}):
                    problems.append(f"{path}:{found.line}: '{room}' imports '{target}', which is not below it")
    return problems


def test_imports_point_down_only() -> None:
    assert not violations(REPO), "\n" + "\n".join(violations(REPO))


@pytest.mark.parametrize("package", sorted(ORDERS))
def test_the_order_of_rooms_has_no_cycle(package: str) -> None:
    """Of the rooms below the package and the command line."""
    top = {"__init__", "__main__", "cli"}
    edges = {(room, target) for room, targets in ORDERS[package].items() for target in targets if room not in top}
    nodes = {n for edge in edges for n in edge}
    while nodes:  # take the lowest floors off until nothing is left
        lowest = {n for n in nodes if not any(a == n and b in nodes for a, b in edges)}
        assert lowest, f"a cycle among {sorted(nodes)}"
        nodes -= lowest


def test_every_variable_of_mpi_backend_is_documented() -> None:
    text = (REPO / "docs" / "mpi_backend.md").read_text()
    read = {name for file in (REPO / "mpi_backend").rglob("*.py") for name in re.findall(r'"((?:MPI_BACKEND|HOROVOD)_[A-Z_]+)"', file.read_text())}
    assert len(read) > 8 and {name for name in read if f"| `{name}` |" not in text} == set()


VIOLATIONS = {
    "hvd_ecsgd/core/aggregator.py": [
        ("import mpi_backend", "imports mpi_backend"),
        ("def f():\n    from mpi4py import MPI", "imports mpi4py"),
        ("import horovod.torch as hvd", "imports horovod.torch"),
        ("def f():\n    import horovod.torch", "imports horovod.torch"),
        ("import importlib\nimportlib.import_module('horovod.torch')", "imports horovod.torch"),
        ("from hvd_ecsgd.compression import Compression", "imports 'compression'"),
        ("from .. import optimizer", "imports 'optimizer'"),
        ("from hvd_ecsgd import __version__", "imports '__init__'"),
        ("import hvd_ecsgd", "imports '__init__'"),
        ("def f():\n    import hvd_ecsgd.cli", "imports 'cli'"),
    ],
    "hvd_ecsgd/horovod/transport.py": [
        ("import horovod.torch", "imports horovod.torch"),
        ("class A:\n    import horovod", "imports horovod"),
        ("def f():\n    import mpi4py", "imports mpi4py"),
        ("from ..compression import Compression", "imports 'compression'"),
    ],
    "hvd_ecsgd/horovod/slot.py": [
        ("from ..compression import Compression", "imports 'compression'"),
        ("def f():\n    import horovod.torch", "imports horovod.torch"),
    ],
    "hvd_ecsgd/transport/torch_dist.py": [("def f():\n    import horovod", "imports horovod")],
    "hvd_ecsgd/transport/base.py": [("from ..protocols import Task", "imports 'protocols'"), ("from ..kernels import cpu", "imports 'kernels'")],
    "hvd_ecsgd/exchange/two_pass.py": [
        ("from ..feedback.none import N", "imports 'feedback'"),
        ("from ..core import aggregator", "imports 'core.aggregator'"),
    ],
    "hvd_ecsgd/feedback/none.py": [("from hvd_ecsgd.exchange import base", "imports 'exchange'")],
    "hvd_ecsgd/compressors/top_k.py": [
        ("from ..transport.base import Transport", "imports 'transport'"),
        ("from ..exchange import x", "imports 'exchange'"),
    ],
    "hvd_ecsgd/kernels/cuda.py": [
        ("from ..compressors.base import B", "imports 'compressors'"),
        ("from ..transport import base", "imports 'transport'"),
    ],
    "hvd_ecsgd/compression.py": [("def f():\n    from .optimizer import D", "imports 'optimizer'"), ("from .cli import main", "imports 'cli'")],
    "hvd_ecsgd/optimizer/join.py": [("from ..cli import main", "imports 'cli'")],
    "hvd_ecsgd/core/bound.py": [("from ..horovod.driver import HorovodDriver", "imports 'horovod'")],
    "hvd_ecsgd/core/talk.py": [("from .agreement import in_common_order", "imports 'core.agreement'")],
    "hvd_ecsgd/checkpoint/parts.py": [("from ..optimizer import D", "imports 'optimizer'")],
    "hvd_ecsgd/segments.py": [("from .protocols import P", "imports 'protocols'")],
    "hvd_ecsgd/errors.py": [("from .segments import Key", "imports 'segments'")],
    "hvd_ecsgd/attic.py": [("", "'attic' has no place")],
    "mpi_backend/runtime.py": [
        ("def f():\n    import horovod", "imports horovod"),
        ("from tests.ranks import mpirun", "imports tests.ranks"),
        ("from .lifecycle import init", "imports 'lifecycle'"),
    ],
    "mpi_backend/process_sets.py": [("if TYPE_CHECKING:\n    from . import runtime", "imports 'runtime'")],
    "mpi_backend/engine/pending.py": [("from ..collectives import handles", "imports 'collectives'")],
}
ALLOWED = {
    "hvd_ecsgd/__init__.py": "from .compression import Compression\nfrom .optimizer import DistributedOptimizer\nfrom .version import __version__",
    "hvd_ecsgd/horovod/transport.py": "from ..transport.base import Transport\ndef f():\n    import horovod.torch as hvd",
    "hvd_ecsgd/exchange/two_pass.py": "from .base import E\nfrom ..compressors.base import B\nfrom hvd_ecsgd import segments",
    "hvd_ecsgd/compressors/top_k.py": "import math, torch\nfrom ..kernels import cpu\nfrom ..protocols import Compressor\nfrom ..segments import Key",
    "hvd_ecsgd/optimizer/join.py": "from ..compression import Compression\nfrom ..core.aggregator import Aggregator",
    "hvd_ecsgd/cli.py": "import hvd_ecsgd\nfrom . import compression, optimizer",
    "mpi_backend/runtime.py": "from mpi4py import MPI\nfrom hvd_ecsgd.compression import Compression",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name in [*VIOLATIONS, *ALLOWED]:  # the modules that `from . import x` may name
        if "attic" not in name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    for name, text in files.items():
        (root / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return root


@pytest.mark.parametrize(("file", "source", "message"), [(f, s, m) for f, cases in VIOLATIONS.items() for s, m in cases])
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    found = violations(plant(tmp_path, {file: source}))
    assert len(found) == 1
    assert found[0].startswith(file)
    assert message in found[0]


def test_what_is_allowed_is_no_violation(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, ALLOWED)) == []


BACKENDS = ("horovod", "mpi4py", "mpi_backend")
EXTRAS = ("matplotlib", "safetensors", "scipy", "sklearn")


def imported_after(statements: Sequence[str], folder: Path) -> list[set[str]]:
    """Which of the packages above are imported after each statement, one after the other in a fresh process."""
    code = "import sys\n"
    for statement in statements:
        code += f"{statement}\nprint('imported', *{{m.split('.')[0] for m in sys.modules}} & {{*{BACKENDS + EXTRAS}}})\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("imported")]


def test_what_the_library_imports() -> None:
    """torch and NumPy suffice for it and for its command; no module of it imports Horovod or MPI, nor does what says which versions there are."""
    files = [f.relative_to(REPO) for f in sorted((REPO / "hvd_ecsgd").rglob("*.py")) if f.name != "__main__.py"]
    modules = [".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in files]
    every = f"""
        import importlib
        for module in {modules}:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != "triton":          # the CUDA kernels need it, and it is not everywhere
                    raise
    """
    statements = ["import hvd_ecsgd", "import hvd_ecsgd.cli", "hvd_ecsgd.cli.main(['env'])", textwrap.dedent(every)]
    library, command, versions, all_of_it = imported_after(statements, REPO)
    assert library == command == set()
    assert not versions & set(BACKENDS)
    assert not all_of_it & set(BACKENDS)


def test_an_import_of_them_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").touch()
    (tmp_path / "sklearn.py").touch()
    (tmp_path / "library.py").write_text("import mpi4py")
    assert imported_after(["import json", "import library", "import sklearn"], tmp_path) == [set(), {"mpi4py"}, {"mpi4py", "sklearn"}]
