"""Where records go: a file of JSON lines, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..arguments import check_integer
from ..errors import CompressionError

__all__ = ["JsonLines", "Progress", "Sink", "TensorBoard", "sink_of"]

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes records one after the other: those of steps (`kind` is "step"), and what comes between them ("run", "method", "warning")."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class JsonLines:
    """A line for each record, at the end of `file`, in one write each: a process that is killed leaves whole lines. Folders are made.

    On rank r > 0 (with `Logger(…, ranks="all")`) the rank is put in the name, run.jsonl → run.rank1.jsonl. Each line has it, too. The file is opened
    with the first record. Raises `CompressionError` now where it cannot be written.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._path = Path(file)
        self._file: int | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_dir():
                raise IsADirectoryError("it is a folder")
            there = self._path if self._path.exists() else self._path.parent
            if not os.access(there, os.W_OK):
                raise PermissionError(f"no permission to write to {there}")
        except OSError as error:
            raise CompressionError(
                f"Logger: records cannot be written to {self._path} ({error.strerror or error}). Give a file in a folder that this process may "
                "write to, such as runs/run.jsonl."
            ) from error

    def __repr__(self) -> str:
        return str(self._path)

    def _open(self, rank: int) -> int:
        path = self._path.with_suffix(f".rank{rank}{self._path.suffix}") if rank else self._path
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
        end = os.lseek(file, 0, os.SEEK_END)
        if end and os.pread(file, 1, end - 1) != b"\n":  # a full disk has cut the last one
            os.write(file, b"\n")
        return file

    def write(self, record: Record) -> None:
        if self._file is None:
            self._file = self._open(record.get("rank", 0))
        os.write(self._file, f"{_ENCODER.encode(record)}\n".encode())

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


class Progress:
    """The end of a progress bar, by tqdm's `set_postfix`, which the bar shows when it is drawn next."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._shown: dict[str, str] = {}

    def write(self, record: Record) -> None:
        if record["kind"] != "step":
            return
        if "ratio" in record:
            self._shown["ratio"] = f"{record['ratio']:.3g}x"
        if "relative_error" in record:
            self._shown["error"] = f"{record['relative_error']:.2f}"
        if "residual_to_gradient" in record:
            self._shown["residual"] = f"{record['residual_to_gradient']:.3g}g"
        if record["undone_steps"]:
            self._shown["undone"] = str(record["undone_steps"])
        self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        """The bar is the script's."""


class TensorBoard:
    """Scalars compression/… of every `every`-th record, and of those with norms: a scalar takes tens of microseconds.

    `where`: a folder, or a SummaryWriter that the script has. Raises `CompressionError` where tensorboard is not installed.
    """

    def __init__(self, where: Any, every: int = 20) -> None:
        check_integer(every, "every", "a number of records, at least 1", least=1)
        self._every, self._count, self._owned = every, 0, not hasattr(where, "add_scalar")
        self._writer = _summary_writer(where) if self._owned else where

    def write(self, record: Record) -> None:
        if record["kind"] == "warning":
            self._writer.add_text("compression/warning", record["text"], record["step"])
        if record["kind"] != "step":
            return
        self._count += 1
        if (self._count - 1) % self._every and "gradient_norm" not in record:
            return
        several = len(record["groups"]) > 1
        for place, numbers in [("", record), *((f"group{g['group']}/", g) for g in record["groups"] if several)]:
            for name, value in numbers.items():
                if isinstance(value, int | float) and name not in _PLACES:
                    self._writer.add_scalar(f"compression/{place}{name}", value, record["step"])

    def close(self) -> None:
        if self._owned:
            self._writer.close()


_PLACES = ("step", "steps", "unix_seconds", "rank", "group")


def _summary_writer(folder: Any) -> Any:
    if not isinstance(folder, str | os.PathLike):
        raise CompressionError(f"TensorBoard: expected a folder or a SummaryWriter, got {folder!r:.100}.")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise CompressionError(
            f"TensorBoard: tensorboard is not installed ({error}): pip install tensorboard, or '.[telemetry]' in a clone. A file of JSON lines needs "
            "nothing: Logger(compression, 'run.jsonl')."
        ) from error
    return SummaryWriter(os.fspath(folder))


def sink_of(what: Any) -> Sink:
    """The sink that `Logger` was given, or one for the file, bar or writer that it was given. Raises `CompressionError` for anything else."""
    if isinstance(what, str | os.PathLike):
        return JsonLines(what)
    if isinstance(what, type) or what is None:
        raise CompressionError(_UNKNOWN.format(what))
    if hasattr(what, "set_postfix"):
        return Progress(what)
    if hasattr(what, "add_scalar"):
        return TensorBoard(what)
    if callable(getattr(what, "write", None)) and callable(getattr(what, "close", None)) and not hasattr(what, "read"):
        sink: Sink = what
        return sink
    raise CompressionError(_UNKNOWN.format(what))


_UNKNOWN = (
    "Logger: {!r:.100} is no sink. Give the name of a file (JSON lines), a tqdm bar, a SummaryWriter, telemetry.TensorBoard(folder), or an object "
    "with write(record) and close()."
)
