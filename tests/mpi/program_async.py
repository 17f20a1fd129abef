"""Asynchronous training on real ranks, of which the last `servers` (first argument) serve; the second argument is a folder that all share. The third
says what is done beside training: `wrong` use, `resume`, `resize`; or `fail`: rank (fourth argument) is killed, when is written to the fifth."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from mpi4py import MPI

import mpi_backend as hvd
from hvd_ecsgd import CheckpointError, Compression, CompressionError, DisagreementError, SequenceError, telemetry
from hvd_ecsgd.compressors import Identity, RandomK, Sign, TopK
from hvd_ecsgd.telemetry.runs import Run

servers, folder, also = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
workers = size - servers
serves = rank >= workers
pids = MPI.COMM_WORLD.allgather(os.getpid())


def everyone_says(said: bool, what: str) -> None:
    assert all(verdicts := MPI.COMM_WORLD.allgather(said)), f"{what}: {verdicts}"


def refused(kind: type[Exception], text: str, make: Callable[[], object]) -> None:
    """On all ranks, those that serve too."""
    try:
        make()
        said = "nothing was raised"
    except (ValueError, DisagreementError) as error:
        said = "" if isinstance(error, kind) and text in str(error) else f"{type(error).__name__}: {error}"
    everyone_says(not said, f"{text}: {said}")


def model_of(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 3))


teacher = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step * 100 + rank))
    return x, (x @ teacher).argmax(1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs, labels = batch(step)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@contextlib.contextmanager
def serving_ends() -> object:
    """Where a rank serves, the optimizer ends it; here it goes on to the next part."""
    try:
        yield
        assert not serves
    except SystemExit as end:
        assert serves and not end.code
    hvd.shutdown()


def make(compression: Compression = Compression.one_bit(), optimizer: torch.optim.Optimizer | None = None, **options: object) -> object:  # noqa: B008
    sgd = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return hvd.AsyncDistributedOptimizer(sgd, model.named_parameters(), compression, **options)


if also == "wrong":
    refused(ValueError, "at least one must be left to train", lambda: hvd.init(servers=size))
    refused(ValueError, "expected a number of serving ranks", lambda: hvd.init(servers=-1))
    refused(ValueError, "differs between ranks", lambda: hvd.init(servers=rank % 2))
hvd.init()  # MPI_BACKEND_SERVERS says how many
everyone_says(hvd.is_serving() == serves and hvd.size() == (servers if serves else workers), "ranks and sizes are of each part")
everyone_says(hvd.rank() == (rank - workers if serves else rank), "ranks")
model = model_of()
if also == "wrong":
    refused(ValueError, "which is for AsyncDistributedOptimizer", lambda: hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)))
    refused(CompressionError, "tau_max must be", lambda: make(tau_max=-1))
    if workers > 1:
        refused(CompressionError, "tau_max must be at least", lambda: make(tau_max=workers - 2))
    refused(CompressionError, "neither shift the model", lambda: make(Compression.detached()))
    refused(CompressionError, "with error feedback that diverges", lambda: make(server_compressor=RandomK(4, unbiased=True)))
    refused(CompressionError, "evaluates its closure", lambda: make(optimizer=torch.optim.LBFGS(model.parameters())))
    refused(DisagreementError, "ranks do not agree on tau_max", lambda: make(tau_max=20 + rank))
    refused(CompressionError, "", lambda: make(tau_max=-1 if rank == size - 1 else 9))

# Training: uneven data, a schedule, evaluation in between; a gradient that is not finite.
with serving_ends():
    model = model_of(rank)  # rank 0's counts
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    optimizer = hvd.AsyncDistributedOptimizer(
        sgd, model.named_parameters(), Compression.double_squeeze(Sign(), TopK(4), dense_below=16), tau_max=3 * workers
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # as scripts do; the weights are those already
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
    for again, said in ((copy.copy, "Use save()"), (copy.deepcopy, "cannot be copied"), (pickle.dumps, "Use save()")):
        try:
            again(optimizer)
        except CompressionError as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"{again.__name__} of an asynchronous optimizer")
    inputs, labels = batch(0)
    logger = telemetry.Logger(optimizer, folder / "run.jsonl", norms_every=5, ranks="all")
    if also == "fail":
        train(model, optimizer, range(5))
        if rank == 0 and (victim := int(sys.argv[4])) != 0:  # the others go on, and wait
            os.kill(pids[victim], signal.SIGKILL)
        if rank == 0:
            Path(sys.argv[5]).write_text(f"{time.time()}")
            if int(sys.argv[4]) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        train(model, optimizer, range(5, 10**6))
    for epoch in range(3):
        train(model, optimizer, range(epoch * 30, epoch * 30 + 10 + 5 * rank))
        schedule.step()
        with optimizer.consistent():
            held = hvd.allgather(weights(model).unsqueeze(0))
            assert all(torch.equal(held[0], row) for row in held), "x is the same on all workers"
            with contextlib.suppress(SequenceError):
                optimizer.step()
                raise AssertionError("step() inside consistent()")
    optimizer.zero_grad()
    model(inputs).sum().backward()
    next(model.parameters()).grad[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert optimizer.refused == 1 and any("was not pushed" in str(w.message) for w in caught)
    train(model, optimizer, range(100, 110))
    optimizer.finish()
    held = hvd.allgather(weights(model).unsqueeze(0))
    assert all(torch.equal(held[0], row) for row in held) and torch.isfinite(held).all()
    accuracy = float((model(batch(1)[0]).argmax(1) == batch(1)[1]).float().mean())
    assert accuracy > 0.6, accuracy
    dense = 4 * sum(p.numel() for p in model.parameters()) * (3 * (10 + 5 * rank) + 10)
    assert 0 < optimizer.bytes_sent < dense / 2, (optimizer.bytes_sent, dense)
    logger.close()
    run = Run.read(folder / (f"run.rank{rank}.jsonl" if rank else "run.jsonl"))
    assert list(run.steps) == list(range(optimizer.metrics()["steps"])) and run.records[-1]["undone_steps"] == 1
    assert sum(r["sent_bytes"] for r in run.records) == optimizer.bytes_sent and run.series("relative_error", 0)[0]
    assert 0 <= max(run.series("staleness_updates")[1]) <= 3 * workers and min(run.series("received_bytes")[1][:30]) > 0
    with contextlib.suppress(SequenceError):
        optimizer.step()
        raise AssertionError("step() after finish()")

# A checkpoint, with one worker that trains and the others idle, so that the order is given: what follows is the same bits after loading it.
after: list[torch.Tensor] = []
for load in (False, True) if also in ("resume", "resize") else ():
    hvd.init(servers=servers)
    with serving_ends():
        model = model_of()
        optimizer = hvd.AsyncDistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.01), model.named_parameters(), Compression.double_squeeze(Sign(), Identity()), tau_max=99
        )
        if load:
            try:
                optimizer.load(folder / "nothing", model)
                raise AssertionError("a checkpoint that is not there")
            except CheckpointError as error:
                assert "holds no checkpoint" in str(error)
            restored = optimizer.load(folder, model)
            assert restored.extras == {"epoch": 7, "rank": rank} and not restored.notes, restored
        else:
            if rank == 0:
                train(model, optimizer, range(15))
            optimizer.save(folder, model, extras={"epoch": 7, "rank": rank})
        if rank == 0:
            train(model, optimizer, range(15, 30))
        optimizer.finish()
        after.append(weights(model))
assert serves or not after or torch.equal(after[0], after[1]), "what follows a checkpoint is what would have followed"

# With other workers and servers: x and the optimizer's state go on, residuals begin anew.
if also == "resize":
    hvd.init(servers=1 if servers > 1 else 2)
    with contextlib.suppress(SystemExit):
        model = model_of()
        optimizer = hvd.AsyncDistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.01), model.named_parameters(), Compression.double_squeeze(Sign(), Identity()), tau_max=99
        )
        restored = optimizer.load(folder, model)
        assert "residuals begin with zeros" in restored.notes[0]
        train(model, optimizer, range(3))
    hvd.shutdown()  # without finish(): a worker that ends is done

if rank == 0:
    print("all well", flush=True)
