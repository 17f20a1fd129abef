"""The benchmarks run; how fast is another matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, restarts
from hvd_ecsgd.core.bucket import Bucket
from hvd_ecsgd.kernels.native import native_library


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_benchmark_of_kernels_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method, with a row in the table and in the file; lossless ones but for rounding have next to no error, and no method all of it twice."""
    kernels.main(["--short", "--output", str(tmp_path / "made")])
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(kernels.METHODS)
    printed = capsys.readouterr().out
    for row in rows:
        assert row["method"] in printed
        assert min(row["T"].values()) > 0
        assert row["bytes"] > 0
    errors = {row["method"]: row["error"] for row in rows}
    assert errors["fp16"] < 1e-3
    assert errors["qsgd"] < 0.1 < errors["top_k"] < 1.1
    assert errors["detached"] is None


@pytest.mark.skipif(native_library() is None, reason="passes are those of the compiled kernels")
def test_passes_over_memory_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A step that accumulates, that packs and subtracts in one pass, and that decodes over what was there: 3, 2 and 1 streams."""
    kernels.main(["--short", "--passes", "--only", "one_bit"])
    whole, *parts = capsys.readouterr().out.splitlines()
    assert whole.startswith("one_bit: 6.")
    streams = {line.split()[0]: float(line.split("calls")[1].split()[0]) for line in parts}
    assert {name: n for name, n in streams.items() if n > 0.5} == {"accumulate": 3.0, "sign_extract": 2.0, "sign_decode": 1.0}


@pytest.mark.skipif(native_library() is None, reason="passes are those of the compiled kernels")
def test_one_rank_keeps_no_copy_of_its_payload(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing overwrites it: with a copy to undo by, fp16 would read and write half a stream more each."""
    kernels.main(["--short", "--passes", "--only", "fp16"])
    whole, *parts = capsys.readouterr().out.splitlines()
    assert whole.startswith("fp16: 6.")
    assert not any("copy_" in line for line in parts)


@pytest.mark.skipif(native_library() is None, reason="they are of the compiled kernels")
def test_what_threads_gain_and_distributions_cost_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A number for each method, and for each distribution but the one that is compared with; of one thread there is nothing to gain."""
    kernels.main(["--short", "--gain", "--threads", "2", "--layers", "1", "--only", "qsgd"])
    name, number, _ = capsys.readouterr().out.split()
    assert name == "qsgd" and float(number) > 0
    kernels.main(["--short", "--distributions", "--only", "top_k"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[2:] == [kind for kind in kernels.DISTRIBUTIONS if kind != "normal"]
    assert all(float(number) > 0 for number in row.split()[1:]) and len(row.split()) == len(kernels.DISTRIBUTIONS)
    with pytest.raises(SystemExit):
        kernels.main(["--short", "--gain", "--only", "qsgd"])
    assert "--threads 2" in capsys.readouterr().err


def test_a_method_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--short", "--only", "top_kk"])
    assert "'top_kk' is none of" in capsys.readouterr().err


def test_losses_around_restarts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of numbers, with units as they are and with the control's, which are put back."""
    monkeypatch.setattr(restarts, "PERIOD", 4)
    monkeypatch.setattr(restarts, "AFTER", 2)
    kept = Bucket.unit_for
    for control in ([], ["--control"]):
        restarts.main(["--only", "top_k(50)", *control])
        assert Bucket.unit_for is kept
        row = capsys.readouterr().out.splitlines()[1].split()
        assert row[0] == "top_k(50)" and len(row) == 7 and all(float(number) > 0 for number in row[1:])
