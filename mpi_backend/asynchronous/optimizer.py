"""What a script holds: an optimizer of its own optimizer's class, whose steps the servers take."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hvd_ecsgd.asynchronous import Kind, Message, Plan, Server, Worker, plan_of, shards_of
from hvd_ecsgd.compression import AnyCompression, Compression
from hvd_ecsgd.core.meter import Meter, metrics
from hvd_ecsgd.core.talk import packed_text, raise_on_other_texts
from hvd_ecsgd.errors import CheckpointError, CompressionError, SequenceError
from hvd_ecsgd.optimizer.distributed import matched
from hvd_ecsgd.optimizer.own_class import OwnClass
from hvd_ecsgd.protocols import Compressor

from .. import runtime
from ..collectives import Average, Sum
from ..errors import RankLostError
from .begin import check_compression, raise_together, share_x, told_of_parameters
from .wrapping import Participating, participant_of, wrapped

# These import mpi4py.MPI, which initialises MPI: only init() may do that.
if TYPE_CHECKING:
    from hvd_ecsgd.asynchronous.saving import Restored

    from .group import Everyone
    from .post import Post

__all__ = ["AsyncDistributedOptimizer", "close", "is_serving", "leave"]


def is_serving() -> bool:
    """Whether this process serves those that train: of a job that was started with servers, one of the last. Raises ValueError before init()."""
    return runtime.context().job.serves


def AsyncDistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: AnyCompression = Compression.none,
    *,
    op: Any = Average,
    tau_max: int | None = None,
    server_compressor: Compressor | None = None,
    reuse: bool = False,
) -> Any:
    """Train without waiting for other workers: `step()` pushes this worker's gradient to the serving ranks, and takes what x has become.

    The job is started with serving ranks (`launch/mpirun.sh --servers 1`, MPI_BACKEND_SERVERS, `init(servers=1)`): its last ones. They run the same
    script as far as this call, in which they serve until all workers are done, and then leave with SystemExit, so what follows is done by workers
    alone; `rank()`, `size()` and collectives are theirs from `init()` on. Several servers share the parameters. Collective over all ranks: they begin
    with the weights of rank 0.

    `compression`: on the way to the servers, any method with error feedback in gradient units, or without feedback (an unbiased compressor); each
    worker keeps a residual. `server_compressor`: on the way back; that of a two-pass method (`double_squeeze`) by default, else x travels
    uncompressed. Servers keep what each worker holds. `op`: with Average each push is a step of the optimizer with 1/workers of the worker's learning
    rate, so pushes of all workers are one step of synchronous training; with Sum one with the whole. Hyper-parameters are read at every step, on
    the worker. `tau_max`: updates that x may take while a worker computes, at most, on each server; a worker that is ahead waits. By default 4 times
    as many as there are workers; less than workers − 1 cannot be, as all begin at once. `reuse`: a push is a step with the last gradients of all
    workers, of which it brings one (Q-IAG: quantised incremental aggregated gradients), so a worker that is silent counts with its last one; for
    methods without feedback, and once more as much memory on servers. `hvd_ecsgd.asynchronous.suggested_step_size` says how large a rate may be.

    A gradient with an inf or NaN is not pushed, and warned of; the worker goes on. What it offers beside the optimizer's own: `consistent()`,
    `finish()`, `save()`, `load()`, `refused`, `bytes_sent`, `bytes_received`. A worker that has no more batches calls `finish()`, or ends.
    With MPI_BACKEND_ON_FAILURE=shrink the others go on without workers that die (docs/mpi_backend.md); else, and where a server dies, the job ends.

    Raises ValueError before init(), and where no rank serves; `CompressionError`, a ValueError, on all ranks for a method, a `tau_max` or an
    optimizer that cannot be used so, and for more servers than parameters; `DisagreementError` on all ranks when settings or models differ.
    """
    context = runtime.context()
    if not context.job.servers:
        raise ValueError(
            "AsyncDistributedOptimizer(): no rank of this job serves. Start it with launch/mpirun.sh --servers 1, or set MPI_BACKEND_SERVERS=1, or "
            "call init(servers=1); and at least two ranks."
        )
    if _here:
        raise ValueError("AsyncDistributedOptimizer(): there is one already, and the serving ranks of a job serve one; init() again for another.")
    runtime.agree("AsyncDistributedOptimizer being made")
    from .group import Everyone

    outlives = context.recovery is not None
    everyone = Everyone(context.job, outlives)
    transport = everyone.transport
    problem: Exception | None = None
    made: tuple[Plan, list[list[tuple[str, torch.nn.Parameter]]]] | None = None
    try:
        made = _prepared(optimizer, named_parameters, compression, op, tau_max, server_compressor, reuse, context.job)
    except (CompressionError, ValueError, TypeError) as error:
        problem = error
    try:
        raise_together(transport, problem, "AsyncDistributedOptimizer()")
        assert made is not None
        plan, shards = made
        raise_on_other_texts(transport.allgather(packed_text(_told(plan, shards, optimizer)), "asynchronous.settings").wait())
    except BaseException:
        everyone.close()
        raise
    share_x(transport, (p for shard in shards for _, p in shard))
    from .post import Post

    post = Post(context.job.comm, 4 * sum(p.nbytes for shard in shards for _, p in shard) + 2**20, outlives)
    participant = _Participant(plan, shards, optimizer, context.job, post, everyone)
    _here.append(participant)
    if context.job.serves:
        participant.serve()
        sys.exit(0)
    asynchronous = wrapped(optimizer, _Asynchronous, participant)
    participant.begin(asynchronous)
    return asynchronous


_here: list[_Participant] = []
"""What takes part in this process; empty, or one."""


def leave() -> None:
    """Tell the servers that this worker will not come again, if it has not said so."""
    for participant in _here:
        participant.say_done()


def close() -> None:
    """Give the communicators back. Collective over the job."""
    while _here:
        _here.pop().close()


def abandon() -> None:
    """Ranks have died: communicators stay."""
    while _here:
        _here.pop().abandon()


def _prepared(
    optimizer: torch.optim.Optimizer,
    named_parameters: Any,
    compression: AnyCompression,
    op: Any,
    tau_max: int | None,
    server_compressor: Any,
    reuse: bool,
    job: Any,
) -> tuple[Plan, list[list[tuple[str, torch.nn.Parameter]]]]:
    """The plan, and by server the trained parameters. Raises for whatever is wrong."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CompressionError(f"AsyncDistributedOptimizer(): expected a torch.optim optimizer, got {optimizer!r:.100}.")
    if op not in (Average, Sum):
        raise CompressionError(f"AsyncDistributedOptimizer(): op must be Average or Sum, got {op!r:.100}.")
    check_compression(compression, "asynchronous training")
    bound, trained, _ = matched(optimizer, named_parameters, compression)
    trained = [(name, p) for name, p in trained if p.requires_grad]
    plan = plan_of(bound.method, job.workers, tau_max, server_compressor, mean=op == Average, reuse=reuse)
    if plan.tau_max < job.workers - 1:
        raise CompressionError(
            f"tau_max must be at least workers − 1 = {job.workers - 1}, as all workers begin at once, so the last gradient of the first ones is as "
            f"stale as that; got {plan.tau_max}."
        )
    plan.check_optimizer(optimizer)
    return plan, shards_of(trained, job.servers)


