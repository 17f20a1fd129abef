"""The process-wide context: who this process is among how many, and the transports everything else uses."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

# mpi4py.MPI initialises MPI when it is imported: only init() may do that.
if TYPE_CHECKING:
    from mpi4py import MPI

    from .background import Background
    from .engine import Channel, Engine
    from .process_sets import ProcessSet
    from .transport import MPITransport
    from .watchdog import Watchdog

__all__ = ["Context", "agree", "channel", "context", "add_optimizer", "init", "is_initialized", "members", "new_background", "new_transport",
           "optimizers", "register", "shutdown", "start_timeline", "stop_timeline", "tell_dropped", "unregister"]  # fmt: skip


@dataclass(frozen=True)
class Members:
    """A process set: global ranks by rank within it, and, for its members, their communicator and the channel of their collectives."""

    ranks: tuple[int, ...]
    comm: MPI.Comm | None
    channel: Channel | None
    process_set: ProcessSet


@dataclass(frozen=True)
class Context:
    """What init() found out. The package's functions communicate through the engine's channels; optimizers have transports of their own."""

    comm: MPI.Intracomm
    engine: Engine
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    homogeneous: bool
    process_sets: dict[int, Members]
    """By id. 0 is everybody."""
    identifiers: Iterator[int]


_context: Context | None = None
_watchdog: Watchdog | None = None
_optimizers: list[MPITransport] = []
_distributed: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_backgrounds: list[Background] = []
_exit_registered = False
_previous_hook = sys.excepthook
_ending = False
_starting = False
"""init() is under way, or has failed: other ranks may wait in it."""
_forked = False
"""This is a process that an initialised one has forked."""
_status = 0
"""Its exit status."""


def init(comm: MPI.Comm | Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Start the backend; collective over the processes of `comm`. Again, it does nothing.

    `comm` is an mpi4py communicator, a list of ranks of the world (called by exactly those), or None or [] for all processes; it is duplicated.
    `process_sets` become usable; sets given by communicators may differ between ranks, as those of a split do. ("dynamic", Horovod's leave to
    add sets later, is accepted and not needed.)

    Initialises MPI with full thread support if nobody has (the process then finalises it at exit), and starts the communication thread. Where
    MPI was initialised without it, communication is done by the callers, which is said in a warning; MPI_BACKEND_THREAD=0 asks for that.
    From here on an uncaught exception ends the job on all ranks, where it would leave the others waiting: `sys.excepthook` is extended, the
    previous hook still prints. A rank that dies, is cut off, or leaves while others wait for it ends the job too (and see `watchdog`).

    Variables, as Horovod's: HOROVOD_STALL_CHECK_TIME_SECONDS (60; 0: never), HOROVOD_STALL_SHUTDOWN_TIME_SECONDS (0: never),
    HOROVOD_STALL_CHECK_DISABLE, HOROVOD_FUSION_THRESHOLD (bytes; 4 MiB), HOROVOD_TIMELINE (a file; see `start_timeline`).

    Raises ValueError for a `comm` that is none of these, or does not contain this process, and for process sets of ranks that do not exist, or
    given twice; likewise for other things in their place. A variable that is wrong on some ranks is a ValueError on all.
    """
    global _context, _watchdog, _exit_registered, _previous_hook, _starting
    if _context is not None:
        return
    from mpi4py import MPI

    if not MPI.Is_initialized():  # mpi4py.rc.initialize was set to False
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize)
    _starting = True
    if sys.excepthook is not _end_the_job:
        _previous_hook, sys.excepthook = sys.excepthook, _end_the_job

    from .engine import Engine, fusion_bytes, threads_available
    from .environment import switch
    from .negotiation import StallCheck
    from .watchdog import Settings, Watchdog

    own = _communicator(comm)
    rank, size = own.Get_rank(), own.Get_size()
    wrong: ValueError | None = None
    try:
        _check_process_sets(process_sets)
        for variable in ("MPI_BACKEND_THREAD", "MPI_BACKEND_OVERLAP", "MPI_BACKEND_CUDA_AWARE"):  # what is wrong shows at once
            switch(variable)
        settings, limit, stall = Settings.from_environment(), fusion_bytes(), StallCheck.from_environment()
    except ValueError as error:
        wrong = error
    said = own.allgather(None if wrong is None else str(wrong))
    if any(said):  # where it is right, too: the others will not come any further
        own.Free()
        first = next(r for r, text in enumerate(said) if text)
        raise wrong or ValueError(f"init() has failed on rank {first}: {said[first]}")
    local = own.Split_type(MPI.COMM_TYPE_SHARED, rank)
    local_rank, local_size = local.Get_rank(), local.Get_size()
    cross = own.Split(local_rank, rank)
    cross_rank, cross_size = cross.Get_rank(), cross.Get_size()
    homogeneous = len(set(own.allgather(local_size))) == 1
    local.Free()
    cross.Free()
    if rank == 0 and MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        warnings.warn(
            "mpi_backend: MPI was initialised without MPI_THREAD_MULTIPLE, so there is no communication thread; results are the same, overlap "
            "with computation is less, and what some ranks never submit is only reported while rank 0 communicates.",
            RuntimeWarning,
            stacklevel=2,
        )
    from .process_sets import global_process_set

    engine = Engine(threads_available(), limit, stall)
    everybody = {0: Members(tuple(range(size)), own, engine.add(own, range(size)), global_process_set)}
    _context = Context(own, engine, rank, size, local_rank, local_size, cross_rank, cross_size, homogeneous, everybody, itertools.count(1))
    _watchdog = Watchdog(own, settings)
    if not _exit_registered:
        atexit.register(_at_exit)
        _exit_registered = True
    _starting = False
    global_process_set.ranks = list(range(size))
    _register_all([] if process_sets is None or isinstance(process_sets, str) else process_sets)
    path = os.environ.get("HOROVOD_TIMELINE", "")
    if path not in ("", "DYNAMIC"):  # Horovod's word for a timeline that the script starts
        start_timeline(path)


