"""The optional compiled part of the build: made when it can be, never in the way of an installation. Tried with a throw-away source in a copy."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

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
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "build/lib/hvd_ecsgd/version.py").exists()
    assert (root / "build/lib/hvd_ecsgd/py.typed").exists()
    assert (root / "build/lib/mpi_backend/py.typed").exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("hvd-ecsgd:")]
    assert len(said) <= 1
    return "".join(said), root / "build/lib"


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


@needs_compiler
def test_the_wheel_is_of_a_platform_and_of_any_python(copy: Path) -> None:
    add_sources(copy)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('made'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120)
    assert "-py3-none-linux_" in done.stdout.splitlines()[-1], done.stdout + done.stderr


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
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = PathDistribution(next(copy.glob("made/*.dist-info")))
    assert (found.metadata["Name"], found.metadata["License-Expression"]) == ("hvd-ecsgd", "Apache-2.0")
    assert f'__version__ = "{found.version}"' in (REPO / "hvd_ecsgd/version.py").read_text()
    assert found.metadata.get_payload() == (REPO / "README.md").read_text(encoding="utf-8")
    assert [(e.group, e.name, e.value) for e in found.entry_points] == [("console_scripts", "hvd-ecsgd", "hvd_ecsgd.cli:main")]
    assert set(found.metadata.get_all("Provides-Extra")) == {"horovod", "mpi", "checkpoint", "telemetry", "triton", "examples", "docs", "dev"}
    requirements = found.requires or []
    assert [r for r in requirements if "extra" not in r] == ["torch>=2.2", "numpy"]
    assert not [r for r in requirements if "hvd-ecsgd" in r], "an extra that names another one would bring in the MPI that MPI=system leaves out"
