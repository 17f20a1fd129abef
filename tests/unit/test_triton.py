"""The kernels for GPUs give what the reference on the CPU gives: in Triton's interpreter here, compiled where launch/gpu_check.sh finds a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_ecsgd.compressors import QSGD, Sign, TopK
from hvd_ecsgd.kernels import cuda, native
from hvd_ecsgd.kernels.cuda import Cuda
from hvd_ecsgd.segments import Key, Segments
from tests.pretend import on_gpu

REPO = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'hvd-ecsgd[triton]'")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By check what differed. In a process of its own, as Triton must know before it is imported that it is to interpret."""
    command = [sys.executable, "tests/gpu/program_kernels.py", "cpu", "--short"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
    lines = re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    result: dict[str, Any] = json.loads(lines[-1])
    return result


@needs_triton
def test_kernels_give_what_the_reference_gives(found: dict[str, Any]) -> None:
    """Payloads, residuals and results, to the bit but for sums; and the rules' passes."""
    assert {name: what for name, what in found.items() if what and name != "broken"} == {}
    assert len(found) > 20


@needs_triton
def test_kernels_that_are_wrong_are_found(found: dict[str, Any]) -> None:
    """Control: a tile that is left out, another random stream, a tie that is lost, a factor that is off by its last bit."""
    assert isinstance(found["broken"], dict) and len(found["broken"]) == 4 and all(found["broken"].values()), found["broken"]


def test_a_gpu_on_which_nothing_can_be_launched_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a launcher at its first launch: without a C compiler, say, the reference runs there."""

    class Kernel:
        def __init__(self, launched: Any) -> None:
            self.launched = launched

        def __getitem__(self, grid: tuple[int]) -> Any:
            return self.launched

    def fails(told: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler")

    with on_gpu():
        for launched, why in ((fails, r"Failed to find C compiler.*It needs a C compiler"), (lambda told: None, "wrote nothing")):
            assert re.search(why, cuda._why_nothing_is_launched(SimpleNamespace(tell=Kernel(launched))))
        assert cuda._why_nothing_is_launched(SimpleNamespace(tell=Kernel(lambda told: told.fill_(1)))) == ""


def test_the_cpu_is_not_theirs_and_where_triton_is_missing_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for a tensor, by its device and type; Triton that is missing, or old, is told of and not used."""
    v = torch.randn(100)
    segments = Segments.of([("w", v)])
    assert not isinstance(native.kernels_for(v, segments, "test"), Cuda)
    monkeypatch.setattr(cuda, "_loaded", lambda: (None, "Triton is 2.2.0"))
    with native.forced(Cuda):
        assert native.kernels_for(v, segments, "test") is None and cuda.why_not() == "Triton is 2.2.0"
        payloads = [c.extract_(v.clone(), segments, Key(0, 0)) for c in (Sign(), TopK(3), QSGD())]
    with native.forced(None):
        expected = [c.extract_(v.clone(), segments, Key(0, 0)) for c in (Sign(), TopK(3), QSGD())]
    assert all(torch.equal(a, b) for a, b in zip(payloads, expected, strict=True))
    monkeypatch.setattr(cuda, "_loaded", lambda: (cuda, ""))
    with native.forced(Cuda):
        assert isinstance(native.kernels_for(v, segments, "test"), Cuda)
        assert native.kernels_for(v.half(), Segments.of([("w", v.half())]), "test") is None, "halves are added in torch"
        assert native.kernels_for(torch.zeros(200)[::2], segments, "test") is None, "what is not in one piece"