def shutdown() -> None:
    """Complete what all ranks have submitted and give the communicators back; collective. MPI stays initialised, and init() may be called again.

    What some rank has not submitted by then fails with `HorovodInternalError`.
    """
    global _context, _watchdog
    if _context is None or _forked:
        return
    from mpi4py import MPI

    closing, _context = _context, None
    watchdog, _watchdog = _watchdog, None
    if watchdog is not None:
        watchdog.leaving()
    if sys.excepthook is _end_the_job:
        sys.excepthook = _previous_hook
    timeline = closing.engine.timeline
    if not MPI.Is_finalized():
        closing.engine.close()
        for background in _backgrounds:
            background.close()
        _backgrounds.clear()
        if watchdog is not None:
            watchdog.wait_for_all(closing.engine.failure)
        for made in _optimizers:
            made.close()
        _optimizers.clear()
        _distributed.clear()
        if watchdog is not None:
            watchdog.stop()
        for process_set in closing.process_sets.values():
            if process_set.comm is not None:
                process_set.comm.Free()
    for identifier, process_set in closing.process_sets.items():
        process_set.process_set.process_set_id = None if identifier else 0
    closing.process_sets[0].process_set.ranks = []
    if timeline is not None:
        timeline.close()


def is_initialized() -> bool:
    """Whether init() has been called, and shutdown() not since."""
    return _context is not None