def _told(plan: Plan, shards: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "the compression": plan.method.text,
        "the server's compressor": repr(plan.down),
        "tau_max": plan.tau_max,
        "op": plan.share,
        "reuse": plan.reuse,
        "the optimizer": type(optimizer).__name__,
        "the parameters": [told_of_parameters(shard) for shard in shards],
        "the hyper-parameters' names": [sorted(group) for group in optimizer.param_groups],
    }


class _Participant:
    """A worker or a server of this process, and how it talks to the others."""

    what, with_whom, instead = "AsyncDistributedOptimizer", "the workers and servers of one job", "Use save()."

    def __init__(
        self,
        plan: Plan,
        shards: list[list[tuple[str, torch.nn.Parameter]]],
        optimizer: torch.optim.Optimizer,
        job: runtime.Job,
        post: Post,
        everyone: Everyone,
    ) -> None:
        self.plan, self.shards, self.optimizer = plan, shards, optimizer
        self.job, self.post, self.everyone = job, post, everyone
        self.own = OwnClass(type(optimizer))
        self.worker: Worker | None = None
        self.inside = False
        """x is held for an evaluation."""
        self.done = False
        self._told: set[int] = set()
        """Workers of which the servers were told that they have died."""
        self._ours: dict[Path, set[str]] = {}
        """By folder, ids of the checkpoints that this training has saved there last, or loaded."""

    # -- a server ----------------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until all workers are done."""
        from .serve import Serving

        server = Server(self.plan, self.shards[self.job.rank - self.job.workers], self.optimizer)
        serving = Serving(server, self.post, first=self.job.rank == self.job.workers)

        def without_the_lost() -> Server:
            serving.let_go(self.everyone.lost)
            return server

        def together(message: Message) -> None:
            folder = Path(bytes(message.payloads[0].numpy()).decode())
            with contextlib.suppress(CheckpointError):  # which the workers raise
                if message.kind is Kind.SAVE:
                    self._save(folder, lambda: _saving().saved_by_server(without_the_lost()), server.version, overwrite=bool(message.number))
                else:
                    self._load(folder, without_the_lost, None)

        serving.run(together)

    # -- a worker ----------------------------------------------------------------------------------------------------------------

    def begin(self, wrapped: torch.optim.Optimizer) -> None:
        self.worker = Worker(self.plan, self.shards, wrapped, self.job.rank)
        self.pull(Kind.PULL)

    def step(self) -> None:
        """Push the gradients, and take what x has become."""
        assert self.worker is not None
        self._check("step()")
        messages = self.worker.push()
        for s in range(self.job.servers):
            self._send(Kind.LEAVE, s) if messages is None else self.post.send(messages[s], self.job.workers + s)
        self.pull(Kind.PULL)

    def pull(self, kind: Kind) -> None:
        """From one server after the other, so that no two workers wait for each other."""
        assert self.worker is not None
        for s in range(self.job.servers):
            self._send(kind, s)
            self.worker.on_answer(s, self.post.wait_for(self.job.workers + s))

    def _send(self, kind: Kind, server: int, **what: Any) -> None:
        self.post.send(Message(kind, self.job.rank, **what), self.job.workers + server)

    def _tell_all(self, kind: Kind, **what: Any) -> None:
        for s in range(self.job.servers):
            self._send(kind, s, **what)

    def _meet(self, what: str) -> None:
        """All workers that live are here, and the servers know who has died, so that nothing more comes of those. Collective over the workers."""
        while True:
            try:
                runtime.agree(f"AsyncDistributedOptimizer{what}")
                break
            except RankLostError:
                if (here := runtime.context()).recovery is None:
                    raise
        here = runtime.context()
        if here.recovery is not None:
            from ..transport import lost_between

            lost = {r for r in lost_between(self.job.comm, here.comm) if r < self.job.workers}
            if lost - self._told:
                self._told = lost
                self._tell_all(Kind.LOST, absent=sorted(lost))

    def _check(self, what: str) -> None:
        if self.done:
            raise SequenceError(f"{what} after finish(): this worker has told the servers that it is done.")
        if self.inside:
            raise SequenceError(f"{what} inside of `with optimizer.consistent()`: x is held there; leave it first.")

    @contextlib.contextmanager
    def consistent(self) -> Iterator[None]:
        """x is the same on all workers inside."""
        self._check("consistent()")
        self._tell_all(Kind.LEAVE)
        self._meet(".consistent()")
        self.pull(Kind.PULL_EXACT)
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
        self._meet(".consistent(), at its end")

    def finish(self) -> None:
        self._check("finish()")
        self._tell_all(Kind.LEAVE)
        self._meet(".finish()")
        self.pull(Kind.FETCH)
        self.say_done()

    def measure_by(self, meter: Meter | None) -> None:
        assert self.worker is not None
        self.worker.measure_by(meter)

    def say_done(self) -> None:
        """To the servers, once. They forget this worker."""
        if self.worker is not None and not self.done:
            self.done = True
            self._tell_all(Kind.DONE)
            self.post.flush()

    def save(self, directory: str | os.PathLike[str], model: torch.nn.Module, extras: Any, overwrite: bool) -> None:
        with self.consistent():
            assert self.worker is not None
            folder = Path(directory).absolute()
            self._tell_all(Kind.SAVE, number=int(overwrite), payloads=[_path(folder)])
            worker, servers, transport = self.worker, self.job.servers, self.everyone.transport
            self._save(folder, lambda: _saving().saved_by_worker(worker, model, extras, transport, servers), 0, overwrite)

    def load(self, directory: str | os.PathLike[str], model: torch.nn.Module) -> Restored:
        self._check("load()")
        assert self.worker is not None
        self._tell_all(Kind.LEAVE)
        self._meet(".load()")
        folder = Path(directory).absolute()
        self._tell_all(Kind.LOAD, payloads=[_path(folder)])
        try:
            restored = self._load(folder, lambda: self.worker, model)
        finally:
            self.pull(Kind.PULL_EXACT)
        self._meet(".load(), at its end")
        return restored

    # -- both --------------------------------------------------------------------------------------------------------------------

    def _save(self, folder: Path, everything: Callable[[], Any], version: int, overwrite: bool) -> None:
        name, ours, transport = type(self.optimizer).__name__, self._ours.setdefault(folder, set()), self.everyone.transport
        saved: str = self.everyone.together(
            lambda: _saving().save(folder, transport, self.plan, self.job.servers, name, everything(), version, ours, overwrite)
        )
        self._ours[folder] = {saved}

    def _load(self, folder: Path, side: Callable[[], Worker | Server | None], model: torch.nn.Module | None) -> Restored:
        transport = self.everyone.transport
        take_over: Callable[[], Restored] = self.everyone.together(
            lambda: _saving().load(folder, transport, self.plan, self.job.servers, self.optimizer, side(), model)
        )
        restored = take_over()
        self._ours[folder] = {restored.id}
        return restored

    def close(self) -> None:
        self.post.close()
        self.everyone.close()

    def abandon(self) -> None:
        self.post.abandon()
        self.everyone.abandon()


