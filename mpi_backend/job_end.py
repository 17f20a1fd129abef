"""How a rank ends: an uncaught exception ends the job, the end of the script shuts down, and a forked process goes by itself."""

from __future__ import annotations

import atexit
import io
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from mpi4py import MPI

    from .liveness.watchdog import Watchdog

__all__ = ["finalize_at_exit", "is_forked", "moved", "running", "starting", "stopped"]

_comm: MPI.Comm | None = None
"""Of the job that runs; None before init() and after shutdown()."""
_watchdog: Watchdog | None = None
_previous_hook = sys.excepthook
_exit_registered = False
_keyval: int | None = None
"""Of an attribute of COMM_SELF, which MPI takes away when it begins to finalise."""
_told_of_finalize = False
"""The attribute is there."""
_starting = False
"""init() is under way, or has failed: other ranks may wait in it."""
_ending = False
_forked = False
"""This is a process that an initialised one has forked."""
_status = 0
"""Its exit status."""


def starting() -> None:
    """init() begins: from here on an uncaught exception ends the job on all ranks, since others may wait in it."""
    global _starting, _previous_hook
    _starting = True
    if sys.excepthook is not _end_on_exception:
        _previous_hook, sys.excepthook = sys.excepthook, _end_on_exception


def running(comm: MPI.Comm, watchdog: Watchdog, shutdown: Callable[[], None]) -> None:
    """init() is done; `shutdown` is called at the end of the script."""
    from mpi4py import MPI

    global _comm, _watchdog, _starting, _exit_registered, _keyval, _told_of_finalize
    _comm, _watchdog, _starting = comm, watchdog, False
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, value: value())
    MPI.COMM_SELF.Set_attr(_keyval, partial(_finalizing, shutdown))
    _told_of_finalize = True
    if not _exit_registered:
        atexit.register(_at_exit, shutdown)
        _exit_registered = True


def moved(comm: MPI.Comm, watchdog: Watchdog) -> None:
    """The job goes on with fewer ranks."""
    global _comm, _watchdog
    _comm, _watchdog = comm, watchdog


def stopped() -> None:
    """shutdown() begins: the exceptions of this process are its own matter again."""
    from mpi4py import MPI

    global _comm, _watchdog, _told_of_finalize
    _comm = _watchdog = None
    told, _told_of_finalize = _told_of_finalize, False
    if told and _keyval is not None and not MPI.Is_finalized():
        MPI.COMM_SELF.Delete_attr(_keyval)
    if sys.excepthook is _end_on_exception:
        sys.excepthook = _previous_hook


def is_forked() -> bool:
    """Whether this is a process that an initialised one has forked."""
    return _forked


def finalize_at_exit() -> None:
    """Finalise MPI when the process ends, if nobody has until then."""
    atexit.register(_finalize)


def _finalizing(shutdown: Callable[[], None]) -> None:
    """The script calls MPI.Finalize() itself, which would wait for the others, while they wait for this rank: they are told by a shutdown before."""
    global _told_of_finalize
    if not _told_of_finalize:  # it is `stopped` that takes the attribute away
        return
    _told_of_finalize = False
    try:
        shutdown()
    except Exception as error:  # MPI cannot raise it
        print(f"mpi_backend: shutdown() in MPI.Finalize() has failed: {error!r}", file=sys.stderr)


def _end_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook for uncaught exceptions: the others would wait for this rank, some for ever."""
    global _ending, _status
    if _ending:  # a hook that was set after the first init() calls this one, and after a second init() is the previous one
        sys.__excepthook__(kind, error, trace)
        return
    _ending = True
    from mpi4py import MPI

    comm = _comm if _comm is not None else MPI.COMM_WORLD if _starting else None
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
    if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:  # torch.distributed's hook around this one would print that afterwards
        sys.__stderr__.write(sys.stderr.getvalue())
        sys.__stderr__.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    comm.Abort(1)


def _at_exit(shutdown: Callable[[], None]) -> None:
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