def context() -> Context:
    """The context. Raises ValueError before init()."""
    if _context is None:
        raise ValueError("mpi_backend has not been initialized; call hvd.init() (mpi_backend.init()) first.")
    return _context


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Write a Chrome trace of what this rank negotiates, compresses and sends: rank 0 to `file_path`, rank r to `file_path`.rank`r`.

    Open it in ui.perfetto.dev or chrome://tracing. A file that is there is overwritten, a timeline that was running ends. `mark_cycles` has no
    effect: there are no cycles here. Raises ValueError before init(), and for a `file_path` that is no path; OSError where it cannot be written.
    """
    from .timeline import Timeline

    if not isinstance(file_path, str | os.PathLike):
        raise ValueError(f"start_timeline: file_path is {file_path!r}; expected the path of the file to write.")
    stop_timeline()
    here, file_path = context(), os.fspath(file_path)
    here.engine.timeline = Timeline(file_path if here.rank == 0 else f"{file_path}.rank{here.rank}", here.rank)


def stop_timeline() -> None:
    """Stop writing the trace, if one is written. Raises ValueError before init()."""
    engine = context().engine
    timeline, engine.timeline = engine.timeline, None
    if timeline is not None:
        timeline.close()


def _refuse_if_forked() -> None:
    if _forked:
        raise ValueError(f"process {os.getpid()} was forked from rank {context().rank} and cannot communicate; only the rank itself can.")


# ---- process sets


def members(process_set: ProcessSet) -> Members:
    """Who belongs to a process set. Raises ValueError for one that is not usable."""
    here = context()
    found = here.process_sets.get(getattr(process_set, "process_set_id", None) or 0)
    if found is None or getattr(process_set, "process_set_id", None) is None:
        raise ValueError(f"{process_set} is no usable process set; pass it to init(process_sets=[…]) or add_process_set first.")
    return found


def channel(process_set: ProcessSet) -> Channel:
    """The channel of its collectives. Raises ValueError for a set that is not usable, or that this process does not belong to, and in a process
    that was forked, which has no part in MPI."""
    found = members(process_set)
    _refuse_if_forked()
    if found.channel is None:
        raise ValueError(f"rank {context().rank} is not a member of the process set of ranks {list(found.ranks)}.")
    return found.channel


def agree(text: str, among: Members | None = None) -> None:
    """Return when every rank has called it, of all or of a process set; raise `MismatchError` on every rank when texts differ."""
    _refuse_if_forked()
    from hvd_ecsgd.transport.base import Ready

    from .negotiation import Request

    everybody = (context().process_sets[0] if among is None else among).channel
    assert everybody is not None
    everybody.submit(Request(everybody.automatic_name(), text), lambda nothing: None, start=lambda extras: Ready(None)).wait()


def register(process_set: ProcessSet, ranks: Sequence[int]) -> None:
    """Give it an id, and its members a channel; called on all ranks, for the same sets in the same order."""
    here = context()
    if len(set(ranks)) != len(ranks) or not ranks or not all(0 <= r < here.size for r in ranks):
        raise ValueError(f"{process_set}: expected different ranks from 0 to {here.size - 1}.")
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


def unregister(process_set: ProcessSet) -> bool:
    """Undo `register`; called on all ranks. False if there is no such set any more."""
    here = context()
    found = here.process_sets.pop(process_set.process_set_id or 0, None)
    process_set.process_set_id = None
    if found is not None and found.channel is not None and found.comm is not None:
        here.engine.remove(found.channel)
        found.comm.Free()
    return found is not None


def _check_process_sets(process_sets: object) -> None:
    from .process_sets import ProcessSet

    if process_sets is None or process_sets == "dynamic":
        return
    if not isinstance(process_sets, list | tuple) or not all(isinstance(given, ProcessSet) for given in process_sets):
        raise ValueError(f'init: process_sets is {process_sets!r}; expected a list of ProcessSet, or "dynamic".')


def _register_all(process_sets: Sequence[ProcessSet]) -> None:
    """Those given to init. Ranks may give different sets at the same place (of a split): all are registered everywhere, in one order."""
    from .process_sets import ProcessSet

    here = context()
    mine: list[tuple[int, ...]] = []
    for given in process_sets:
        if given.ranks is not None:
            mine.append(tuple(given.ranks))
        else:
            theirs, ours = given.mpi_comm.Get_group(), here.comm.Get_group()
            mine.append(tuple(theirs.Translate_ranks(list(range(theirs.Get_size())), ours)))
            theirs.Free()
            ours.Free()
    for place, given in enumerate(process_sets):
        if mine.index(mine[place]) != place:
            raise ValueError(f"init: process_sets entry number {place} is a duplicate: {given}")
    everyones = here.comm.allgather(mine)
    for ranks in dict.fromkeys(itertools.chain.from_iterable(itertools.zip_longest(*everyones))):
        if ranks is not None:
            register(process_sets[mine.index(ranks)] if ranks in mine else ProcessSet(ranks), ranks)


# ---- for optimizers


def new_background() -> Background | None:
    """A thread for one optimizer, closed by `shutdown`; None where MPI may not be called from it."""
    from .background import Background

    if not context().engine.threaded:
        return None
    _backgrounds.append(Background(f"mpi_backend optimizer {len(_backgrounds)}"))
    return _backgrounds[-1]


def add_optimizer(optimizer: Any, transport: Any) -> int:
    """Note a DistributedOptimizer, for `join`, and for what is said of its transport; all ranks note theirs in the same order. Its number."""
    number = next(_numbers)
    _distributed[number] = optimizer
    transport.user = weakref.ref(optimizer)
    return number


def tell_dropped(waits: bool) -> None:
    """While this rank waits in `join`, those who step an optimizer that it has dropped wait for it in vain: they are told."""
    if _watchdog is not None:
        _watchdog.tell_dropped([transport for transport in _optimizers if waits and transport.user() is None])


def optimizers() -> dict[int, Any]:
    """Those in use, by number. One that only a cycle of references keeps is not, and another rank may have let it go already."""
    gc.collect()
    return {number: optimizer for number, optimizer in sorted(_distributed.items()) if optimizer.listens}


def new_transport(process_set: ProcessSet | None = None) -> MPITransport:
    """A transport of its own for one optimizer, so that two of them need not start their exchanges in the same order on all ranks.

    Collective over the process set (default: all); every rank makes its optimizers in the same order. Closed by `shutdown`. Raises ValueError
    before init(), and outside of the process set.
    """
    from .transport import MPITransport

    everybody = context().process_sets[0]
    users = everybody if process_set is None else members(process_set)
    agree("DistributedOptimizer being made", users)  # without it a rank that has joined, or makes none, would be waited for in silence
    made = MPITransport(users.comm)
    _optimizers.append(made)
    if _watchdog is not None:
        _watchdog.watch(made, users.ranks)
    return made


# ---- parts


def _communicator(comm: MPI.Comm | Sequence[int] | None) -> MPI.Intracomm:
    from mpi4py import MPI

    if isinstance(comm, MPI.Intracomm) and comm != MPI.COMM_NULL:
        return comm.Dup()
    if comm is None:
        return MPI.COMM_WORLD.Dup()
    if not isinstance(comm, Sequence) or not all(isinstance(r, int) and 0 <= r < MPI.COMM_WORLD.Get_size() for r in comm):
        raise ValueError(f"init: comm is {comm!r}; expected an mpi4py communicator, a list of ranks of MPI.COMM_WORLD, or None for all processes.")
    if len(comm) == 0:
        return MPI.COMM_WORLD.Dup()
    if MPI.COMM_WORLD.Get_rank() not in comm:
        raise ValueError(f"init: rank {MPI.COMM_WORLD.Get_rank()} is not among the ranks {list(comm)}; only those may call init with that list.")
    group = MPI.COMM_WORLD.Get_group().Incl(list(comm))
    created = MPI.COMM_WORLD.Create_group(group)
    group.Free()
    return created


def _end_the_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook for uncaught exceptions: the others would wait for this rank, some for ever."""
    global _ending, _status
    if _ending:  # a hook that was set after the first init() calls this one, and after a second init() is the previous one
        sys.__excepthook__(kind, error, trace)
        return
    _ending = True
    from mpi4py import MPI

    comm = _context.comm if _context is not None else MPI.COMM_WORLD if _starting else None
    if comm is None or comm.Get_size() == 1 or _forked:
        _status = 1
        _previous_hook(kind, error, trace)
        _ending = False
        return
    if _watchdog is not None:
        _watchdog.announce(f"uncaught {kind.__name__}: {error}")
    who = f"rank {comm.Get_rank()} of {comm.Get_size()} (process {os.getpid()} on {socket.gethostname()})"
    print(f"mpi_backend: uncaught exception on {who}; ending the job on all ranks.", file=sys.stderr)
    _previous_hook(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    comm.Abort(1)


def _at_exit() -> None:
    if _forked:  # where finalising MPI, as mpi4py does in the end, would wait for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
    shutdown()


def _in_a_child() -> None:
    """It may ask for its rank; whatever becomes of it is not the job's matter. (Those that `multiprocessing` makes never come to their exit.)"""
    global _forked
    if not _exit_registered:
        return
    _forked, leave = True, sys.exit

    def exit(status: Any = None) -> NoReturn:
        global _status
        _status = status if isinstance(status, int) else status is not None
        leave(status)

    sys.exit = exit


os.register_at_fork(after_in_child=_in_a_child)


def _finalize() -> None:
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.Finalize()
