"""Where records go, and what is made of them: JSON lines, TensorBoard, tqdm, `hvd-ecsgd report` and `hvd-ecsgd watch` (docs/telemetry.md)."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import sys
import types
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer, GradientExchange
from hvd_ecsgd.cli import main
from hvd_ecsgd.telemetry import FIELDS, JsonLines, Logger, Progress, TensorBoard
from hvd_ecsgd.telemetry import watch as watching
from hvd_ecsgd.telemetry.report import draw, summary
from hvd_ecsgd.telemetry.runs import Run
from hvd_ecsgd.transport import Transport, run_simulated
from tests.forked import forked
from tests.problems import mlp, train

REPO = Path(__file__).resolve().parents[2]


def run(file: Path, steps: range = range(6), *others: Any, saved: Any = None, groups: bool = False, **options: Any) -> Any:
    """Two workers; the first one logs. Returns the states of model and compression, by rank."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        parts: Any = [{"params": model[0].parameters()}, {"params": model[2].parameters()}] if groups else model.parameters()
        compression = Compression.double_squeeze().bind(model)
        optimizer = DistributedOptimizer(torch.optim.SGD(parts, lr=0.1), model.named_parameters(), compression, transport=transport)
        if saved is not None:
            model.load_state_dict(saved[transport.rank][0])
            compression.load_state_dict(saved[transport.rank][1])
        with Logger(compression, file, *(others if transport.rank == 0 else ()), norms_every=2, **options):
            train(model, optimizer, transport.rank, steps)
        return model.state_dict(), compression.state_dict()

    return run_simulated(2, worker)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- files -------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_adds_to_its_file(tmp_path: Path) -> None:
    """Steps that were taken again count once, the later ones; a line that a full disk has cut harms no other."""
    file = tmp_path / "made" / "run.jsonl"
    saved = run(file, range(4))
    run(file, range(4, 6), saved=saved)  # killed after step 5, which no checkpoint has
    with file.open("a") as cut:
        cut.write('{"kind":"step","st')
    run(file, range(4, 7), saved=saved)
    assert [line["kind"] for line in lines_of_runs(file)] == ["run"] * 3 and not (tmp_path / "made" / "run.rank1.jsonl").exists()
    read = Run.read(file)
    assert list(read.steps) == list(range(7)) and read.starts == 3 and read.broken == 1 and read.about["size"] == 2
    assert sum(1 for line in file.read_bytes().split(b"\n") if b'"kind":"step"' in line and line.endswith(b"}")) == 4 + 2 + 3
    fresh = tmp_path / "fresh.jsonl"
    run(fresh, range(7))
    straight = Run.read(fresh)
    for name in ("relative_error", "residual_norm", "sent_bytes"):
        assert read.series(name) == straight.series(name), "what the run would have told without a break"


def lines_of_runs(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith('{"kind":"run"')]


def test_a_fresh_run_in_an_old_file_is_the_one_that_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    run(file, range(6))
    run(file, range(2))
    assert list(Run.read(file).steps) == [0, 1]


def test_every_rank_has_a_file_of_its_own(tmp_path: Path) -> None:
    run(tmp_path / "run.jsonl", ranks="all")
    for rank, name in enumerate(("run.jsonl", "run.rank1.jsonl")):
        assert {line["rank"] for line in lines(tmp_path / name)} == {rank}
        assert Run.read(tmp_path / name).about["rank"] == rank and len(Run.read(tmp_path / name).steps) == 6


def logged_for_ever(steps: Connection, file: Path) -> None:
    model = torch.nn.Linear(64, 64)
    exchange = GradientExchange(model.named_parameters(), Compression.top_k(10))
    Logger(exchange.compression, file, norms_every=3)
    while True:
        exchange.reduce([torch.randn(64, 64), torch.randn(64)])
        steps.send_bytes(b".")


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    with forked(logged_for_ever, tmp_path / "run.jsonl") as steps:
        for _ in range(20):
            steps.recv_bytes()
    text = (tmp_path / "run.jsonl").read_bytes()
    assert text.endswith(b"\n") and len(lines(tmp_path / "run.jsonl")) >= 20, "and the last step that was over is among them"


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    compression = Compression.top_k(10).bind(mlp())
    for path in (tmp_path, tmp_path / "file" / "run.jsonl"):
        with pytest.raises(CompressionError, match=r"cannot be written to .*\. Give a file in a folder"):
            Logger(compression, path)
    Logger(compression, tmp_path / "run.jsonl").close()
    assert not (tmp_path / "run.jsonl").exists(), "nothing was measured"


class Broken:
    def write(self, record: Any) -> None:
        if record["kind"] == "step" and record["step"] == 2:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError("it was left out")


def test_a_sink_that_fails_does_not_end_the_training(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"Logger: Broken failed \(OSError: .*No space left.*\) and gets no more records"):
        run(tmp_path / "run.jsonl", range(6), Broken())
    assert len(Run.read(tmp_path / "run.jsonl").steps) == 6


