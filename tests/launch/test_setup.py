"""The optional compiled part of the build: made when it can be, never in the way of an installation. Tried with a throw-away source in a copy."""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import setuptools

REPO = Path(__file__).resolve().parents[2]
LIBRARY = Path("hvd_ecsgd/kernels/libhvd_ecsgd_cpu.so")
SOURCES = {
    "export.h": '#define EXPORT extern "C" __attribute__((visibility("default")))\n',
    "add.cpp": '#include "export.h"\n#include <vector>\nEXPORT int add(int a, int b) { return std::vector<int>(3, a)[2] + b; }\n',
    "more.cpp": '#include "export.h"\nint hidden() { return 5; }\nEXPORT int five() { return hidden(); }\n',
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the build reads, with empty packages."""
    root = tmp_path / "copy"
    for package in ("hvd_ecsgd/kernels", "mpi_backend"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hvd_ecsgd/version.py", "hvd_ecsgd/py.typed", "mpi_backend/py.typed"):
        shutil.copy(REPO / name, root / name)
    (root / "hvd_ecsgd" / "__init__.py").touch()
    return root


def add_sources(root: Path, **more: str) -> None:
    folder = root / "hvd_ecsgd" / "kernels" / "csrc"
    folder.mkdir(exist_ok=True)
    for name, text in {**SOURCES, **more}.items():
        (folder / name).write_text(text)


def build(root: Path, **env: str) -> tuple[str, Path]:
    """What the build said about the library, and where it put the packages."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "build", "--build-lib", "build/lib"]
    variables = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS")} | env
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "build/lib/hvd_ecsgd/version.py").exists()
    assert (root / "build/lib/hvd_ecsgd/py.typed").exists()
    assert (root / "build/lib/mpi_backend/py.typed").exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("hvd-ecsgd:")]
    assert len(said) <= 1
    return "".join(said), root / "build/lib"


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux is of Linux")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: 'c++' is not on PATH")


def test_without_sources_nothing_is_compiled_and_nothing_is_said(copy: Path) -> None:
    said, built = build(copy)
    assert said == ""
    assert not (built / LIBRARY).exists()


@needs_compiler
def test_with_sources_the_library_is_built_and_its_c_interface_works(copy: Path) -> None:
    add_sources(copy)
    said, built = build(copy)
    assert said == f"hvd-ecsgd: built {LIBRARY}."
    library = ctypes.CDLL(str(built / LIBRARY))
    assert library.add(2, 3) == library.five() == 5
    assert not hasattr(library, "_Z6hiddenv")


def packed(root: Path, *kinds: str, **env: str) -> list[Path]:
    """What pip and `python -m build` get of setup.py, in turn: the sdist, the wheel."""
    code = f"from setuptools import build_meta\nfor kind in {kinds}: print('made/' + getattr(build_meta, 'build_' + kind)('made'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [root / line for line in done.stdout.splitlines() if line.startswith("made/")]


