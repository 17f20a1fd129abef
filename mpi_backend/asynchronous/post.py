"""Messages between workers and servers over MPI: a head, then the payloads' bytes as they are, in pieces that MPI can count."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from mpi4py import MPI

from hvd_ecsgd.asynchronous import Message
from hvd_ecsgd.errors import PeerLostError, TransportError
from hvd_ecsgd.transport.patience import Patience

from ..transport import dead_of, one_by_one
from ..transport.memory import LARGEST, memory_of
from ..transport.operation import Operations

__all__ = ["Post"]

_HEAD, _PAYLOAD = 1, 2
"""Tags."""
_LONGEST_HEAD = 2**26


@dataclass(frozen=True, eq=False)
class _Travelling:
    """What a message needs until it has left, or come."""

    peer: int
    requests: list[MPI.Request]
    buffers: list[torch.Tensor]


class Post:
    """Over a private duplicate of `comm`; creating one is collective. `most`: bytes that the payloads of a message can have at most. `outlives`:
    ranks may die, as ULFM tells; what is on its way to or from them is given up, and whoever waits for a message of one gets a `PeerLostError`.

    Who waits looks at intervals, as collectives do, and carries on what is on its way on the process's transports. Used by one thread.
    """

    def __init__(self, comm: MPI.Intracomm, most: int, outlives: bool = False) -> None:
        self.comm = comm.Dup()
        self._most, self._outlives = most, outlives
        self._sending: list[_Travelling] = []
        self._lost: set[int] = set()
        self._given_up: list[_Travelling] = []
        """MPI may still write there, or complete a request, which it must not find freed."""

    def send(self, message: Message, to: int) -> None:
        """Start to send; the payloads must not be written to any more. What is for a rank that has died goes nowhere."""
        message = replace(message, payloads=[p.contiguous().cpu() for p in message.payloads])
        head = torch.frombuffer(bytearray(message.head()), dtype=torch.uint8)
        payloads = [p.view(torch.uint8) for p in message.payloads if p.numel()]
        pieces = [piece for p in payloads for piece in _pieces(p)]
        travelling = _Travelling(to, [], [head, *payloads])
        try:
            for tag, buffer in [(_HEAD, head), *((_PAYLOAD, piece) for piece in pieces)]:
                travelling.requests.append(self.comm.Isend(memory_of(buffer), to, tag))
        except MPI.Exception as error:
            self._give_up(travelling, error)
        else:
            self._sending.append(travelling)
        self._collect()

    def receive(self, source: int | None = None) -> Message | None:
        """The next message of this rank, or of whoever has sent one; None where none has come, or whoever sent it has died meanwhile. Raises
        `TransportError` for what is none, and for one that has changed on its way."""
        self._collect()
        status = MPI.Status()
        try:
            with one_by_one:
                found = self.comm.Improbe(MPI.ANY_SOURCE if source is None else source, _HEAD, status)
        except MPI.Exception:
            if source is not None or self._dead() <= self._lost:
                raise
            found = None  # until `newly_lost`
        if found is None:
            return None
        if (length := status.Get_count(MPI.BYTE)) > _LONGEST_HEAD:
            raise TransportError(f"asynchronous training: rank {status.Get_source()} sent a head of {length} bytes; it is damaged.")
        head = bytearray(length)
        with one_by_one:
            found.Recv(head)
        try:
            message = Message.of_head(bytes(head), self._most)
        except TransportError as error:
            raise TransportError(f"{error} It came from rank {status.Get_source()}.") from error
        travelling = _Travelling(status.Get_source(), [], list(message.payloads))
        try:
            for p in message.payloads:
                for piece in _pieces(p.view(torch.uint8)) if p.numel() else []:
                    travelling.requests.append(self.comm.Irecv(memory_of(piece), travelling.peer, _PAYLOAD))
        except MPI.Exception as error:
            self._give_up(travelling, error)
            return None
        self.wait_until(lambda: self._over(travelling))
        if travelling in self._given_up:
            return None
        message.check(travelling.peer)
        return message

    def wait_for(self, source: int) -> Message:
        """The next message of a rank, however long that takes. Raises `PeerLostError` for one that has died."""
        while True:
            try:
                self.wait_until(lambda: self._has_come(source))
                message = self.receive(source)
            except MPI.Exception as error:
                if source not in self._dead():
                    raise
                raise PeerLostError(
                    f"rank {source}, which serves, has died, and the x that it held with it. Go on from the last checkpoint."
                ) from error
            if message is not None:
                return message

    def newly_lost(self) -> list[int]:
        """Ranks that have died since the last call."""
        new = sorted(self._dead() - self._lost)
        if new:
            self._lost.update(new)
            self.comm.Ack_failed()  # from here on messages of any rank may be looked for again
        return new

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look now and then, and carry on what else is on its way."""
        patience = Patience()
        while not condition():
            self._collect()
            Operations.carry_on()
            time.sleep(patience.pause())

    def flush(self) -> None:
        """Return when everything has left."""
        self.wait_until(lambda: self._collect() == 0)

    def close(self) -> None:
        """Complete what is on its way, and give the communicator back."""
        self.flush()
        self.comm.Free()

    def abandon(self) -> None:
        """Ranks have died: the communicator stays, and what was on its way, as MPI may hold it until the end."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def _has_come(self, source: int) -> bool:
        with one_by_one:
            return self.comm.Iprobe(source, _HEAD)

    def _collect(self) -> int:
        self._sending = [sent for sent in self._sending if not self._over(sent)]
        return len(self._sending)

    def _over(self, travelling: _Travelling) -> bool:
        """Whether all has left, or come; or was given up. MPI must not hear of a request to a rank that is gone before it is complete, which would
        free it (see `transport.look_on`): so it is asked for their states, and they are tested when all are."""
        with one_by_one:
            waits = self._outlives and not all(request.Get_status() for request in travelling.requests)
        if waits:
            if gone := travelling.peer in self._dead():
                self._given_up.append(travelling)
            return gone
        try:
            with one_by_one:
                return MPI.Request.Testall(travelling.requests)
        except MPI.Exception as error:
            self._give_up(travelling, error)
            return True

    def _give_up(self, travelling: _Travelling, error: MPI.Exception) -> None:
        """MPI has raised an error, which is raised again unless the other rank has died."""
        if travelling.peer not in self._dead():
            raise error
        self._given_up.append(travelling)

    def _dead(self) -> set[int]:
        """Ranks that MPI knows to have died."""
        return dead_of(self.comm) if self._outlives else set()


def _pieces(t: torch.Tensor) -> list[torch.Tensor]:
    return [t[first : first + LARGEST] for first in range(0, t.numel(), LARGEST)]