@pytest.mark.parametrize("sink", [7, None, object(), JsonLines, {"file": "run.jsonl"}, io.StringIO()], ids=lambda sink: type(sink).__name__)
def test_what_is_no_sink_is_told(sink: Any) -> None:
    with pytest.raises(CompressionError, match=r"is no sink\. Give the name of a file"):
        Logger(Compression.top_k(10).bind(mlp()), sink)


# -- progress bars and TensorBoard -------------------------------------------------------------------------------------------------


def test_tqdm(tmp_path: Path) -> None:
    out = io.StringIO()
    bar = tqdm(total=10, file=out, ncols=120)
    run(tmp_path / "run.jsonl", range(3), bar)
    bar.refresh()
    assert re.search(r"ratio=3\.85x, error=0\.\d\d, residual=\d\.\d+g\]", out.getvalue())
    bar.close()


class Writer:
    def __init__(self, folder: str = "") -> None:
        self.folder, self.scalars, self.texts, self.closed = folder, [], [], False  # type: ignore[var-annotated]

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def close(self) -> None:
        self.closed = True


def test_a_summary_writer_gets_scalars(tmp_path: Path) -> None:
    """Of every so many-th record and of those with norms, by param group where there are several; a writer of the script's stays open."""
    writer = Writer()
    run(tmp_path / "run.jsonl", range(7), TensorBoard(writer, every=3), groups=True)
    tags = {tag for tag, _, _ in writer.scalars}
    assert {"compression/sent_bytes", "compression/group0/relative_error", "compression/group1/ratio", "compression/wait_seconds"} <= tags
    assert "compression/group1/relative_error" not in tags and "compression/step" not in tags
    assert sorted({step for _, _, step in writer.scalars}) == [0, 2, 3, 4, 6] and not writer.closed
    records = Run.read(tmp_path / "run.jsonl").steps
    for tag, value, step in writer.scalars:
        if tag == "compression/relative_error":
            assert value == pytest.approx(records[step]["relative_error"], rel=1e-6)
    TensorBoard(writer).write({"kind": "warning", "text": "grows", "step": 3})
    assert writer.texts == [("compression/warning", "grows", 3)]


def test_a_folder_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens a writer of its own, and says what to install where there is none."""
    name = "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(SummaryWriter=Writer))
    sink = TensorBoard(tmp_path)
    run(tmp_path / "run.jsonl", range(1), sink)
    assert sink._writer.folder == str(tmp_path) and sink._writer.scalars and sink._writer.closed
    with pytest.raises(CompressionError, match="expected a folder or a SummaryWriter"):
        TensorBoard(7)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CompressionError, match=r"pip install tensorboard, or '\.\[telemetry\]'"):
        TensorBoard(tmp_path)


# -- report and watch --------------------------------------------------------------------------------------------------------------


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of two runs, one with groups, that agrees with what was counted; and a picture."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(one)
    run(two, groups=True, every=2)
    with two.open("a") as file:
        file.write('{"kind":"warning","rank":0,"step":5,"text":"something grows"}\nno record\n')
    assert main(["report", str(one), str(two), "--plot", str(tmp_path / "plot.png")]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r"(one|two|  group \d) ", line)]
    assert [row[0] for row in rows] == ["one", "two", "group", "group"] and [row[1] for row in rows[:2]] == ["6", "6"]
    sent = sum(r["sent_bytes"] for r in Run.read(one).records)
    assert rows[0][3] == f"{sent / 1e6:.2f}" and rows[0][5] == "3.9"
    assert "two: step 5: something grows" in out and "1 lines are no records" in out
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / "plot.png").stat().st_size > 30_000
    assert main(["report", str(one), "--no-plot", "--markdown"]) == 0
    assert "| one | 6 | 0 |" in capsys.readouterr().out and not one.with_suffix(".png").exists()


def test_skips_have_columns_where_there_are_some(tmp_path: Path) -> None:
    run(tmp_path / "run.jsonl")
    read = Run.read(tmp_path / "run.jsonl")
    assert "skips" not in summary([read]).columns
    for record in read.records[1:]:
        record["groups"][0] |= {"skips": 3, "staleness_steps": record["step"] % 2}
    table = summary([read])
    row = dict(zip(table.columns, table.rows[0]))
    assert (row["skips"], row["stale"]) == ("3", "1")
    other = Run.read(tmp_path / "run.jsonl")
    for record in other.records:
        record["staleness_updates"] = record["step"]
    table = summary([other])
    assert "skips" not in table.columns and dict(zip(table.columns, table.rows[0]))["stale"] == "5"


def test_report_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.json").write_text('{"a": 1}\n[1, 2]\n')
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, message in (
        ("none.jsonl", "No such file"),
        ("", "Is a directory"),
        ("empty.jsonl", "has not ended a step yet"),
        ("other.json", "holds no records of a run"),
        ("binary", "holds no records of a run"),
    ):
        for command in (["report", "--no-plot"], ["watch", "--once"]):
            assert main([*command, str(tmp_path / name)]) == 1
            said = capsys.readouterr().err
            assert message in said and "Give " in said and said.count("\n") == 1
    assert main(["report", str(tmp_path / "run.jsonl"), "--plot", str(tmp_path / "no" / "plot.png")]) == 1
    assert "cannot be written to" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path / "run.jsonl")]) == 1
    out, err = capsys.readouterr()
    assert "run  " in out and "pip install matplotlib" in err and "--no-plot" in err


def test_watch_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    run(tmp_path / "run.jsonl", range(8))
    assert main(["watch", str(tmp_path / "run.jsonl")]) == 0, "nobody looks, so it ends"
    text = capsys.readouterr().out
    assert "rank 0 of 2" in text and "Sign" in text and "step 7, stands" in text and max(map(len, text.splitlines())) <= 90
    for curve in ("sent, kB", "relative error", "residual ÷ gradient", "step, ms", "kernels, ms", "waiting, ms"):
        assert re.search(rf"^{curve} +[\d.]+ +[▁▂▃▄▅▆▇█]+ ", text, re.M), curve


def test_the_curve_of_errors_is_not_at_the_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of 0.97 to 0.99, over an axis that begins at 0: there is room above them."""
    run(tmp_path / "run.jsonl")
    read, drawn = Run.read(tmp_path / "run.jsonl"), []
    for record in read.records:
        record["relative_error"] = 0.97 + 0.004 * record["step"]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    draw([read], tmp_path / "run.png")
    bottom, top = drawn[1].get_ylim()
    assert "relative compression error" in drawn[1].get_title() and bottom == 0 and top >= 1.03 * 0.99


