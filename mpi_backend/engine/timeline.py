"""A Chrome trace (chrome://tracing, ui.perfetto.dev) of what this process negotiates, compresses and sends."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

__all__ = ["Timeline"]

_OPEN, _CLOSE = b"[\n", b"\n]\n"


class Timeline:
    """Writes events to `path` as they come. The file is valid JSON after every event, also when the process is killed: each write replaces
    the closing bracket by the event and a new bracket, in one system call.

    Times are microseconds of this host's clock since the epoch, so files of several ranks on one host can be laid side by side.
    """

    def __init__(self, path: str, rank: int) -> None:
        self.path = path
        self._rank = rank
        self._epoch = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(self._file, _OPEN + _CLOSE, 0)
        self._end = len(_OPEN)
        start = {"start_time_since_epoch_in_micros": 0}  # Horovod's word for what its times count from
        self._event({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"} | start})

    def span(self, row: str, name: str, begin: float, end: float, **args: Any) -> None:
        """`name` went on in `row` (a tensor, a bucket, or what a thread does) from `begin` to `end`, in seconds of time.perf_counter()."""
        with self._lock:
            thread = self._rows.get(row)
        if thread is None:
            with self._lock:
                thread = self._rows[row] = len(self._rows)
            self._event({"name": "thread_name", "ph": "M", "pid": self._rank, "tid": thread, "args": {"name": row}})
        times = {"ts": round((begin + self._epoch) * 1e6, 1), "dur": round((end - begin) * 1e6, 1)}
        self._event({"name": name, "ph": "X", "pid": self._rank, "tid": thread, **times, "args": args})

    def close(self) -> None:
        """Stop writing; events that come later are dropped."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def _event(self, event: dict[str, Any]) -> None:
        data = json.dumps(event).encode()
        with self._lock:
            if self._file < 0:
                return
            separator = b"" if self._end == len(_OPEN) else b",\n"
            os.pwrite(self._file, separator + data + _CLOSE, self._end)
            self._end += len(separator) + len(data)
