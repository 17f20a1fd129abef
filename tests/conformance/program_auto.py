"""One rank of: `Compression.auto` chooses the same on all ranks, by real time.   program_auto.py mpi|horovod|ddp [FILE]"""

from __future__ import annotations

import sys
from typing import Any

import torch

from hvd_ecsgd import Compression
from tests.cases import ALL
from tests.problems import batch, mlp

backend = sys.argv[1]
model: Any = mlp()
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
method = Compression.auto(trial=3, **ALL)
if backend == "ddp":
    from hvd_ecsgd import ddp
    from tests.torch.meeting import meet

    rank, size = meet(sys.argv[2])
    model, optimizer = torch.nn.parallel.DistributedDataParallel(model), sgd
    compression = ddp.register(model, method).compression
else:
    import importlib

    hvd: Any = importlib.import_module({"mpi": "mpi_backend", "horovod": "horovod.torch"}[backend])
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    compression = method.bind(model)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=compression)
compression.attach(optimizer)
tuner = compression.tuner
assert tuner is not None


def step(number: int) -> None:
    inputs, labels = batch(rank, number)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def figures() -> list[Any]:
    return [(d.step, d.chosen, dict(d.seconds), d.why) for d in tuner.decisions]


# On two ranks, one of them slow in steps that are dense: so all compress, whatever the machine does.
real = tuner.times.clock
late = 0.0


def clock() -> float:
    return real() + late


tuner.times.clock = clock
for number in range(20):
    if rank == 1 and tuner.current == "none":
        late += 10.0
    step(number)
assert [d.step for d in tuner.decisions] == [10], figures()
assert tuner.decisions[0].chosen in ("fp16", "power_sgd") and tuner.current == tuner.decisions[0].chosen
assert {name for name, seconds in tuner.decisions[0].seconds.items() if seconds > 9} == {"none"}
assert repr(compression.method) == repr(tuner.candidates[tuner.current].method)

if backend == "mpi":  # a rank that has joined takes part, as it steps with the others
    tuner.begin("asked for", tuner.current)
    for number in range(20, 21 if rank == 0 else 32):
        step(number)
    hvd.join()
    assert [d.why for d in tuner.decisions] == ["training began", "asked for"], figures()

told = compression.transport.allgather(torch.tensor(list(repr(figures()).encode()), dtype=torch.uint8), "figures", None)
everyone = [bytes(t.tolist()) for t in told.wait()]
assert all(one == everyone[0] for one in everyone), everyone
parts = compression.transport.allgather(torch.cat([p.detach().flatten() for p in model.parameters()]), "weights", None).wait()
assert all(torch.equal(one, parts[0]) for one in parts)
print(f"rank {rank} of {size}: all right", flush=True)
