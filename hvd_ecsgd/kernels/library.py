"""Where the compiled kernels are, whether they are to be used, and how to call them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import warnings
from pathlib import Path

import torch

from ..errors import CompressionError

__all__ = ["FILE", "REMEDY", "VARIANTS", "Library", "chosen", "digest_of_sources"]

VARIANTS = ("portable", "avx2", "avx512")
"""By level: which instructions a kernel uses."""

FILE = Path(__file__).parent / "libhvd_ecsgd_cpu.so"
REMEDY = (
    "Build it with `pip install` from the sources (`pip install -v` shows why it could not be), or in a source checkout with "
    "`python setup.py build_ext --inplace`; both need a C++17 compiler (CXX chooses one). HVD_ECSGD_KERNELS=reference does without."
)
_OUT_OF_MEMORY = -(2**63)

_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_TABLE = (_pointer, _long)
_PAYLOADS = (_pointer, _long, _double, _int)
_ASKED = (_int, _int, _pointer, _pointer)
# Arguments by function; all but the first few return int64.
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "sign_extract": (_int, _pointer, *_TABLE, _pointer, _int, _long, _pointer, _int),
    "sign_decode": (_int, _pointer, *_TABLE, *_PAYLOADS, *_ASKED, _long, _int),
    "ternary_extract": (_int, _pointer, *_TABLE, _pointer, _int, _pointer, _pointer, _int),
    "ternary_decode": (_int, _pointer, *_TABLE, *_PAYLOADS, *_ASKED, _int),
    "positions_take": (_int, _pointer, *_TABLE, _pointer, _pointer, _pointer, _int),
    "positions_decode": (_int, _pointer, *_TABLE, _pointer, _pointer, _pointer, _double, _int, _long, _int),
    "positions_move": (_int, _pointer, *_TABLE, _pointer, _pointer, _pointer, _int),
    "top_k": (_int, _pointer, *_TABLE, _pointer, _pointer, _pointer, _pointer, _int),
    "block_top_k_extract": (_int, _pointer, *_TABLE, _pointer, _long, _long, _pointer, _int),
    "block_top_k_decode": (_int, _pointer, *_TABLE, _pointer, _long, _long, _pointer, _double, _int, _int),
    "threshold_choose": (_int, _pointer, *_TABLE, _pointer, _pointer, _pointer, _pointer, _pointer, _int, _int),
    "threshold_take": (_int, _pointer, *_TABLE, _pointer, _pointer, _pointer, _int),
    "random_k_positions": (*_TABLE, _pointer, _pointer, _pointer, _int),
    "qsgd_extract": (_int, _pointer, *_TABLE, _pointer, _pointer, _long, _long, _int, _int, _int),
    "qsgd_decode": (_int, _pointer, *_TABLE, *_PAYLOADS, *_ASKED, _long, _long, _int, _int),
    "natural_extract": (_int, _pointer, *_TABLE, _pointer, _pointer, _int),
    "natural_decode": (_int, _pointer, *_TABLE, *_PAYLOADS, *_ASKED, _int),
    "cast_extract": (_int, _pointer, *_TABLE, _pointer, _int, _double, _int),
    "cast_decode": (_int, _pointer, *_TABLE, _pointer, _int, _double, _int, _int),
    "accumulate": (
        *(_int, _pointer, *_TABLE, _pointer, _pointer, _int, _pointer, _int, _pointer, _pointer),
        *(*_TABLE, *_ASKED, _int),
    ),
    "cast_extract_from": (_int, *_TABLE, _int, _pointer, _pointer, _int, _double, _int),
    "qsgd_extract_from": (_int, *_TABLE, _int, _pointer, _pointer, _pointer, _long, _long, _int, _int, _int),
    "shift": (_int, _pointer, *_TABLE, _pointer, _double, _pointer, _pointer, _pointer, _int),
    "low_rank_p": (_int, _pointer, *_TABLE, _pointer, _long, _pointer, _pointer, _int),
    "low_rank_q": (_int, _pointer, *_TABLE, _pointer, _long, _pointer, _pointer, _int),
    "low_rank_decode": (_int, _pointer, *_TABLE, _pointer, _long, _pointer, _pointer, _pointer, _pointer, _int),
    "all_finite": (_int, _pointer, _long, _int),
    "fingerprint": (_pointer, _long, _int, _pointer, _int),
}


def digest_of_sources(folder: Path) -> str:
    """Names the C++ sources in `folder` by their content; setup.py compiles it in. Empty when there are none."""
    files = sorted(f for f in folder.glob("*") if f.suffix in (".cpp", ".h"))
    return hashlib.blake2b(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files), digest_size=8).hexdigest() if files else ""


def _fork_of_torch() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch is linked with, which the runtimes of GCC, LLVM and Intel have; None without."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded long since
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


class Library:
    """The compiled kernels as functions of numbers and addresses. ctypes releases the interpreter's lock while one runs."""

    def __init__(self, path: Path) -> None:
        """Raises OSError with the reason when it cannot be loaded, or was built from other sources than those beside it."""
        self._library = ctypes.CDLL(str(path))
        try:
            self._library.hvd_ecsgd_sources.restype = ctypes.c_char_p
            built_from = self._library.hvd_ecsgd_sources().decode()
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, f"hvd_ecsgd_{name}")
                function.argtypes, function.restype = arguments, _long
            use_openmp = self._library.hvd_ecsgd_use_openmp
            use_openmp.argtypes, use_openmp.restype = (_pointer,), None
        except AttributeError as error:
            raise OSError(f"{path} was built from other sources: {error}") from None
        if built_from != (expected := digest_of_sources(path.parent / "csrc")) and expected:
            raise OSError(f"{path} was built from other sources than those in {path.parent / 'csrc'}")
        use_openmp(_fork_of_torch())

    def call(self, name: str, *arguments: object) -> int:
        """What the kernel returns: 0 or a count; -1 - i when the payload of segment i is wrong. MemoryError when there is not enough."""
        result: int = getattr(self._library, f"hvd_ecsgd_{name}")(*arguments)
        if result == _OUT_OF_MEMORY:
            raise MemoryError(f"kernel {name}: not enough memory")
        return result

    @property
    def variant(self) -> str:
        """Which instructions are used."""
        return VARIANTS[self._library.hvd_ecsgd_variant()]

    def limit_variant(self, most: str) -> str:
        """For tests: as if the processor had no more than `most` of `VARIANTS`; returns what is used then."""
        return VARIANTS[self._library.hvd_ecsgd_limit_variant(VARIANTS.index(most))]


