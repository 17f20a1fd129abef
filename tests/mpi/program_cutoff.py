"""Training with a straggler cutoff on real ranks, of which the last computes three times as long; no check depends on how fast they are. The first
argument is a folder that all share; with a second, a rank, that one is killed, and when is written to the third."""

from __future__ import annotations

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

import mpi_backend as hvd
from hvd_ecsgd import Compression, CompressionError, DisagreementError, SequenceError, telemetry
from hvd_ecsgd.asynchronous import Cutoff
from hvd_ecsgd.compressors import Sign, TopK
from hvd_ecsgd.telemetry.runs import Run

folder = Path(sys.argv[1])
hvd.init()
rank, size = hvd.rank(), hvd.size()
slow = rank == size - 1 and size > 1


def model_of(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))


teacher = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
turns = 0


def turn(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    global turns
    turns += 1
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(turns * 100 + rank))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
    time.sleep(0.015 if slow else 0.005)
    optimizer.step()


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def equal_everywhere(model: torch.nn.Module) -> bool:
    held = hvd.allgather(weights(model).unsqueeze(0))
    return all(torch.equal(held[0], row) for row in held) and bool(torch.isfinite(held).all())


def refused(kind: type[Exception], text: str, make: Callable[[], object]) -> None:
    try:
        make()
        said = "nothing was raised"
    except (ValueError, DisagreementError, SequenceError) as error:
        said = "" if isinstance(error, kind) and text in str(error) else f"{type(error).__name__}: {error}"
    verdicts = hvd.allgather_object(said)
    assert not any(verdicts), (text, verdicts)


def make(model: torch.nn.Module, compression: object = None, optimizer: torch.optim.Optimizer | None = None, **options: object) -> object:
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5) if optimizer is None else optimizer
    chosen = Compression.double_squeeze(Sign(), TopK(4), dense_below=16) if compression is None else compression
    return hvd.CutoffDistributedOptimizer(sgd, model.named_parameters(), chosen, **options)


for how, text in (("MPI_BACKEND_THREAD", "there are none"), ("MPI_BACKEND_SERVERS", "which is for AsyncDistributedOptimizer")):
    if (how == "MPI_BACKEND_SERVERS" and size == 1) or len(sys.argv) > 2:
        continue
    hvd.shutdown()
    os.environ[how] = "0" if how == "MPI_BACKEND_THREAD" else "1"
    hvd.init()
    refused(ValueError, text, lambda: make(model_of()))
    hvd.shutdown()
    del os.environ[how]
    hvd.init()

model = model_of(rank)  # rank 0's counts
refused(CompressionError, "neither shift the model", lambda: make(model, Compression.detached()))
refused(CompressionError, "something that all workers do together", lambda: make(model, Compression.power_sgd()))
refused(CompressionError, "evaluates its closure", lambda: make(model, optimizer=torch.optim.LBFGS(model.parameters())))
refused(CompressionError, "a number of workers from 1 to", lambda: make(model, cutoff=Cutoff(least=size + 1)))
refused(CompressionError, "must be a Cutoff", lambda: make(model, cutoff=3))
refused(CompressionError, "", lambda: make(model, optimizer=None if rank else torch.optim.LBFGS(model.parameters())))
if size > 1:
    refused(DisagreementError, "ranks do not agree on the cutoff", lambda: make(model, cutoff=Cutoff(slack=0.1 + rank)))

# All agree in every turn, so the times decide nothing: with a cap of 0 nobody is late.
optimizer = make(model, cutoff=Cutoff(cap=0))
assert equal_everywhere(model), "all begin with rank 0's weights"
refused(CompressionError, "cannot be copied", lambda: copy.deepcopy(optimizer))
for again in (copy.copy, pickle.dumps):
    refused(CompressionError, "Save its state_dict()", lambda again=again: again(optimizer))
if len(sys.argv) > 2:
    while optimizer.steps < 10**6:
        turn(model, optimizer)
        if optimizer.steps == 10 and rank == int(sys.argv[2]):
            Path(sys.argv[3]).write_text(f"{time.time()}")
            os.kill(os.getpid(), signal.SIGKILL)
for _ in range(5):
    turn(model, optimizer)
assert optimizer.steps == 5 and optimizer.late == 0 and optimizer.c <= size
optimizer.finish()
assert equal_everywhere(model)
refused(SequenceError, "after finish()", optimizer.step)

# The last rank is late now and then; evaluation and a checkpoint in between, and an inf.
model = model_of()
optimizer = make(model, cutoff=Cutoff(least=max(1, size - 1), cap=8))
logger = telemetry.Logger(optimizer, folder / "run.jsonl", norms_every=5, ranks="all")
while optimizer.steps < 40:
    for group in optimizer.param_groups:
        group["lr"] = 0.2 if optimizer.steps < 20 else 0.1
    turn(model, optimizer)
with optimizer.consistent():
    assert equal_everywhere(model), "x is the same inside of consistent()"
    assert 40 <= optimizer.steps < 50, optimizer.steps
    steps = hvd.allgather_object(optimizer.steps)
    assert len(set(steps)) == 1, steps
    refused(SequenceError, "inside of `with optimizer.consistent()`", optimizer.step)
    saved = {"x": {k: v.clone() for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict(), "residuals": optimizer.residuals()}
    torch.save(saved, folder / f"{rank}.pt")
assert optimizer.bytes_sent > 0 or size == 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    if rank == 0:
        next(model.parameters()).grad[0, 0] = float("nan")
    optimizer.step()
    with optimizer.consistent():
        assert optimizer.undone == 1 and equal_everywhere(model), optimizer.undone
assert any("undone on all ranks" in str(w.message) for w in caught)
optimizer.finish()
logger.close()
run = Run.read(folder / (f"run.rank{rank}.jsonl" if rank else "run.jsonl"))
assert list(run.steps) == list(range(optimizer.steps)) and run.records[-1]["undone_steps"] == optimizer.metrics()["undone_steps"] == 1
assert sum(r["sent_bytes"] for r in run.records) == optimizer.bytes_sent, "what is logged is what is counted"
skips = run.series("skips", 0)[1] or [0]
assert skips[-1] >= optimizer.late - 1, ("all but the step that was undone", skips[-1], optimizer.late)
x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
accuracy = float((model(x).argmax(1) == (x @ teacher).argmax(1)).float().mean())
assert accuracy > 0.6, accuracy

# From the checkpoint, with all in time: twice the same bits, and with the residuals forgotten others.
after = []
for residuals in (True, True, False):
    model = model_of()
    optimizer = make(model, cutoff=Cutoff(cap=0))
    refused(SequenceError, "is to be called inside", lambda: optimizer.load_state_dict(saved["optimizer"]))  # noqa: B023
    loaded = torch.load(folder / f"{rank}.pt", weights_only=False)
    with optimizer.consistent():
        model.load_state_dict(loaded["x"])
        optimizer.load_state_dict(loaded["optimizer"])
        if residuals:
            optimizer.load_residuals(loaded["residuals"])
            assert optimizer.steps == steps[0]
    turns = 1000
    for _ in range(3):
        turn(model, optimizer)
    optimizer.finish()
    assert equal_everywhere(model)
    after.append(weights(model).clone())
assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])

# A script that just ends, at another time on each rank.
model = model_of()
optimizer = make(model)
for _ in range(3 + rank):
    turn(model, optimizer)
print("all well", flush=True)
