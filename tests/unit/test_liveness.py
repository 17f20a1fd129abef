"""What the watchdog of mpi_backend does where something of its own fails: datagrams, the process beside a rank, addresses, threads."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_backend.liveness.departures import Departures
from mpi_backend.liveness.heartbeat import Heartbeat, Mail
from mpi_backend.liveness.process import HeartbeatProcess
from mpi_backend.liveness.watchdog import Watchdog

TOKEN = b"t" * 16


def bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(60)
    return sock


def waits(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def config(**more: Any) -> dict[str, Any]:
    names = ["rank 0 (process 1 on a)", "rank 1 (process 2 on b)"]
    return {"rank": 0, "parent": os.getpid(), "timeout": 60.0, "token": TOKEN.hex(), "names": names, "addresses": [[], []], "outlives": [], **more}


def test_damaged_datagrams_are_lost_ones() -> None:
    """What is no sign of another rank is passed over, and what follows it is heard."""
    with bound() as here, bound() as there:
        here.setblocking(False)
        mail = Mail(here, 0, TOKEN, [[], [], []])
        good = [["beat", 1], ["left", 2, "{}"], ["dead", 1, 2, "why"]]
        noise = ["", '["beat", 1', "7", "[]", '["beat"]', '["beat", "1"]', '["beat", 3]', '["beat", 0]', '["left", 1]', '["no", 1]']
        noise += ['["abort", 1, 2, 3]', "[[], 1]"]
        for content in [b"\xff\xfe", *map(str.encode, noise), *(json.dumps(one).encode() for one in good)]:
            there.sendto(TOKEN + content, here.getsockname())
        there.sendto(b"another job's", here.getsockname())
        heard: list[Any] = []
        deadline = time.monotonic() + 60
        while len(heard) < 3 and time.monotonic() < deadline:
            heard += mail.received()
        assert [[kind, sender, *content] for kind, sender, content in heard] == good


def test_a_process_that_is_started_again_tells_that_its_rank_is_leaving() -> None:
    """The rank says so once, and others wait for it for ever if they are not told."""
    with bound() as other:
        said = json.dumps({"a.0": 3})
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind(("127.0.0.1", 0))
        process = HeartbeatProcess(0, opened, json.dumps(config(addresses=[[], [other.getsockname()]])))

        def hear_left() -> None:
            for _ in range(20):  # ten seconds
                if (told := json.loads(other.recv(65536)[len(TOKEN) :])) == ["left", 0, said]:
                    return
                assert told == ["beat", 0]
            raise AssertionError("it was not told")

        try:
            process.tell(f"left {said}")
            hear_left()
            assert process._process is not None
            first = process._process.pid
            process._process.kill()
            process._process.wait()
            while waits(other):
                other.recv(65536)
            while process._process is None or process._process.pid == first:
                process.hear(0.1)
            hear_left()
        finally:
            process.say_goodbye()
            process.close()


@pytest.mark.parametrize(
    ("address", "says"), [([["10.9.9.9", 7]], "Is UDP to 10.9.9.9 blocked?"), ([], "No IPv4 address of their machines is known.")]
)
def test_a_rank_that_cannot_be_watched_is_named(address: list[Any], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with bound() as sock:
        heartbeat = Heartbeat(sock, config(addresses=[[], address]))
        heartbeat.look_at_the_others(heartbeat.started + 1)
        assert capfd.readouterr().err == ""
        heartbeat.look_at_the_others(heartbeat.started + 1000)
        told = capfd.readouterr().err
        assert "no heartbeats come from rank 1 (process 2 on b)" in told and says in told


@pytest.mark.parametrize("threads", [True, False])
def test_without_a_thread_that_ends_it_nothing_is_aborted(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a cut link an abort may never return; the process ends all the same."""
    done: list[str] = []

    class Ended(Exception):
        pass

    def start(timer: threading.Timer) -> None:
        if not threads:
            raise RuntimeError("can't create new thread at interpreter shutdown")
        done.append("timer")

    def ended(status: int) -> None:
        raise Ended

    mpi = SimpleNamespace(Query_thread=lambda: 3, THREAD_MULTIPLE=3)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    monkeypatch.setattr(threading.Timer, "start", start)
    monkeypatch.setattr(os, "_exit", ended)
    watchdog = object.__new__(Watchdog)
    watchdog._departures, watchdog._process = Departures(0), None
    watchdog._comm = SimpleNamespace(Abort=lambda status: done.append("abort"))  # type: ignore[assignment]
    with pytest.raises(Ended):
        watchdog._end()
    assert done == (["timer", "abort"] if threads else [])
