"""The process-wide context: who this process is among how many, and the transports everything else uses."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

# mpi4py.MPI initialises MPI when it is imported: only init() may do that.
if TYPE_CHECKING:
    from mpi4py import MPI

    from .negotiation import Negotiator
    from .transport import MPITransport

__all__ = ["Context", "context", "init", "is_initialized", "new_transport", "shutdown"]


@dataclass(frozen=True)
class Context:
    """What init() found out. The package's functions communicate through `negotiator`; optimizers have transports of their own."""

    comm: MPI.Comm
    negotiator: Negotiator
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    homogeneous: bool


_context: Context | None = None
_optimizers: list[MPITransport] = []
_exit_registered = False
_previous_hook = sys.excepthook


def init(comm: MPI.Comm | Sequence[int] | None = None) -> None:
    """Start the backend; collective over the processes of `comm`. Again, it does nothing.

    `comm` is an mpi4py communicator, a list of ranks of the world (called by exactly those), or None or [] for all processes; it is duplicated.
    Initialises MPI with full thread support if nobody has (the process then finalises it at exit). From here on an uncaught exception
    ends the job on all ranks, where it would leave the others waiting: `sys.excepthook` is extended, the previous hook still prints. (A non-zero
    `sys.exit` is not an exception to it.)

    Raises ValueError for a `comm` that is none of these, or does not contain this process.
    """
    global _context, _exit_registered, _previous_hook
    if _context is not None:
        return
    from mpi4py import MPI

    if not MPI.Is_initialized():  # mpi4py.rc.initialize was set to False
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize)

    from .negotiation import Negotiator

    own = _communicator(comm)
    rank, size = own.Get_rank(), own.Get_size()
    local = own.Split_type(MPI.COMM_TYPE_SHARED, rank)
    local_rank, local_size = local.Get_rank(), local.Get_size()
    cross = own.Split(local_rank, rank)
    cross_rank, cross_size = cross.Get_rank(), cross.Get_size()
    homogeneous = len(set(own.allgather(local_size))) == 1
    local.Free()
    cross.Free()
    _context = Context(own, Negotiator(own), rank, size, local_rank, local_size, cross_rank, cross_size, homogeneous)
    if not _exit_registered:
        atexit.register(shutdown)
        _exit_registered = True
    _previous_hook, sys.excepthook = sys.excepthook, _end_the_job


def shutdown() -> None:
    """Complete what is in flight and give the communicators back; collective. MPI stays initialised, and init() may be called again."""
    global _context
    if _context is None:
        return
    from mpi4py import MPI

    closing, _context = _context, None
    if sys.excepthook is _end_the_job:
        sys.excepthook = _previous_hook
    if not MPI.Is_finalized():
        closing.negotiator.close()
        for made in _optimizers:
            made.close()
        _optimizers.clear()
        closing.comm.Free()


def is_initialized() -> bool:
    """Whether init() has been called, and shutdown() not since."""
    return _context is not None


def context() -> Context:
    """The context. Raises ValueError before init()."""
    if _context is None:
        raise ValueError("mpi_backend has not been initialized; use mpi_backend.init().")
    return _context


def new_transport() -> MPITransport:
    """A transport of its own for one optimizer, so that two of them need not start their exchanges in the same order on all ranks.

    Collective; every rank makes its optimizers in the same order. Closed by `shutdown`. Waiting in it does not carry on
    what the package's functions have in flight: between an optimizer's step and `synchronize` of a handle, all ranks wait in the same order.
    Raises ValueError before init().
    """
    from .transport import MPITransport

    made = MPITransport(context().comm)
    _optimizers.append(made)
    return made


def _communicator(comm: MPI.Comm | Sequence[int] | None) -> MPI.Comm:
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
    if _context is None or _context.size == 1:
        _previous_hook(kind, error, trace)
        return
    print(f"mpi_backend: uncaught exception on rank {_context.rank} of {_context.size}; ending the job on all ranks.", file=sys.stderr)
    _previous_hook(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    _context.comm.Abort(1)


def _finalize() -> None:
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.Finalize()
