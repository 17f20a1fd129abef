"""Decoders of payloads are looked for what breaks them: inputs that reach new branches are kept and changed further, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hvd_ecsgd.kernels.library import VARIANTS
from tests.unit.test_kernels import REPO, compiled, library, preloaded_sanitizer

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
COUNTED = "-fsanitize-coverage=trace-pc"
SECONDS = 20


def built(folder: Path) -> Path:
    """The kernels, whose edges are counted, and what feeds them."""
    assert library is not None
    compiler, csrc = os.environ.get("CXX", "g++"), REPO / "hvd_ecsgd/kernels/csrc"
    common = [compiler, "-std=c++17", "-O0", "-ffp-contract=off", "-pthread", *SANITIZERS, "-c"]
    only = f"-DHVD_ECSGD_ONLY={VARIANTS.index(library.variant)}"
    parts = {
        "kernels.o": [COUNTED, only, str(csrc / "kernels.cpp")],
        "pool.o": [str(csrc / "pool.cpp")],
        "fuzz.o": [str(REPO / "tests/unit/fuzz_decoders.cpp")],
    }
    for name, arguments in parts.items():
        done = subprocess.run([*common, *arguments, "-o", str(folder / name)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [compiler, *SANITIZERS, "-pthread", *(str(folder / name) for name in parts), "-o", str(folder / "fuzz")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "fuzz"


@pytest.mark.full
@compiled
@pytest.mark.skipif(shutil.which("g++") is None or preloaded_sanitizer() is None, reason="no g++ with libasan")
def test_no_payload_breaks_a_decoder(tmp_path: Path) -> None:
    """Control: a payload that is a byte too short is seen."""
    program = built(tmp_path)
    done = subprocess.run([str(program), str(SECONDS), "1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    executions, at_first, at_last, refused = map(int, done.stdout.split())
    assert executions > 100 and 0 < at_first < at_last and refused > 0, done.stdout
    short = subprocess.run([str(program), "control"], capture_output=True, text=True, timeout=600)
    assert short.returncode != 0 and "heap-buffer-overflow" in short.stderr