@pytest.fixture(scope="module")
def decides() -> Callable[[Path], bool]:
    """`runs_on_manylinux_2_28` of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: None)
        found: Callable[[Path], bool] = runpy.run_path(str(REPO / "setup.py"))["runs_on_manylinux_2_28"]
    return found


def test_a_wheel_without_the_library_is_of_any_platform(copy: Path) -> None:
    add_sources(copy)
    assert packed(copy, "wheel", CXX="no-such-compiler")[0].name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize(
    ("symbols", "answer"),
    [
        (["GLIBC_2.2.5", "GLIBC_2.28", "GLIBCXX_3.4.24", "CXXABI_1.3.11", "GCC_7.0.0"], True),
        (["GLIBC_2.2.5", "GLIBC_2.29"], False),
        (["GLIBC_2.14", "GLIBCXX_3.4.30"], False),
        (["GLIBC_2.14", "CXXABI_1.3.13"], False),
        (["GLIBC_2.14", "GCC_12.0.0"], False),
        ([], False),
    ],
)
def test_a_library_that_needs_newer_symbols_is_not_called_manylinux(
    symbols: list[str], answer: bool, tmp_path: Path, decides: Callable[[Path], bool]
) -> None:
    (tmp_path / "library").write_bytes(b"\x7fELF\0" + b"\0".join(s.encode() for s in ["memcpy", *symbols, "free"]) + b"\0")
    assert decides(tmp_path / "library") is answer


@needs_linux
@pytest.mark.skipif(not (REPO / LIBRARY).exists(), reason="the kernels are not compiled: python setup.py build_ext --inplace")
def test_what_is_packed_and_that_it_runs_where_nothing_else_is(copy: Path, tmp_path: Path, decides: Callable[[Path], bool]) -> None:
    """Of these sources, but the compiler gives out what it made before. launch/wheels.sh does it all in earnest."""
    assert decides(REPO / LIBRARY), "auditwheel shows which symbols are too new; hvd_ecsgd/kernels/csrc has to do without them"
    for folder in ("hvd_ecsgd", "mpi_backend", "launch", "tests", "docs"):
        shutil.copytree(REPO / folder, copy / folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    shutil.copy(REPO / "MANIFEST.in", copy)
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nfor last; do case $before in -o) cp "{REPO / LIBRARY}" "$last" ;; esac; before=$last; done\n')
    compiler.chmod(0o755)
    sdist, wheel = packed(copy, "sdist", "wheel", CXX=str(compiler))
    assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{os.uname().machine}.whl")
    with tarfile.open(sdist) as file:
        sources = {name.partition("/")[2] for name in file.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "target")
    modules = {f.relative_to(copy).as_posix() for package in ("hvd_ecsgd", "mpi_backend") for f in (copy / package).rglob("*.py")}
    assert installed == {*modules, LIBRARY.as_posix(), "hvd_ecsgd/py.typed", "mpi_backend/py.typed"}
    assert sources >= {*modules, "hvd_ecsgd/kernels/csrc/pool.cpp", "launch/install_horovod.sh", "tests/cases.py", "docs/presets.py"}
    assert LIBRARY.as_posix() not in sources
    code = """if True:
        import hvd_ecsgd.cli, torch
        from hvd_ecsgd.kernels.native import native_library
        print(hvd_ecsgd.__file__, native_library().variant)
        hvd_ecsgd.cli.main(["methods"])
    """
    env = {k: v for k, v in os.environ.items() if k != "HVD_ECSGD_KERNELS"} | {"PYTHONPATH": str(tmp_path / "target")}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "target" / "hvd_ecsgd")) and "double_squeeze" in done.stdout


def test_without_a_compiler_the_build_goes_on_and_says_so(copy: Path) -> None:
    add_sources(copy)
    said, built = build(copy, CXX="no-such-compiler")
    assert "installing without the compiled kernels, as there is no C++ compiler ('no-such-compiler' is not on PATH; set CXX to one)" in said
    assert not (built / LIBRARY).exists()


@needs_compiler
def test_when_compiling_fails_the_build_goes_on_and_says_so_and_keeps_no_older_library(copy: Path) -> None:
    add_sources(copy)
    _, built = build(copy)
    assert (built / LIBRARY).exists()
    add_sources(copy, **{"broken.cpp": "this is not C++\n"})
    said, built = build(copy)
    assert "installing without the compiled kernels, as compiling hvd_ecsgd/kernels/csrc failed" in said
    assert not (built / LIBRARY).exists()


def test_metadata(copy: Path) -> None:
    """What the package promises to installers, read without importing anything of it; launch/common.sh reads the extras with `MPI=system`."""
    code = "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('made'); assert 'torch' not in sys.modules"
    (copy / "made").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = PathDistribution(next(copy.glob("made/*.dist-info")))
    assert (found.metadata["Name"], found.metadata["License-Expression"]) == ("hvd-ecsgd", "Apache-2.0")
    assert f'__version__ = "{found.version}"' in (REPO / "hvd_ecsgd/version.py").read_text()
    assert found.metadata.get_payload() == (REPO / "README.md").read_text(encoding="utf-8")
    assert [(e.group, e.name, e.value) for e in found.entry_points] == [("console_scripts", "hvd-ecsgd", "hvd_ecsgd.cli:main")]
    assert set(found.metadata.get_all("Provides-Extra")) == {
        "horovod",
        "mpi",
        "checkpoint",
        "telemetry",
        "triton",
        "examples",
        "frameworks",
        "docs",
        "dev",
    }
    requirements = found.requires or []
    assert [r for r in requirements if "extra" not in r] == ["torch>=2.2", "numpy"]
    assert not [r for r in requirements if "hvd-ecsgd" in r], "an extra that names another one would bring in the MPI that MPI=system leaves out"
