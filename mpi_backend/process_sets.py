"""Subsets of the processes that communicate among themselves."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

__all__ = ["ProcessSet", "global_process_set"]

NOT_INITIALIZED = "mpi_backend has not been initialized; call hvd.init() (mpi_backend.init()) first."


class ProcessSet:
    """Processes given by their ranks, or by an mpi4py communicator among them. Usable once it was passed to `init` or `add_process_set`.

    Attributes: `process_set_id` (None while it is not usable), `ranks` (global, ascending), `mpi_comm`.
    """

    process_set_id: int | None = None
    ranks: list[int] | None = None
    mpi_comm: Any = None
    this_process: ClassVar[int | None] = None
    """The global rank of this process, which `init` says and `shutdown` takes back."""

    def __init__(self, ranks_or_comm: Sequence[int] | Any) -> None:
        if isinstance(ranks_or_comm, Iterable) and getattr(ranks_or_comm, "ndim", 1) == 1:
            ranks = list(ranks_or_comm)
            if any(not isinstance(r, numbers.Integral) or isinstance(r, bool) for r in ranks):
                raise ValueError("ProcessSet should be initialized with a list of process ranks or an mpi4py Comm object")
            self.ranks = sorted(map(int, ranks))
            return
        from mpi4py import MPI

        if not isinstance(ranks_or_comm, MPI.Comm):
            raise ValueError("ProcessSet should be initialized with a list of process ranks or an mpi4py Comm object")
        self.mpi_comm = ranks_or_comm

    def size(self) -> int | None:
        """The number of its processes; None while it is not usable."""
        if self.process_set_id is None or self.ranks is None:
            return None
        self._own_rank()
        return len(self.ranks)

    def rank(self) -> int | None:
        """The rank of this process within the set; None while it is not usable. Raises ValueError outside of the set.

        Functions that take a rank (`root_rank`) mean the global rank, also within a set.
        """
        if self.process_set_id is None or self.ranks is None:
            return None
        own = self._own_rank()
        if own not in self.ranks:
            raise ValueError(f"rank {own} is not a member of the process set of ranks {self.ranks}.")
        return self.ranks.index(own)

    def included(self) -> bool | None:
        """Whether this process belongs to it; None while that is not known."""
        return None if self.ranks is None else self._own_rank() in self.ranks

    def _own_rank(self) -> int:
        if ProcessSet.this_process is None:
            raise ValueError(NOT_INITIALIZED)
        return ProcessSet.this_process

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"


global_process_set = ProcessSet([])
"""All processes."""
global_process_set.process_set_id = 0
