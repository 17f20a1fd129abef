"""What a script holds of training with a straggler cutoff: an optimizer of its own optimizer's class, and a thread that answers for it."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from hvd_ecsgd.asynchronous import Cutoff, CutoffWorker
from hvd_ecsgd.compression import AnyCompression, Compression
from hvd_ecsgd.core.meter import Meter, metrics
from hvd_ecsgd.core.talk import listed, packed_text, raise_on_other_texts
from hvd_ecsgd.errors import CompressionError, DisagreementError
from hvd_ecsgd.optimizer.distributed import matched
from hvd_ecsgd.optimizer.own_class import OwnClass
from hvd_ecsgd.transport.devices import current_device, use_device

from .. import runtime
from ..engine.negotiation import StallCheck
from .begin import check_compression, raise_together, share_x, told_of_parameters
from .wrapping import Participating, participant_of, wrapped

# This imports mpi4py.MPI, which initialises MPI: only init() may do that.
if TYPE_CHECKING:
    from ..transport import Link

__all__ = ["CutoffDistributedOptimizer", "close", "leave"]

_WHAT = "CutoffDistributedOptimizer()"


def CutoffDistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: AnyCompression = Compression.none,
    *,
    cutoff: Cutoff | None = None,
) -> Any:
    """Train synchronously without waiting for the slowest workers: a step is taken once the first c have their gradients.

    A thread beside the script answers for a worker that still computes: it sends nothing in that step, and gets the mean. Its own gradient goes
    into the step that begins next when it is there, so nothing is lost; before, `step()` applies what the others' steps have brought. A mean divides
    by all workers. x is the same bits on all workers that have applied as many steps. c maximises c / E[time until the c-th worker has its gradient],
    by measured times, and is chosen anew after each step; see `Cutoff`, of `hvd_ecsgd.asynchronous`.

    So a slow worker's loop makes fewer turns than there are steps: `optimizer.steps` counts those of all together, by which a loop should end
    (`while optimizer.steps < 10_000`) and a rate be set. A step has the hyper-parameters of the one of its workers that has been in the most steps.
    `compression`: any method with error feedback in gradient units, or without feedback; nothing is sent before `step()`. A step in which some rank
    held an inf or NaN is undone on all, and warned of. Beside the optimizer's own it offers `steps`, `late`, `c`, `consistent()`, `finish()`,
    `residuals()` and `load_residuals()`; a worker that has no more batches calls `finish()`, or ends. Collective: all ranks begin with the weights of
    rank 0, and make theirs in the same order.

    Raises ValueError before init(), where ranks serve, and without MPI_THREAD_MULTIPLE, as nobody could answer for a worker then (with
    MPI_BACKEND_THREAD=0 too); `CompressionError`, a ValueError, on all ranks for a method or an optimizer that cannot be used so;
    `DisagreementError` on all ranks when settings or models differ.
    """
    context = runtime.context()
    if context.job.servers:
        raise ValueError(f"{_WHAT}: {context.job.servers} ranks of this job serve, which is for AsyncDistributedOptimizer; start it without them.")
    if not context.engine.threaded:
        raise ValueError(
            f"{_WHAT}: expected threads that communicate while the script computes, and there are none: this MPI has no MPI_THREAD_MULTIPLE, or "
            "MPI_BACKEND_THREAD is 0. Use DistributedOptimizer, which waits for all workers."
        )
    runtime.refuse_if_it_shrinks("CutoffDistributedOptimizer")
    runtime.agree("CutoffDistributedOptimizer being made")
    from ..transport import Link, MPITransport

    link = Link(context.comm)
    transport = MPITransport(link=link)
    problem: Exception | None = None
    try:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise CompressionError(f"{_WHAT}: expected a torch.optim optimizer, got {optimizer!r:.100}.")
        if not (cutoff is None or isinstance(cutoff, Cutoff)):
            raise CompressionError(f"{_WHAT}: cutoff must be a Cutoff of hvd_ecsgd.asynchronous, or None for Cutoff(), got {cutoff!r:.100}.")
        cutoff = Cutoff() if cutoff is None else cutoff
        check_compression(compression, "a straggler cutoff")
        bound, trained, _ = matched(optimizer, named_parameters, compression)
        trained = [(name, p) for name, p in trained if p.requires_grad]
        own = OwnClass(type(optimizer))
        apply = _Applies(own)
        worker = CutoffWorker(bound.method, trained, optimizer, transport, cutoff, apply)
    except (CompressionError, ValueError, TypeError) as error:
        problem = error
    try:
        raise_together(transport, problem, _WHAT)
        raise_on_other_texts(transport.allgather(packed_text(_told(worker, cutoff)), "cutoff.settings").wait())  # type: ignore[arg-type]
    except (CompressionError, DisagreementError):
        link.close()
        raise
    share_x(transport, (p for _, p in trained))
    participant = _Participant(worker, link, own)
    made = wrapped(optimizer, _Partial, participant)
    apply.to = weakref.ref(made)
    worker.use(made)
    _here.append(participant)
    participant.thread.start()
    return made


_here: list[_Participant] = []


def leave() -> None:
    """Tell the other workers that this one will not come again, if it has not said so."""
    for participant in _here:
        participant.worker.leave()


def close() -> None:
    """Wait until all workers are done, and give the communicators back. Collective."""
    while _here:
        _here.pop().close()


def _told(worker: CutoffWorker, cutoff: Cutoff) -> dict[str, Any]:
    return {
        "the compression": worker.state.method.text,
        "the cutoff": repr(cutoff),
        "the optimizer": type(worker.optimizer).__name__,
        "the parameters": told_of_parameters(worker.state.named),
        "the hyper-parameters that are numbers": worker.hyper_parameters,
    }


class _Applies:
    """The update of the script's own class, by the wrapped optimizer."""

    def __init__(self, own: OwnClass) -> None:
        self._own = own
        self.to: Callable[[], Any] = lambda: None

    def __call__(self) -> None:
        with torch.enable_grad():
            self._own.step()(self.to())


