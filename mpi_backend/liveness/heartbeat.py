"""A small program beside every rank that knows whether the other ranks live, whatever its own rank is doing.

    python heartbeat.py SOCKET      started by process.py; watchdog.py has the other side of the protocol; SOCKET: the number of an open UDP socket

It is a process of its own because a thread would need the interpreter lock, which one long call in the rank can hold for minutes, and because the
end of a process is noticed at once by its child, also after SIGKILL. It uses the standard library only, and never MPI.

From the rank, on standard input, come lines: first the configuration, then "left …", "abort …" and "bye". The end of input without "bye", or another
parent than before, means that the rank has died. To the rank, on standard output, go lines: "left RANK COUNTS" and "end REASON". A rank that does not
end within `_PATIENCE` seconds of the latter is ended from here.

Between these programs travel datagrams, each with the job's token: "beat" every half second or so among ranks that watch each other; "bye" when a
rank has shut down; and, to everyone, "dead" (this rank is, and why), "abort" (the job ends, and why) and "left" (see watchdog.py).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

_PATIENCE = 2.0  # seconds from telling the rank to end until it is ended from here; as long again from SIGTERM to SIGKILL
_LAUNCHER = 1.0  # seconds in which a launcher that sees a rank die, or abort, ends the job itself, with a message of its own
_REPEATS = 3  # a datagram may get lost
_CONTENT = {"beat": 0, "bye": 0, "left": 1, "abort": 1, "dead": 2}
"""Of each kind of datagram, what follows the sender."""


class Mail:
    """Datagrams to the programs of the other ranks, and from them. `addresses`: of each rank, where it may be reached; of some, nowhere."""

    def __init__(self, sock: socket.socket, rank: int, token: bytes, addresses: list[list[tuple[str, int]]]) -> None:
        self.sock, self.rank, self.token, self.addresses = sock, rank, token, addresses

    def received(self) -> Iterator[tuple[str, int, list[Any]]]:
        """Kind, sender and content of what has come of this job, a thousand at most."""
        for _ in range(1000):
            try:
                data = self.sock.recv(65536)
            except (BlockingIOError, ConnectionError):
                return
            if data.startswith(self.token):
                try:
                    kind, sender, *content = json.loads(data[len(self.token) :])
                    known = 0 <= sender < len(self.addresses) and sender != self.rank and len(content) == _CONTENT[kind]
                except (ValueError, TypeError, KeyError):
                    continue  # damaged on its way, as if it had been lost
                if known:
                    yield kind, sender, content

    def send(self, ranks: set[int], kind: str, *content: object, repeats: int = 1) -> None:
        data = self.token + json.dumps([kind, self.rank, *content]).encode()
        for repeat in range(repeats):
            if repeat:
                time.sleep(0.03)
            for r in ranks:
                for address in self.addresses[r]:
                    try:
                        self.sock.sendto(data, address)
                    except OSError:
                        pass  # no route, a full buffer: silence is what the others then notice

    def everyone(self) -> set[int]:
        return set(range(len(self.addresses))) - {self.rank}


class End:
    """The end of the rank, once it must: at its time the rank is told why, after a while it is ended, and after another killed."""

    def __init__(self, name: str, parent: int) -> None:
        self.name, self.parent = name, parent
        self.reason = ""
        self.at: float | None = None
        self.told_at: float | None = None
        self.killed = False

    def decide(self, reason: str, at: float) -> None:
        """The first reason counts."""
        if not self.reason:
            self.reason, self.at = reason, at

    def bring(self, now: float) -> None:
        """What is due of: say why, tell the rank, end it, kill it."""
        if self.at is not None and now >= self.at:
            self.at, self.told_at = None, now
            say(self.name, f"ending, because {self.reason}.")
            tell(f"end {self.reason}")
        if self.told_at is not None and now - self.told_at > _PATIENCE * (1 + self.killed):
            try:
                os.kill(self.parent, signal.SIGKILL if self.killed else signal.SIGTERM)
            except OSError:
                pass  # it has ended meanwhile
            self.killed = True


class Heartbeat:
    def __init__(self, sock: socket.socket, config: dict[str, Any]) -> None:
        self.rank: int = config["rank"]
        self.timeout: float = config["timeout"]
        self.outlives: list[int] = config["outlives"]  # ranks without which the others go on when their processes have ended
        self.names: list[str] = config["names"]
        addresses = [[(host, port) for host, port in some] for some in config["addresses"]]
        self.mail = Mail(sock, self.rank, bytes.fromhex(config["token"]), addresses)
        self.end = End(self.names[self.rank], config["parent"])
        self.neighbours = neighbours(self.rank, len(self.names))
        self.watched = {r for r in self.neighbours if addresses[r]}
        self.heard: dict[int, float] = {}
        self.gone: set[int] = set()
        self.left = ""  # the counts of this rank, once it has left, or while it waits for the others
        self.pending = b""
        self.started = time.monotonic()
        self.warned = False

    # ---- the loop

    def run(self) -> None:
        interval = min(0.5, self.timeout / 8)
        next_beat, last = 0.0, time.monotonic()
        sources: list[Any] = [self.mail.sock, 0]
        while True:
            readable, _, _ = select.select(sources, [], [], interval / 2)
            now = time.monotonic()
            if now - last > 1.0 + interval:  # this machine, or this process, stood still: others' silence is our own
                self.heard = {r: t + (now - last) for r, t in self.heard.items()}
            last = now
            if self.mail.sock in readable:
                self.receive(now)
            said = self.commands() if 0 in readable else []
            if "bye" in said:
                self.mail.send(self.watched, "bye", repeats=_REPEATS)
                return
            if "" in said or os.getppid() != self.end.parent:
                if self.end.told_at is None:
                    self.mail.send(
                        self.mail.everyone(), "dead", self.rank, "ended without shutting down: killed, crashed, or out of memory", repeats=_REPEATS
                    )
                return
            if now >= next_beat:
                next_beat = now + interval
                self.mail.send(self.watched - self.gone, "beat")
                if self.left:
                    self.mail.send(self.mail.everyone(), "left", self.left)
            self.look_at_the_others(now)
            self.end.bring(now)

    def commands(self) -> list[str]:
        """Complete lines from the rank; an empty one for the end of input."""
        data = os.read(0, 65536)
        if not data:
            return [""]
        *lines, self.pending = (self.pending + data).split(b"\n")
        said = []
        for line in lines:
            command, _, rest = line.decode().partition(" ")
            if command == "left":
                self.left = rest
            elif command == "abort":
                self.mail.send(self.mail.everyone(), "abort", rest, repeats=_REPEATS)
            said.append(command or "?")
        return said

    def look_at_the_others(self, now: float) -> None:
        for r in self.watched & self.heard.keys() - self.gone:
            if now - self.heard[r] > self.timeout and not self.end.reason:
                why = f"gave no sign of life for {self.timeout:g} seconds: its machine, or the network to it, has failed"
                self.mail.send(self.mail.everyone(), "dead", r, why, repeats=_REPEATS)
                self.end.decide(f"{self.names[r]} {why}", now)
        if not self.warned and now - self.started > 2 * self.timeout:
            self.warned = True
            unheard = sorted(self.neighbours - self.heard.keys() - self.gone)
            if unheard and self.rank < unheard[0]:
                tried = ", ".join(sorted({host for r in unheard for host, _ in self.mail.addresses[r]}))
                why = f"Is UDP to {tried} blocked?" if tried else "No IPv4 address of their machines is known."
                say(
                    self.names[self.rank],
                    f"no heartbeats come from {', '.join(self.names[r] for r in unheard[:8])}, so a failure of their machines or of the network will "
                    f"not be noticed. {why} MPI_BACKEND_INTERFACE names the interface to use.",
                )

    def receive(self, now: float) -> None:
        for kind, sender, content in self.mail.received():
            self.heard[sender] = now
            if kind == "bye":
                self.gone.add(sender)
            elif kind == "left":
                tell(f"left {sender} {content[0]}")
            elif kind == "abort":
                self.end.decide(f"{self.names[sender]} ends the job: {content[0]}", now + _LAUNCHER)
            elif kind == "dead":
                subject, why = content
                if subject in self.outlives and subject == sender:
                    self.gone.add(subject)
                elif subject != self.rank:
                    self.end.decide(f"{self.names[subject]} {why}", now + _LAUNCHER)
                else:
                    self.end.decide(f"{self.names[sender]} has ended the job, because this rank {why}", now + _LAUNCHER)


def tell(line: str) -> None:
    """The rank."""
    try:
        os.write(1, line.replace("\n", " ").encode() + b"\n")
    except OSError:
        pass  # it has ended, which is seen at its other end


def say(name: str, text: str) -> None:
    """The user, in the name of a rank."""
    try:
        os.write(2, f"mpi_backend: {name}: {text}\n".encode())
    except OSError:
        pass  # nobody is there to read it; what must be done is done all the same


def neighbours(rank: int, size: int) -> set[int]:
    """Whom a rank watches: all others up to 32, else those at distances 1, 2, 4, 8, … both ways, so that the cost stays small. It is mutual."""
    if size <= 33:
        return set(range(size)) - {rank}
    distances = [2**i for i in range(size.bit_length()) if 2**i < size]
    return {(rank + sign * d) % size for d in distances for sign in (1, -1)} - {rank}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the rank's matter
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(False)
    first = b""
    while not first.endswith(b"\n"):  # one byte at a time: what follows the line is read later
        piece = os.read(0, 1)
        if not piece:
            return
        first += piece
    Heartbeat(sock, json.loads(first)).run()


if __name__ == "__main__":
    main()
