"""Reads what `JsonLines` has written: whole, or what has come since the last look."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CompressionError

__all__ = ["Run"]


class Run:
    """A file of records. `steps` are those of steps, by their number: a training that went on from a checkpoint has taken some twice, and the later
    ones count. `about` is what the last start, or switch of methods, says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.about: dict[str, Any] = {}
        self.steps: dict[int, dict[str, Any]] = {}
        self.warnings: list[dict[str, Any]] = []
        self.starts = 0
        self.broken = 0
        """Lines that are no records: a full disk cuts one."""
        self._offset = 0
        self._rest = b""

    @staticmethod
    def read(path: Path) -> Run:
        """Raises `CompressionError` for a file that is not there, or holds no records."""
        run = Run(path)
        try:
            run.look()
        except OSError as error:
            raise CompressionError(
                f"{path} cannot be read ({error.strerror}). Give the file that telemetry.Logger(compression, file) writes."
            ) from error
        if not run.about:
            what = "is empty: its run has not ended a step yet" if not run.broken and not run._rest else "holds no records of a run"
            raise CompressionError(f"{path} {what}. Give a file that telemetry.Logger(compression, file) has written.")
        return run

    def look(self) -> bool:
        """Take in what has been added to the file; whether anything was. A file that has become shorter is read anew."""
        if self.path.stat().st_size < self._offset:
            self._forget()
        with self.path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        self._offset += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        self._take(line for line in lines if line.strip())
        return bool(lines)

    def _take(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            try:
                record = json.loads(line)
                kind = record["kind"]
                if kind == "step":
                    self.steps.pop(record["step"], None)
                    self.steps[record["step"]] = record
                elif kind == "warning":
                    self.warnings.append(record)
                elif kind in ("run", "method"):
                    self._begin(record)
            except (ValueError, KeyError, TypeError):
                self.broken += 1

    def _begin(self, about: dict[str, Any]) -> None:
        self.about = about
        self.starts += about["kind"] == "run"
        for step in [s for s in self.steps if s >= about["step"]]:  # taken anew
            del self.steps[step]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(self.steps.values())

    @property
    def groups(self) -> list[int]:
        return sorted({g["group"] for r in self.steps.values() for g in r["groups"]})

    def series(self, field: str, group: int | None = None) -> tuple[list[int], list[float]]:
        """Steps and values, of those records that have the field; of one param group, or of the whole."""
        found = [(r["step"], part[field]) for r in self.steps.values() for part in self._parts(r, group) if field in part]
        return [step for step, _ in found], [value for _, value in found]

    @staticmethod
    def _parts(record: dict[str, Any], group: int | None) -> list[dict[str, Any]]:
        return [record] if group is None else [g for g in record["groups"] if g["group"] == group]
