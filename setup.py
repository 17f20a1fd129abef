"""The entry of hvd-ecsgd's build. Metadata and tool settings are in pyproject.toml, the version is in hvd_ecsgd/version.py.

The library is pure Python but for one optional part: the C++ sources in hvd_ecsgd/kernels/csrc/, compiled into one plain shared library that has a C
interface and is loaded by ctypes (so it needs neither Python's nor torch's headers, nor a rebuild for another of them). Without a compiler, or when
compiling fails, the installation succeeds without that library and says so in one line (`pip install -v` shows it); kernels then run in torch.
In a source checkout that is on PYTHONPATH, `python setup.py build_ext --inplace` puts the library where it is looked for.
Set CXX to choose the compiler and CXXFLAGS to add options; the instructions of the processor are chosen when the library runs, not by options.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = Path("hvd_ecsgd/kernels")
LIBRARY = KERNELS / "libhvd_ecsgd_cpu.so"  # ctypes loads this name on Linux and macOS alike
# Functions to be exported say so: __attribute__((visibility("default"))). One rounding for each operation, as in torch: nothing is contracted.
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-pthread",
    "-g0",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


def kernel_extension() -> list[Extension]:
    sources = [os.path.relpath(path, ROOT) for path in sorted((ROOT / KERNELS / "csrc").glob("*.cpp"))]
    headers = [os.path.relpath(path, ROOT) for path in sorted((ROOT / KERNELS / "csrc").glob("*.h"))]
    if not sources:
        return []
    name = ".".join(LIBRARY.with_suffix("").parts)
    # As hvd_ecsgd.kernels.library.digest_of_sources, which tells a library that is older than its sources; importing that would import torch.
    files = [ROOT / name for name in sorted(sources + headers, key=os.path.basename)]
    digest = hashlib.blake2b(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files), digest_size=8).hexdigest()
    return [
        Extension(
            name,
            sources,
            depends=headers,
            language="c++",
            define_macros=[("HVD_ECSGD_SOURCES", f'"{digest}"')],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


class BuildOptionalLibrary(build_ext):
    """Compiles the shared library if it can; never fails the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """The plain name: this is no Python extension module, so it carries no Python's tag."""
        return os.path.join(*fullname.split(".")[:-1], LIBRARY.name)  # setuptools asks with and without the packages before the name

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols or [])  # no PyInit_…

    def run(self) -> None:
        compiler = os.environ.get("CXX") or "c++"
        if shutil.which(compiler.split()[0]) is None:
            return self.without(f"there is no C++ compiler ('{compiler}' is not on PATH; set CXX to one)")
        os.environ["CXX"] = compiler  # what setuptools will use, whatever compiler this Python was built with
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.without(f"compiling {KERNELS / 'csrc'} failed ({' '.join(str(error).split())})")
        else:
            print(f"hvd-ecsgd: built {LIBRARY}.", file=sys.stderr)

    def without(self, reason: str) -> None:
        print(f"hvd-ecsgd: installing without the compiled kernels, as {reason}; the torch kernels are used instead.", file=sys.stderr)
        for ext in self.extensions:  # an older build must not be taken for this one
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if getattr(self, "editable_mode", False):
                (ROOT / LIBRARY).unlink(missing_ok=True)
        self.extensions = []


# What systems of manylinux_2_28 have, by the names of symbols' versions: glibc 2.28, and GCC 8's libraries.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def runs_on_manylinux_2_28(library: Path) -> bool:
    """Whether the newest symbols that it needs are there; `auditwheel show`, in launch/wheels.sh, asks for more and agrees."""
    needed = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)(?=\0)", library.read_bytes())
    return bool(needed) and all(tuple(map(int, version.split(b"."))) <= MANYLINUX_2_28[kind.decode()] for kind, version in needed)


class WheelOfAnyPython(bdist_wheel):
    """The library is of one platform, and of no Python's binary interface. Without it, the wheel is of any platform."""

    def get_tag(self) -> tuple[str, str, str]:
        library = Path(self.bdist_dir) / LIBRARY
        platform = super().get_tag()[2] if library.exists() else "any"
        if platform.startswith("linux_") and runs_on_manylinux_2_28(library):
            platform = "manylinux_2_28" + platform.removeprefix("linux")
        return "py3", "none", platform


setup(ext_modules=kernel_extension(), cmdclass={"build_ext": BuildOptionalLibrary, "bdist_wheel": WheelOfAnyPython})