def chosen(wanted: str | None) -> Library | None:
    """The library that `HVD_ECSGD_KERNELS` asks for; None for the reference. Raises `CompressionError` when it asks for what is not there."""
    if wanted not in (None, "", "native", "reference"):
        raise CompressionError(f"HVD_ECSGD_KERNELS must be native or reference, or not be set (native where it was built), got {wanted!r}.")
    if wanted == "reference":
        return None
    try:
        return Library(FILE)
    except OSError as error:
        reason = " ".join(str(error).split())
    if wanted == "native":
        raise CompressionError(f"HVD_ECSGD_KERNELS=native, and the compiled kernels cannot be loaded: {reason}. {REMEDY}")
    global _missing
    _missing = f"hvd-ecsgd runs without its compiled kernels, and slower: {reason}. {REMEDY}"
    return None


_missing = ""


def what_is_missing() -> str:
    """Why the compiled kernels are not used although nobody asked for the reference, and the remedy; once, then it is empty."""
    global _missing
    message, _missing = _missing, ""
    return message


def say_what_is_missing() -> None:
    """That as a warning, if there is anything to say."""
    if message := what_is_missing():
        warnings.warn(message, UserWarning, stacklevel=2)


def from_environment() -> Library | None:
    return chosen(os.environ.get("HVD_ECSGD_KERNELS"))
