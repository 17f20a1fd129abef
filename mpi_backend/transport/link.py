"""The communicators of a transport, and what is on its way there: they outlive the transport, and can be another one's afterwards."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from .lost import look_on
from .messages import messages_among_all
from .operation import Operations

__all__ = ["Link", "User"]


@dataclass(frozen=True)
class User:
    """What messages say of whom a link serves. `called`: the function outside of a step in which it waits for the others; `names`: of parameters."""

    called: str
    names: Sequence[str]


class Link:
    """A private duplicate of `comm`, and the operations on it. Creating one is collective, and so is `close`.

    `nodes`: the ranks of each node, where a node is one worker.
    """

    def __init__(self, comm: MPI.Comm, nodes: Sequence[Sequence[int]] = ()) -> None:
        self.comm, self.nodes = comm.Dup(), nodes
        self.messages = messages_among_all(self.comm)
        self.operations = Operations(self.comm.Get_attr(MPI.TAG_UB) or 32767, self.messages.pace.lanes, look_on(self.comm))
        self.abandoned = False
        self.user: Callable[[], User | None] = lambda: None
        """The optimizer that this serves, while there is one."""

    def carry_on(self) -> bool:
        """Carry on what is on its way, without waiting. Whether anything still is, that has not been given up."""
        if self.abandoned:
            return False
        self.operations.progress()
        return not self.operations.idle()

    def idle_at(self) -> int | None:
        """After how many collectives, which ranks compare, nothing is on its way here; None while something is, or for good."""
        return None if self.abandoned or not self.operations.idle() else self.operations.submitted()

    def abandon(self) -> None:
        """Something in flight will never be complete: `close` does not wait for it, and its buffers stay, as MPI may write to them until the end."""
        if not self.abandoned:
            self.abandoned = True
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def revoke(self) -> None:
        """A rank is gone: what is in flight here fails on all ranks, and whatever they start."""
        if not self.abandoned:
            self.comm.Revoke()

    def close(self) -> None:
        """Complete what is in flight and free the communicators."""
        if not self.abandoned:
            self.operations.complete_all()
            self.comm.Free()
