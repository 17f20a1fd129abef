"""init() and shutdown(): the one place that puts everything together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvd_ecsgd.arguments import is_integer
from hvd_ecsgd.errors import PeerLostError

from . import asynchronous, job_end, runtime
from .engine.negotiation import StallCheck
from .engine.timeline import Timeline
from .environment import switch, whole_number
from .optimizer import resources
from .process_sets import ProcessSet, global_process_set
from .runtime import Context, context
from .sets import add_given, raise_if_wrong, ranks_of, register_all

# mpi4py.MPI initialises MPI when it is imported: only init() may do that.
if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["init", "shutdown", "start_timeline", "stop_timeline"]


def init(comm: MPI.Comm | Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | str | None = None, servers: int | None = None) -> None:
    """Start the backend; collective over the processes of `comm`. Again, it makes further `process_sets` usable, and does nothing else.

    `comm` is an mpi4py communicator, a list of ranks of the world (called by exactly those), or None or [] for all processes; it is duplicated.
    `process_sets` become usable; sets given by communicators may differ between ranks, as those of a split do. ("dynamic", Horovod's leave to
    add sets later, is accepted and not needed.)
    `servers`: so many of the last processes serve the others in asynchronous training (`AsyncDistributedOptimizer`); MPI_BACKEND_SERVERS by default,
    which `launch/mpirun.sh --servers` sets. Ranks, sizes and collectives are then of the workers alone, and on those that serve of these alone.

    Initialises MPI with full thread support if nobody has (the process then finalises it at exit), and starts the communication thread. Where
    MPI was initialised without it, communication is done by the callers, which is said in a warning; MPI_BACKEND_THREAD=0 asks for that.
    From here on an uncaught exception ends the job on all ranks, where it would leave the others waiting: `sys.excepthook` is extended, the
    previous hook still prints. A rank that dies, is cut off, or leaves while others wait for it ends the job too (and see `watchdog`).

    Variables, as Horovod's: HOROVOD_STALL_CHECK_TIME_SECONDS (60; 0: never), HOROVOD_STALL_SHUTDOWN_TIME_SECONDS (0: never),
    HOROVOD_STALL_CHECK_DISABLE, HOROVOD_FUSION_THRESHOLD (bytes; 4 MiB), HOROVOD_TIMELINE (a file; see `start_timeline`).
    MPI_BACKEND_ON_FAILURE=shrink: the job goes on without ranks that die and do not serve, where MPI has ULFM; "end", the default, ends it.

    Raises ValueError for a `comm` that is none of these, or does not contain this process, and for process sets of ranks that do not exist, or
    given twice; likewise for other things in their place; for other processes in a further call. What is wrong on some ranks, a variable too, is
    an error on all; nothing is initialised then, and init() may be called again.
    """
    from mpi4py import MPI

    if runtime.is_initialized():
        _refuse_other_processes(comm)
        if process_sets is not None and process_sets not in ("dynamic", [], ()):
            add_given(process_sets)
        return

    if not MPI.Is_initialized():  # mpi4py.rc.initialize was set to False
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        job_end.finalize_at_exit()
    job_end.starting()

    from .assembly import Choices, assemble, part_of, watchdog_of
    from .engine.engine import fusion_bytes
    from .liveness.watchdog import Settings
    from .recovery import ShrinkingJob
    from .transport import are_checked, forced_algorithm, node_ranks

    everybody = _communicator(comm)
    wrong: Exception | None = None
    mine: list[tuple[int, ...]] = []
    serving = 0
    chosen = {"MPI_BACKEND_ALLREDUCE": "", "MPI_BACKEND_NODES": "", "MPI_BACKEND_ON_FAILURE": "", "MPI_BACKEND_CHECKSUM": ""}
    timeline: Timeline | None = None
    try:
        serving = _servers(servers, everybody.Get_size(), process_sets)
        mine = ranks_of(process_sets, everybody)
        for variable in ("MPI_BACKEND_THREAD", "MPI_BACKEND_OVERLAP", "MPI_BACKEND_CUDA_AWARE"):  # what is wrong shows at once
            switch(variable)
        chosen = {
            "MPI_BACKEND_ALLREDUCE": forced_algorithm(),
            "MPI_BACKEND_NODES": node_ranks(),
            "MPI_BACKEND_ON_FAILURE": _on_failure(mine),
            "MPI_BACKEND_CHECKSUM": str(int(are_checked())),
        }
        settings, limit, stall = Settings.from_environment(), fusion_bytes(), StallCheck.from_environment()
        path = os.environ.get("HOROVOD_TIMELINE", "")
        if path not in ("", "DYNAMIC"):  # Horovod's word for a timeline that the script starts
            timeline = _timeline(path, everybody.Get_rank())
    except (ValueError, OSError) as error:
        wrong = error
    said = everybody.allgather((None if wrong is None else str(wrong), mine, chosen, serving))
    try:
        raise_if_wrong([text for text, *_ in said], wrong)  # where it is right, too: the others will not come any further
        for variable in chosen:
            if len(values := {theirs[variable] for _, _, theirs, _ in said}) > 1:
                raise ValueError(f"{variable} differs between ranks: {sorted(values)}; set it to the same on all, or on none.")
        if len(numbers := {number for *_, number in said}) > 1:
            raise ValueError(
                f"init: the number of serving ranks differs between ranks: {sorted(numbers)}; set servers, or MPI_BACKEND_SERVERS, alike."
            )
    except BaseException:
        everybody.Free()
        if timeline is not None:
            timeline.close()
        raise
    job = runtime.Job(everybody, everybody.Get_rank(), everybody.Get_size(), serving)
    if job.rank == 0 and MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        warnings.warn(
            "mpi_backend: MPI was initialised without MPI_THREAD_MULTIPLE, so there is no communication thread; results are the same, overlap "
            "with computation is less, and what some ranks never submit is only reported while rank 0 communicates.",
            RuntimeWarning,
            stacklevel=2,
        )
    choices = Choices(settings, limit, stall)
    recovery = ShrinkingJob(choices) if chosen["MPI_BACKEND_ON_FAILURE"] == "shrink" else None
    own = part_of(job)
    here = assemble(job, own, watchdog_of(job, choices, recovery is not None), choices, recovery)
    here.engine.finished = None if recovery is None else recovery.together
    runtime.install(here)
    job_end.running(everybody, here.watchdog, shutdown)
    global_process_set.ranks = list(range(here.size))
    register_all([] if process_sets is None or isinstance(process_sets, str) else process_sets, mine, [ranks for _, ranks, *_ in said])
    here.engine.timeline = timeline


def shutdown() -> None:
    """Complete what all ranks have submitted and give the communicators back; collective. MPI stays initialised, and init() may be called again.

    What some rank has not submitted by then fails with `HorovodInternalError`.
    """
    if job_end.is_forked() or not runtime.is_initialized():
        return
    from mpi4py import MPI

    from .recovery import ShrinkingJob

    here = context()
    here.watchdog.leaving()
    job_end.stopped()
    asynchronous.leave()
    if isinstance(here.recovery, ShrinkingJob) and here.job.servers and not MPI.Is_finalized():
        here.recovery.leave()
    closing = runtime.remove()
    assert closing is not None
    timeline = closing.engine.timeline
    if not MPI.Is_finalized():
        try:
            _give_back(closing)
        except (MPI.Exception, PeerLostError):
            if not isinstance(closing.recovery, ShrinkingJob):
                raise
            asynchronous.abandon()
            closing.recovery.leave_as_it_is(closing)
    for identifier, process_set in closing.process_sets.items():
        process_set.process_set.process_set_id = None if identifier else 0
    closing.process_sets[0].process_set.ranks = []
    if timeline is not None:
        timeline.close()


def _give_back(closing: Context) -> None:
    """Complete what all ranks have submitted, and give the communicators back."""
    closing.engine.close(meanwhile=resources.carry_on)
    resources.close_backgrounds()
    if closing.recovery is not None and closing.job.servers:  # some workers may be gone for long
        from .transport import start_agreement

        meeting, _flag = start_agreement(closing.job.comm, True)
        closing.watchdog.wait_for_all(meeting)
    else:
        closing.watchdog.wait_for_all(closing.job.comm.Ibarrier(), closing.engine.failure)
    resources.close_transports()
    asynchronous.close()
    closing.watchdog.stop()
    for process_set in closing.process_sets.values():
        if process_set.comm is not None:
            process_set.comm.Free()
    if closing.job.servers:
        closing.job.comm.Free()


def _servers(servers: int | None, size: int, process_sets: object) -> int:
    """How many of `size` ranks serve. Raises ValueError where that is no number, or leaves nobody to train."""
    where = "MPI_BACKEND_SERVERS" if servers is None else "init: servers"
    number = whole_number("MPI_BACKEND_SERVERS", 0, "a number of serving ranks, 0 for none") if servers is None else servers
    if not is_integer(number, 0):
        raise ValueError(f"{where} is {number!r}; expected a number of serving ranks, 0 for none.")
    if number >= size:
        raise ValueError(f"{where} is {number}, and there are {size} ranks: at least one must be left to train. Start more ranks, or fewer servers.")
    if number and process_sets is not None and process_sets not in ("dynamic", [], ()):
        raise ValueError(f"init: process_sets with {number} serving ranks; add them after init (add_process_set), by ranks among the workers.")
    return number


def _on_failure(process_sets: Sequence[object]) -> str:
    """What is done when a rank dies. Raises ValueError where that cannot be done."""
    from .engine.engine import threads_available
    from .recovery import on_failure
    from .transport import node_ranks, without_ulfm

    if (chosen := on_failure()) == "end":
        return chosen
    why = without_ulfm()
    if why:
        why += ". Start it so (launch/mpirun.sh --on-failure shrink), or unset the variable"
    elif not threads_available():
        why = "it needs the communication thread: MPI_THREAD_MULTIPLE, and MPI_BACKEND_THREAD=1"
    elif node_ranks():
        why = "MPI_BACKEND_NODES makes workers of several ranks, which none of these outlives; unset one of the variables"
    elif process_sets:
        why = "process_sets were given, which are of ranks that would be numbered anew; leave them out"
    if why:
        raise ValueError(f"MPI_BACKEND_ON_FAILURE=shrink: {why}.")
    return chosen


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Write a Chrome trace of what this rank negotiates, compresses and sends: rank 0 to `file_path`, rank r to `file_path`.rank`r`.

    Open it in ui.perfetto.dev or chrome://tracing. A file that is there is overwritten, a timeline that was running ends. `mark_cycles` has no
    effect: there are no cycles here. Raises ValueError before init(), and for a `file_path` that is no path; OSError where it cannot be written.
    """
    if not isinstance(file_path, str | os.PathLike):
        raise ValueError(f"start_timeline: file_path is {file_path!r}; expected the path of the file to write.")
    stop_timeline()
    here, file_path = context(), os.fspath(file_path)
    here.engine.timeline = _timeline(file_path, here.rank)


def stop_timeline() -> None:
    """Stop writing the trace, if one is written. Raises ValueError before init()."""
    engine = context().engine
    timeline, engine.timeline = engine.timeline, None
    if timeline is not None:
        timeline.close()


def _timeline(path: str, rank: int) -> Timeline:
    return Timeline(path if rank == 0 else f"{path}.rank{rank}", rank)


def _refuse_other_processes(comm: MPI.Comm | Sequence[int] | None) -> None:
    """An init() that is not the first can name the processes that are there, or none."""
    from mpi4py import MPI

    if comm is None or (isinstance(comm, Sequence) and len(comm) == 0):
        return
    if isinstance(comm, MPI.Comm):
        asked = comm.Get_group()
    else:
        asked = MPI.COMM_WORLD.Get_group().Incl(list(comm))
    ours = context().comm.Get_group()
    same = MPI.Group.Compare(asked, ours) != MPI.UNEQUAL
    asked.Free()
    ours.Free()
    if not same:
        raise ValueError(f"init: it is initialised already, for other processes than those of comm={comm!r}; call shutdown() on all of them first.")


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
