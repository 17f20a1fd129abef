"""The messages by which the ranks of a channel negotiate, on a communicator of their own."""

from __future__ import annotations

import pickle
from typing import Any

from mpi4py import MPI

from ..transport import look_on, one_by_one

__all__ = ["Mail"]


class Mail:
    """Nothing here waits. `comm` is freed by `close`."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm, self._look = comm, look_on(comm)
        self._sends: list[tuple[MPI.Request, bytes]] = []

    @property
    def sending(self) -> bool:
        """Something is on its way."""
        return bool(self._sends)

    def send(self, content: object, *ranks: int) -> None:
        data = pickle.dumps(content)
        self._sends += [(self._comm.Isend([data, MPI.BYTE], rank), data) for rank in ranks]

    def received(self) -> tuple[int, Any] | None:
        """The next message and who sent it; None when none has come."""
        status = MPI.Status()
        with one_by_one:
            message = self._comm.Improbe(status=status)
            if message is None:
                return None
            data = bytearray(status.Get_count(MPI.BYTE))
            message.Recv([data, MPI.BYTE])
        return status.Get_source(), pickle.loads(data)

    def sweep(self) -> None:
        """Let go of what has arrived."""
        if self._sends:
            arrived = self._look([request for request, _ in self._sends]) or ()
            self._sends = [sent for i, sent in enumerate(self._sends) if i not in arrived]

    def revoke(self) -> None:
        """A rank is gone: nothing more comes, on any rank."""
        self._comm.Revoke()

    def close(self) -> None:
        self._comm.Free()
