"""Subsets of the processes that communicate among themselves."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from . import runtime

__all__ = ["ProcessSet", "add_process_set", "global_process_set", "remove_process_set"]


class ProcessSet:
    """Processes given by their ranks, or by an mpi4py communicator among them. Usable once it was passed to `init` or `add_process_set`.

    Attributes: `process_set_id` (None while it is not usable), `ranks` (global, ascending), `mpi_comm`.
    """

    process_set_id: int | None = None
    ranks: list[int] | None = None
    mpi_comm: Any = None

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
        return None if self.process_set_id is None else len(runtime.members(self).ranks)

    def rank(self) -> int | None:
        """The rank of this process within the set; None while it is not usable. Raises ValueError outside of the set.

        Functions that take a rank (`root_rank`) mean the global rank, also within a set.
        """
        return None if self.process_set_id is None else runtime.channel(self).rank

    def included(self) -> bool | None:
        """Whether this process belongs to it; None while that is not known."""
        return None if self.ranks is None else runtime.context().rank in self.ranks

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"


global_process_set = ProcessSet([])
"""All processes."""
global_process_set.process_set_id = 0


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable, and return it. All processes call this, those outside of the set too, with equal ranks.

    Raises ValueError for ranks that do not exist, and when a set of these ranks is there already; `MismatchError` when ranks differ.
    """
    process_set = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    if process_set.ranks is None:
        raise NotImplementedError("add_process_set: give ranks; a communicator can only be given to init(process_sets=…).")
    runtime.agree(f"add_process_set {process_set.ranks}")
    runtime.register(process_set, process_set.ranks)
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Complete what its processes submitted, and give its communicators back; True if it was usable. All processes call this.

    The global process set stays: False. Raises ValueError for anything but a ProcessSet.
    """
    if not isinstance(process_set, ProcessSet):
        raise ValueError(f"remove_process_set: expected the ProcessSet that add_process_set returned, got {process_set!r}.")
    if process_set.process_set_id in (None, 0):
        return False
    runtime.agree(f"remove_process_set {process_set.ranks}")
    return runtime.unregister(process_set)
