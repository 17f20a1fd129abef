"""The trace: overlap is visible in it, and it is valid JSON whatever happens to the process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mpi_backend.engine.timeline import Timeline
from tests.ranks import REPO, mpirun, rank_environment

PROGRAM = Path(__file__).parent / "program_timeline.py"


def spans(file: Path) -> list[dict[str, Any]]:
    events = json.loads(file.read_text())
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [{"row": rows[e["tid"]], "begin": e["ts"], "end": e["ts"] + e["dur"], **e} for e in events if e["ph"] == "X"]


def of(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return sorted((s for s in found if s["name"] == name), key=lambda s: s["begin"])


def test_buckets_are_compressed_and_sent_while_backward_goes_on(tmp_path: Path) -> None:
    mpirun(2, PROGRAM, str(tmp_path / "trace.json"))
    for file in (tmp_path / "trace.json", tmp_path / "trace.json.rank1"):
        found = spans(file)
        (backward,) = of(found, "BACKWARD")
        compressed, sent = of(found, "COMPRESS"), of(found, "COMMUNICATE")
        assert len(compressed) == len(sent) == 4
        assert [s["row"] for s in compressed] == [s["row"] for s in sent] == [f"optimizer 0 bucket{i}" for i in range(4)], "in one order"
        assert sent[0]["args"] == {"parameters": ["layer3.bias", "layer3.weight"], "gradient bytes": 4 * 40 * 41}
        assert all(s["begin"] < backward["end"] for s in compressed[:3]), "the last layers' buckets start during the backward pass"
        assert all(s["end"] < backward["end"] for s in sent[:2]), "and arrive during it"
        assert backward["dur"] > 600_000
        rows = {(s["row"], s["name"]) for s in found}  # as in Horovod's
        for kind in ("allreduce", "allgather", "broadcast", "alltoall", "reducescatter", "grouped_allreduce"):
            operation = kind.removeprefix("grouped_").upper()
            assert {(f"{kind}.a name", f"NEGOTIATE_{operation}"), (f"{kind}.a name", operation)} <= rows, sorted(rows)
        assert not any("after the end" in row for row, _ in rows)
        assert [s["args"]["what"] for s in found if s["row"] == "allreduce.a name" and s["name"] == "ALLREDUCE"] == ["allreduce of 12 bytes"]


def test_without_overlap_nothing_is_sent_before_backward_ends(tmp_path: Path) -> None:
    """The control: the trace can show it."""
    mpirun(2, PROGRAM, str(tmp_path / "trace.json"), env={"MPI_BACKEND_OVERLAP": "0"})
    found = spans(tmp_path / "trace.json")
    (backward,) = of(found, "BACKWARD")
    assert len(of(found, "COMPRESS")) == 4
    assert all(s["begin"] >= backward["end"] for s in [*of(found, "COMPRESS"), *of(found, "COMMUNICATE")])


def test_a_killed_process_leaves_valid_json(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    code = f"""
import itertools, os, sys
from mpi_backend.engine.timeline import Timeline
timeline = Timeline({str(file)!r}, 0)
for i in itertools.count():
    timeline.span(f"row {{i % 7}}", "SPAN", i, i + 0.5, what="x" * (i % 50))
    if i == 200:
        print("running", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env=rank_environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"running\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert len(of(spans(file), "SPAN")) > 200


def test_an_empty_trace_is_valid_and_a_closed_one_takes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    timeline = Timeline(str(file), 3)
    assert [e["args"] for e in json.loads(file.read_text())] == [{"name": "rank 3", "start_time_since_epoch_in_micros": 0}], "as in Horovod's"
    timeline.close()
    timeline.span("row", "SPAN", 0.0, 1.0)
    assert len(json.loads(file.read_text())) == 1
