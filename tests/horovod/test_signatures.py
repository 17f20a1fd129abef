"""mpi_backend offers what horovod.torch does: every public name, with the same arguments in the same order and the same defaults."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

import mpi_backend
from tests.ranks import require_horovod

ABSENT = {
    "elastic": "elastic training is not part of MPI jobs, whose size is fixed",
    "mpi_lib_v2": "Horovod's extension",
}
OURS = {"init": [f"Horovod None, here {('servers', inspect.Parameter.POSITIONAL_OR_KEYWORD, None)}"]}
"""Arguments that come after all of Horovod's."""
MODULES = ("compression", "functions", "mpi_ops", "optimizer", "sync_batch_norm")


def public(module: Any) -> list[str]:
    return sorted(name for name in vars(module) if not name.startswith("_") and name not in (*ABSENT, *MODULES))


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def comparable(default: Any) -> Any:
    """Defaults that are objects of either package by what they are."""
    if type(default).__name__ == "ProcessSet":
        return "ProcessSet", default.process_set_id
    if getattr(default, "__name__", "") == "NoneCompressor" or default is mpi_backend.Compression.none:
        return "Compression.none"
    return default


def differences(theirs: Any, ours: Any) -> list[str]:
    a = [(name, kind, comparable(default)) for name, kind, default in parameters(theirs)]
    b = [(name, kind, comparable(default)) for name, kind, default in parameters(ours)]
    return [f"Horovod {x}, here {y}" for x, y in zip([*a, *[None] * (len(b) - len(a))], [*b, *[None] * (len(a) - len(b))], strict=True) if x != y]


def horovod() -> Any:
    require_horovod()
    import horovod.torch

    return horovod.torch


def original(hvd: Any, name: str) -> Any:
    """Horovod's function of this name; `init` and `shutdown` pass all arguments on to the basics."""
    return getattr(hvd.mpi_ops._basics, name) if name in ("init", "shutdown") else getattr(hvd, name)


def test_every_public_name_is_there() -> None:
    missing = [name for name in public(horovod()) if not hasattr(mpi_backend, name)]
    assert not missing
    assert not [name for name in public(horovod()) if name not in mpi_backend.__all__]


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_scripts_import_from_are_there(module: str) -> None:
    theirs, ours = getattr(horovod(), module), importlib.import_module(f"mpi_backend.{module}")
    made_there = [
        name
        for name, value in vars(theirs).items()
        if getattr(value, "__module__", "") == theirs.__name__ and not name.startswith("_") and not hasattr(value, "backward")  # steps of autograd
    ]
    assert made_there and not [name for name in made_there if not hasattr(ours, name)]
    assert hasattr(mpi_backend, module)


def test_arguments_are_the_same() -> None:
    hvd = horovod()
    compared = [name for name in public(hvd) if callable(getattr(hvd, name)) and name not in ("Compression", "HorovodInternalError", "ProcessSet")]
    assert len(compared) > 50
    found = {name: d for name in compared if (d := differences(original(hvd, name), getattr(mpi_backend, name)))}
    assert found == OURS


@pytest.mark.parametrize("method", ["__init__", "size", "rank", "included"])
def test_process_sets_have_the_same_methods(method: str) -> None:
    assert not differences(getattr(horovod().ProcessSet, method), getattr(mpi_backend.ProcessSet, method))


def test_constants_are_the_same() -> None:
    hvd = horovod()
    for name in ("Average", "Sum", "Adasum", "Min", "Max", "Product"):
        assert getattr(mpi_backend, name) == getattr(hvd, name)
    assert issubclass(mpi_backend.HorovodInternalError, RuntimeError) and issubclass(hvd.HorovodInternalError, RuntimeError)


def test_the_comparison_notices_a_difference() -> None:
    """Control: another order, another default and a missing argument."""

    def stock(tensor: Any, name: Any = None, op: int = 0) -> None: ...
    def reordered(tensor: Any, op: int = 0, name: Any = None) -> None: ...
    def default(tensor: Any, name: Any = None, op: int = 1) -> None: ...
    def shorter(tensor: Any, name: Any = None) -> None: ...

    assert not differences(stock, stock)
    assert all(differences(stock, other) for other in (reordered, default, shorter))
