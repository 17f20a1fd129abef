"""Process sets, made usable and given back: their ids, communicators and channels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from . import runtime
from .process_sets import ProcessSet
from .runtime import Members
from .tracing import untraced

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["add_given", "add_process_set", "raise_if_wrong", "ranks_of", "register_all", "remove_process_set"]


@untraced
def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable, and return it. All processes call this, those outside of the set too, with equal ranks.

    Raises ValueError for ranks that do not exist, and when a set of these ranks is there already; `MismatchError` when ranks differ.
    """
    process_set = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    if process_set.ranks is None:
        raise NotImplementedError("add_process_set: give ranks; a communicator can only be given to init(process_sets=…).")
    runtime.refuse_if_it_shrinks("add_process_set")
    runtime.agree(f"add_process_set {process_set.ranks}")
    _register(process_set, process_set.ranks)
    return process_set


@untraced
def remove_process_set(process_set: ProcessSet) -> bool:
    """Complete what its processes submitted, and give its communicators back; True if it was usable. All processes call this.

    The global process set stays: False. Raises ValueError for anything but a ProcessSet.
    """
    if not isinstance(process_set, ProcessSet):
        raise ValueError(f"remove_process_set: expected the ProcessSet that add_process_set returned, got {process_set!r}.")
    if process_set.process_set_id in (None, 0):
        return False
    runtime.agree(f"remove_process_set {process_set.ranks}")
    return _unregister(process_set)


def ranks_of(process_sets: object, comm: MPI.Comm) -> list[tuple[int, ...]]:
    """The global ranks of each of those given to init, of which `comm` is everybody. Raises ValueError for what is no list of sets, for ranks that
    do not exist, for a set of everybody, and for one given twice."""
    if process_sets is None or process_sets == "dynamic":
        return []
    if not isinstance(process_sets, list | tuple) or not all(isinstance(given, ProcessSet) for given in process_sets):
        raise ValueError(f'init: process_sets is {process_sets!r}; expected a list of ProcessSet, or "dynamic".')
    found: list[tuple[int, ...]] = []
    for place, given in enumerate(process_sets):
        if given.ranks is not None:
            ranks = tuple(given.ranks)
        else:
            theirs, ours = given.mpi_comm.Get_group(), comm.Get_group()
            ranks = tuple(theirs.Translate_ranks(list(range(theirs.Get_size())), ours))
            theirs.Free()
            ours.Free()
        _check_ranks(ranks, comm.Get_size(), f"init: process_sets entry number {place}, {given}")
        if ranks in found or len(ranks) == comm.Get_size():
            raise ValueError(f"init: process_sets entry number {place} is a duplicate: {given}")
        found.append(ranks)
    return found


def register_all(process_sets: Sequence[ProcessSet], mine: Sequence[tuple[int, ...]], everyones: Sequence[Sequence[tuple[int, ...]]]) -> None:
    """Those given to init, whose ranks are `mine`; `everyones` by rank. Ranks may give different sets at the same place (of a split): all are
    registered everywhere, in one order. Objects for sets that are there already stand for those."""
    known = {members.ranks: identifier for identifier, members in runtime.context().process_sets.items()}
    for ranks in dict.fromkeys(itertools.chain.from_iterable(itertools.zip_longest(*everyones))):
        if ranks is None:
            continue
        given = process_sets[mine.index(ranks)] if ranks in mine else ProcessSet(ranks)
        if ranks in known:
            given.process_set_id, given.ranks = known[ranks], list(ranks)
        else:
            _register(given, ranks)


def add_given(process_sets: object) -> None:
    """Those given to an init() that is not the first; collective. What is wrong on some ranks is a ValueError on all."""
    runtime.refuse_if_it_shrinks("init(process_sets=…)")
    wrong, mine = None, []
    try:
        mine = ranks_of(process_sets, runtime.context().comm)
    except ValueError as error:
        wrong = error
    said = runtime.agree("init(process_sets=…)", extra=(None if wrong is None else str(wrong), mine))
    raise_if_wrong([text for text, _ in said], wrong)
    register_all(cast("Sequence[ProcessSet]", process_sets), mine, [ranks for _, ranks in said])


def raise_if_wrong(said: Sequence[str | None], mine: Exception | None) -> None:
    """Raise on all ranks what some of them have said to be wrong; `mine` on this one."""
    if mine is not None:
        raise mine
    if any(said):
        first = next(r for r, text in enumerate(said) if text)
        raise ValueError(f"init() has failed on rank {first}: {said[first]}")


def _check_ranks(ranks: Sequence[int], size: int, what: str) -> None:
    if len(set(ranks)) != len(ranks) or not ranks or not all(0 <= r < size for r in ranks):
        raise ValueError(f"{what}: expected different ranks from 0 to {size - 1}.")


def _register(process_set: ProcessSet, ranks: Sequence[int]) -> None:
    """Give it an id, and its members a channel; called on all ranks, for the same sets in the same order."""
    here = runtime.context()
    _check_ranks(ranks, here.size, str(process_set))
    if any(known.ranks == tuple(ranks) for known in here.process_sets.values()):
        raise ValueError(f"Attempted to add a duplicate process set: {process_set}")
    identifier = next(here.identifiers)
    comm = None
    if here.rank in ranks:
        everybody = here.comm.Get_group()
        group = everybody.Incl(list(ranks))
        comm = here.comm.Create_group(group, identifier)
        group.Free()
        everybody.Free()
    here.process_sets[identifier] = Members(tuple(ranks), comm, here.engine.add(comm, ranks) if comm is not None else None, process_set)
    process_set.process_set_id, process_set.ranks = identifier, list(ranks)


def _unregister(process_set: ProcessSet) -> bool:
    """Undo `_register`; called on all ranks. False if there is no such set any more."""
    here = runtime.context()
    found = here.process_sets.pop(process_set.process_set_id or 0, None)
    process_set.process_set_id = None
    if found is not None and found.channel is not None and found.comm is not None:
        here.engine.remove(found.channel)
        found.comm.Free()
    return found is not None
