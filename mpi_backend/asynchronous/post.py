"""Messages between workers and servers over MPI: a head, then the payloads' bytes as they are, in pieces that MPI can count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from mpi4py import MPI

from hvd_ecsgd.asynchronous import Message
from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.patience import Patience

from ..transport.memory import LARGEST, memory_of
from ..transport.operation import Operations

__all__ = ["Post"]

_HEAD, _PAYLOAD = 1, 2
"""Tags."""
_LONGEST_HEAD = 2**26


class Post:
    """Over a private duplicate of `comm`; creating one is collective. `most`: bytes that the payloads of a message can have at most.

    Who waits looks at intervals, as collectives do, and carries on what is on its way on the process's transports. Used by one thread.
    """

    def __init__(self, comm: MPI.Intracomm, most: int) -> None:
        self.comm = comm.Dup()
        self._most = most
        self._sending: list[tuple[list[MPI.Request], list[torch.Tensor]]] = []

    def send(self, message: Message, to: int) -> None:
        """Start to send; the payloads must not be written to any more."""
        message = replace(message, payloads=[p.contiguous().cpu() for p in message.payloads])
        head = torch.frombuffer(bytearray(message.head()), dtype=torch.uint8)
        payloads = [p.view(torch.uint8) for p in message.payloads if p.numel()]
        pieces = [piece for p in payloads for piece in _pieces(p)]
        requests = [self.comm.Isend(memory_of(head), to, _HEAD), *(self.comm.Isend(memory_of(piece), to, _PAYLOAD) for piece in pieces)]
        self._sending.append((requests, [head, *payloads]))
        self._collect()

    def receive(self, source: int | None = None) -> Message | None:
        """The next message of this rank, or of whoever has sent one; None where none has come. Raises `TransportError` for what is none, and for one
        that has changed on its way."""
        self._collect()
        status = MPI.Status()
        found = self.comm.Improbe(MPI.ANY_SOURCE if source is None else source, _HEAD, status)
        if found is None:
            return None
        if (length := status.Get_count(MPI.BYTE)) > _LONGEST_HEAD:
            raise TransportError(f"asynchronous training: rank {status.Get_source()} sent a head of {length} bytes; it is damaged.")
        head = bytearray(length)
        found.Recv(head)
        try:
            message = Message.of_head(bytes(head), self._most)
        except TransportError as error:
            raise TransportError(f"{error} It came from rank {status.Get_source()}.") from error
        requests = [
            self.comm.Irecv(memory_of(piece), status.Get_source(), _PAYLOAD)
            for p in message.payloads
            if p.numel()
            for piece in _pieces(p.view(torch.uint8))
        ]
        self.wait_until(lambda: MPI.Request.Testall(requests))
        message.check(status.Get_source())
        return message

    def wait_for(self, source: int) -> Message:
        """The next message of a rank, however long that takes."""
        while True:
            self.wait_until(lambda: self.comm.Iprobe(source, _HEAD))
            if (message := self.receive(source)) is not None:
                return message

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

    def _collect(self) -> int:
        self._sending = [sent for sent in self._sending if not MPI.Request.Testall(sent[0])]
        return len(self._sending)


def _pieces(t: torch.Tensor) -> list[torch.Tensor]:
    return [t[first : first + LARGEST] for first in range(0, t.numel(), LARGEST)]