def _saving() -> Any:
    """What needs a package of its own only where it is used."""
    from hvd_ecsgd.asynchronous import saving

    return saving


def _path(folder: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(str(folder).encode()), dtype=torch.uint8)


def _participant(optimizer: Any) -> _Participant:
    participant: _Participant = participant_of(optimizer)
    return participant


class _Asynchronous(Participating):
    """Mixin in front of the optimizer's own class: what a script calls, and nothing else."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Push this worker's gradient, and take what x has become; wait where this worker is so far ahead that others' gradients would become too
        stale. A closure is evaluated once, before."""
        return super().step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # torch would put step hooks around this one too

    def consistent(self) -> AbstractContextManager[None]:
        """`with optimizer.consistent():` — inside x is the same on all workers, exactly the servers', with every gradient that was pushed before: for
        evaluation. Collective over the workers; those that come first wait, at the end too. Raises `SequenceError` inside of itself."""
        return super().consistent()

    def finish(self) -> None:
        """This worker has no more batches: wait for the others to say so, and take x, which is the same on all then. Collective over the workers.
        `step()` is a `SequenceError` afterwards. Without it a worker is done when it ends, or calls `shutdown()`."""
        super().finish()

    def save(self, directory: str | os.PathLike[str], model: torch.nn.Module, *, extras: Any = None, overwrite: bool = False) -> None:
        """Save a checkpoint: the model, the optimizer's state on the servers, residuals, and each worker's `extras`; as
        `hvd_ecsgd.save_checkpoint`, with which it shares the form of its files. Collective over the workers.

        Raises `CheckpointError` on all ranks when any fails."""
        _participant(self).save(directory, model, extras, overwrite)

    def load(self, directory: str | os.PathLike[str], model: torch.nn.Module) -> Restored:
        """Take over what `save` saved; also with other numbers of workers and servers, whose residuals begin with zeros. Collective over the workers.
        Raises `CheckpointError` on all ranks for what is missing, damaged or does not fit."""
        return _participant(self).load(directory, model)

    def metrics(self) -> dict[str, Any]:
        """As `metrics()` of a bound compression: plain numbers, of all gradients of this object and, while `telemetry.Logger(optimizer, …)` looks, of
        the last one. `steps` counts this worker's gradients, `undone_steps` those that were refused."""
        return metrics(self._worker.whole, None, self._worker.meter)

    @property
    def refused(self) -> int:
        """Gradients of this worker that were not pushed, as they held an inf or NaN."""
        return self._worker.refused

    @property
    def bytes_sent(self) -> int:
        """Bytes of payloads that this worker has sent to the servers."""
        return self._worker.sent

    @property
    def bytes_received(self) -> int:
        """Bytes of payloads that have come from them."""
        return self._worker.received

    @property
    def _worker(self) -> Worker:
        worker = _participant(self).worker
        assert worker is not None
        return worker

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Not after wrapping: the state is the servers'. Raises `CompressionError`."""
        raise CompressionError(
            "load_state_dict(): the optimizer's state is on the serving ranks. Load it into the optimizer before it is wrapped, on all ranks, or use "
            "load(), which takes over what save() saved."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after wrapping: who serves which parameter is fixed. Raises `CompressionError`."""
        raise CompressionError("add_param_group(): give the optimizer all parameters before AsyncDistributedOptimizer.")
