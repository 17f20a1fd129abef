"""The check of a machine with a GPU, on one without: it runs to its end, says what it did not try and why, and its parts can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import check
from tests.ranks import REPO, require_mpirun


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "WHEELS": "/nowhere"}
    return subprocess.run(["launch/gpu_check.sh", *arguments], cwd=REPO, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the check would be run as a whole")
def test_without_a_gpu_it_says_so_of_each_part(tmp_path: Path) -> None:
    done = script("--output", str(tmp_path / "found.json"))
    assert done.returncode == 2, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["parts"]) == 7 and found["machine"]["torch"] == torch.__version__
    for part in found["parts"]:
        assert part["result"] == "not run" and part["said"].startswith("no GPU")
        assert any(line.startswith(part["name"]) and "no GPU" in line for line in done.stdout.splitlines())
    assert "NCCL between two GPUs" in done.stdout and "NCCL between two GPUs" in found["not run"]


def test_a_dry_run_names_the_commands_and_a_wrong_option_is_an_error() -> None:
    done = script("--dry-run", "--short")
    assert done.returncode == 0 and "mpirun -n 3 python tests/gpu/program_methods.py cuda random_block" in done.stdout
    assert "'--cuda' is not known" in script("--cuda").stderr


def test_a_part_that_fails_does_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Any:
        def run(seconds: float) -> dict[str, Any]:
            raise error

        return run

    def parts() -> list[check.Part]:
        return [
            check.Part("fails", "", 10, raising(check.Failed("one\nthe reason"))),
            check.Part("breaks", "", 10, raising(KeyError("lost"))),
            check.Part("lacks", "", 10, raising(check.NotRun("psutil is not installed"))),
            check.Part("sleeps", "", 0.2, lambda seconds: {"said": check.started([sys.executable, "-c", "import time; time.sleep(9)"], seconds)}),
            check.Part("works", "", 10, lambda seconds: {"methods": 3}),
        ]

    monkeypatch.setattr(check, "parts_of", lambda device, short: parts())
    status = check.main(["--device", "cpu", "--output", str(tmp_path / "found.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())["parts"]}
    assert status == 1
    assert {name: row["result"] for name, row in rows.items()} == {
        "fails": "FAILED",
        "breaks": "FAILED",
        "lacks": "not run",
        "sleeps": "FAILED",
        "works": "passed",
    }
    printed = capsys.readouterr().out
    for told in ("the reason", "psutil is not installed", "not over after 0 s", "methods 3"):
        assert told in printed
    over = parts()
    check.go_through(over, 1.0)
    assert {part.said for part in over} == {"the 1 s of the whole check were over"}


def test_nccls_part_runs_over_gloo_in_its_place() -> None:
    assert check.nccl("cpu").run(100)["checks"] == 9


@pytest.mark.parametrize("program", ["program_methods", "program_training"])
def test_its_programs_run_on_the_cpu_in_the_gpus_place(program: str) -> None:
    require_mpirun()
    figures = check.ranks("", 2, program, "cpu", ["top_k", "detached"], 60).run(60)
    assert figures["methods"] == 2 and all(row["replicas"] for row in figures["rows"].values())
    if program == "program_methods":
        assert figures["rows"]["top_k"]["promised"] == "bits" and figures["rows"]["detached"]["promised"] == "near"


@pytest.mark.parametrize(
    ("printed", "told"), [('{"top_k": {"good": false, "off": 2}}', r"1 of 1 methods: top_k: .*'off': 2"), ("{}", "no method was")]
)
def test_what_ranks_found_wrong_is_told(printed: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ranks.mpirun", lambda *given, **options: f"a warning\nRESULT {printed}\n")
    with pytest.raises(check.Failed, match=told):
        check.ranks("", 2, "program_methods", "cpu", [], 60).run(60)


def test_the_benchmark_of_kernels_runs_on_the_cpu_in_the_gpus_place() -> None:
    figures = check.gpu_bench("cpu", True).run(100)
    assert figures["kernels"] == 19 and figures["copy in GB/s"] > 0 and figures["rows"]["left out"] == []
    assert {name.split(",")[0] for name in figures["steps"]} >= {"random_block", "one_bit", "top_k", "power_sgd 4"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"Sign()": ["codes"], "broken": {"a": ["x"]}}, r"1 of 1 checks: Sign\(\): \['codes'\]"),
        ({"Sign()": [], "broken": {"a": []}}, "were not found to be"),
    ],
)
def test_kernels_that_differ_are_told(rows: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(check, "started", lambda command, seconds: f"a warning\nRESULT {json.dumps(rows)}\n")
    with pytest.raises(check.Failed, match=told):
        check.kernels("cuda", False).run(60)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(check.NotRun, match="Triton is not installed"):
        check.kernels("cuda", False).run(60)
