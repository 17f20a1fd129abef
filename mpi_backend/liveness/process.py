"""The process beside this rank, which runs `heartbeat.py`: started, told, heard, and started again when it was killed."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

__all__ = ["HeartbeatProcess"]

_RESTART = 0.25  # seconds before it is started again


class HeartbeatProcess:
    """Of rank `rank`. `opened`: a bound UDP socket, for it to use; `config`: the line that it is told first."""

    def __init__(self, rank: int, opened: socket.socket, config: str) -> None:
        self._rank, self._socket, self._config = rank, opened, config
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._left = ""
        self.stopping = False
        """It was told that it may end."""
        self._start()

    def tell(self, line: str) -> None:
        """One that is gone hears it when it is started again, if it is a "left …", which counts until the next one; else this rank goes on unwatched,
        or ends."""
        if line.startswith("left "):
            self._left = line
        if self._process is not None and self._process.stdin is not None:
            data = memoryview(line.replace("\n", " ").encode() + b"\n")
            # It has been killed, which `hear` notices, or its pipe was closed meanwhile, by `close` or to start it again.
            with contextlib.suppress(OSError, ValueError):
                while data:
                    data = data[self._process.stdin.write(data) :]

    def hear(self, seconds: float) -> list[str]:
        """What it has said, as lines; waits for something to be said for so long."""
        out = None if self._process is None else self._process.stdout
        readable, _, _ = select.select([] if out is None else [out], [], [], seconds)
        if out is None or not readable:
            return []
        data = os.read(out.fileno(), 65536)
        if not data and not self.stopping:
            self._restart()
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [line.decode() for line in lines]

    def say_goodbye(self) -> None:
        """It need not watch any more; `close` follows."""
        self.stopping = True
        self.tell("bye")

    def close(self) -> None:
        """Wait for its end, for two seconds. Nobody may `hear` meanwhile."""
        self._socket.close()
        if self._process is not None:
            self._close_pipes()
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _start(self) -> None:
        """Start it; again, if it was killed, and the others take it for the one they know."""
        pipe, number = subprocess.PIPE, self._socket.fileno()
        program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("heartbeat.py")), str(number)]
        try:
            # A session of its own: what a terminal or a launcher sends to the rank's group is the rank's matter.
            self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, pass_fds=[number], start_new_session=True, bufsize=0, cwd="/")
        except OSError as error:
            warnings.warn(
                f"mpi_backend: rank {self._rank} cannot start its watchdog ({error}); it will not be watched.", RuntimeWarning, stacklevel=5
            )
            return
        self.tell(self._config)
        if self._left:
            self.tell(self._left)

    def _restart(self) -> None:
        assert self._process is not None
        self._close_pipes()
        status, self._process = self._process.wait(), None
        os.write(2, f"mpi_backend: rank {self._rank}: its watchdog ended (status {status}) and is started again.\n".encode())
        time.sleep(_RESTART)
        self._start()

    def _close_pipes(self) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