def test_a_slow_first_step_does_not_flatten_the_curves_of_times(tmp_path: Path) -> None:
    """Steps of 1 to 8 ms after one of a second; the spread tells of it. Of what is no time all is shown."""
    run(tmp_path / "run.jsonl", range(41))
    read = Run.read(tmp_path / "run.jsonl")
    for record in read.records:
        record["step_seconds"] = 1e-3 * (1 + record["step"] % 8) if record["step"] else 1.0
        record["residual_to_gradient"] = 1.0 if record["step"] else 100.0
    text = watching.screen(read, 120)
    times, residuals = (re.search(rf"^{curve}.*", text, re.M).group() for curve in ("step, ms", "residual ÷ gradient"))  # type: ignore[union-attr]
    assert set("▁▂▃▄▅▆▇█") <= set(times) and "1 … 1e+03" in times
    assert set(residuals) & set("▁▂▃▄▅▆▇█") == set("▁█")


def test_watch_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not there yet, then one that grows in the middle of a line, until Ctrl-C."""
    file, whole = tmp_path / "run.jsonl", tmp_path / "whole.jsonl"
    run(whole, range(4))
    text = whole.read_bytes()
    parts = [text[:10], text[10 : len(text) // 2], text[len(text) // 2 :]]

    def sleep(seconds: float) -> None:
        if not parts:
            raise KeyboardInterrupt
        with file.open("ab") as out:
            out.write(parts.pop(0))

    monkeypatch.setattr(watching.time, "sleep", sleep)
    monkeypatch.setattr(watching.sys.stdout, "isatty", lambda: True)
    assert main(["watch", str(file)]) == 0
    screens = capsys.readouterr().out.split("\x1b[H\x1b[2J")[1:]
    assert len(screens) == 4 and "Waiting for" in screens[0] and "no records yet" in screens[1] and "step 3, stands" in screens[3]
    assert re.search(r"step [01], stands", screens[2])


def test_a_file_that_begins_anew_is_read_anew(tmp_path: Path) -> None:
    run(tmp_path / "run.jsonl", range(8))
    read = Run.read(tmp_path / "run.jsonl")
    assert not read.look()
    os.truncate(tmp_path / "run.jsonl", 0)
    run(tmp_path / "run.jsonl", range(2))
    assert read.look() and list(read.steps) == [0, 1] and read.starts == 1


def test_plots_of_what_has_no_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One worker that sends nothing, with a method that leaves nothing."""
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.none)
    with Logger(optimizer.compression, tmp_path / "run.jsonl"):
        train(model, optimizer, 0, range(2))
    assert main(["report", str(tmp_path / "run.jsonl")]) == 0
    assert (tmp_path / "run.png").exists() and " – " in capsys.readouterr().out
    assert main(["watch", "--once", str(tmp_path / "run.jsonl")]) == 0


def test_the_table_of_fields_is_as_written() -> None:
    """And a field that is changed or left out would be seen."""
    spec = importlib.util.spec_from_file_location("table_of_fields", REPO / "docs" / "telemetry.py")
    assert spec is not None and spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    now = (REPO / "docs" / "telemetry.md").read_text(encoding="utf-8")
    assert written.updated() == now, "run `python docs/telemetry.py`"
    for other in (FIELDS[1:], [replace(FIELDS[0], meaning="a horse"), *FIELDS[1:]]):
        assert written.updated(other) != now
    assert set(re.findall(r"`total_(\w+)`", now)) == {"payload_bytes", "sent_bytes", "dense_bytes", "skipped_bytes", "ratio"}


def test_summary_of_nothing_is_dashes() -> None:
    assert summary([Run(Path("x"))]).rows[0][1:4] == ["0", "–", "–"]
    assert Progress(tqdm(disable=True)).close() is None  # type: ignore[func-returns-value]