class _Participant:
    """A worker, and the thread that answers for it."""

    what, with_whom, instead = "CutoffDistributedOptimizer", "the workers of one job", "Save its state_dict()."

    def __init__(self, worker: CutoffWorker, link: Link, own: OwnClass) -> None:
        self.worker, self._link, self.own = worker, link, own
        self._device, self._threads = current_device(), torch.get_num_threads()
        self._stall = StallCheck.from_environment().warn
        self.thread = threading.Thread(target=self._serve, name="mpi_backend cutoff", daemon=True)

    def _serve(self) -> None:
        use_device(self._device)
        torch.set_num_threads(self._threads)
        self.worker.serve(waited=self._stall, tell=self._tell)

    def _tell(self, seconds: float) -> None:
        ranks = listed(self.worker.attendance.waited_for)
        print(
            f"mpi_backend: this worker has waited {seconds:.0f} s in a CutoffDistributedOptimizer for {ranks} to come with a gradient, or into "
            "consistent() or finish().",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self.thread.join()
        if self.worker.over:
            self._link.close()
        else:
            self._link.abandon()

    def step(self) -> None:
        self.worker.step()

    @contextlib.contextmanager
    def consistent(self) -> Iterator[None]:
        self.worker.meet()
        yield
        self.worker.meet()

    def finish(self) -> None:
        self.worker.finish()

    def measure_by(self, meter: Meter | None) -> None:
        self.worker.measure_by(meter)


def _participant(optimizer: Any) -> _Participant:
    participant: _Participant = participant_of(optimizer)
    return participant


class _Partial(Participating):
    """Mixin in front of the optimizer's own class: what a script calls, and nothing else."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Hand this worker's gradient over, and apply all steps up to the one that takes it. `p.grad` is its mean afterwards, None of one that was
        undone. A closure is evaluated once, before."""
        return super().step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # torch would put step hooks around this one too

    def consistent(self) -> AbstractContextManager[None]:
        """`with optimizer.consistent():` — inside x is the same on all workers, and no step is taken: for evaluation and checkpoints. Collective over
        the workers that are not done; those that come first apply the others' steps, and at the end they wait."""
        return super().consistent()

    def finish(self) -> None:
        """This worker has no more batches: apply the others' steps until all say so. x is the same on all then. `step()` is a `SequenceError`
        afterwards. A worker that ends, or calls `shutdown()`, is done too, and its x stays where it was."""
        super().finish()

    @property
    def steps(self) -> int:
        """Steps of all workers together that this one has applied."""
        return _participant(self).worker.applied

    @property
    def c(self) -> int:
        """Workers that the next step waits for, as it stands."""
        return _participant(self).worker.attendance.c

    @property
    def late(self) -> int:
        """Steps that were taken while this worker computed, without its gradient."""
        worker = _participant(self).worker
        return worker.attendance.late[worker.transport.rank]

    @property
    def undone(self) -> int:
        """Steps that were undone on all workers, as some held an inf or NaN."""
        return _participant(self).worker.state.undone

    @property
    def bytes_sent(self) -> int:
        """Bytes of payloads that have left this worker."""
        return _participant(self).worker.state.traffic.sent

    def metrics(self) -> dict[str, Any]:
        """As `metrics()` of a bound compression: plain numbers, of all steps of this object and, while `telemetry.Logger(optimizer, …)` looks, of the
        last one. A step without this worker counts in `skips` and `staleness_steps` of its param groups."""
        worker = _participant(self).worker
        return metrics(worker.state, None, worker.meter)

    def residuals(self) -> dict[str, Any]:
        """What this worker, also as a server of pieces, has not sent yet, and counters: a part of a checkpoint, of which each rank saves its own.
        Inside of `consistent()`, else `SequenceError`."""
        return _participant(self).worker.state_dict()

    def load_residuals(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `residuals` returned on the same rank of as many. Inside of `consistent()`. The model and `state_dict()` are loaded there
        too, alike on all ranks. Raises `CompressionError` where it does not fit."""
        _participant(self).worker.load_state_dict(saved)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As the optimizer's, alike on all ranks. Inside of `consistent()`, else `SequenceError`."""
        _participant(self).worker.check_held("load_state_dict()")
        super().load_state_dict(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after wrapping: buckets are fixed. Raises `CompressionError`."""
        raise CompressionError("add_param_group(): give the optimizer all parameters before CutoffDistributedOptimizer.")
