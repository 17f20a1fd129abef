"""One of four ranks in two nodes (MPI_BACKEND_NODES=2), each of which is one worker. Arguments: the methods to try; by default one of each kind."""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

import mpi_backend as hvd
from hvd_ecsgd import Compression, DisagreementError, DistributedOptimizer, GradientExchange, load_checkpoint, save_checkpoint
from hvd_ecsgd.errors import CheckpointError, TransportError
from hvd_ecsgd.transport import run_simulated
from mpi_backend.transport import Link, NodesTransport, nodes_of
from tests.cases import CASES, bound_method, by_name
from tests.mpi.verdict import Verdict
from tests.problems import batch, flat, mlp, slot, train, weights

verdict = Verdict()
world = MPI.COMM_WORLD
rank, node = world.rank, world.rank // 2
everybody = NodesTransport(Link(world, nodes_of(world, "2")))
workers = everybody.workers
verdict.expect((everybody.rank, everybody.size, workers.rank, workers.size) == (rank, 4, node, 2), "who is who")

# ---- collectives: of each worker, as if it were one rank
for dtype, length in itertools.product((torch.float32, torch.bfloat16, torch.int64), (0, 1, 2, 5, 700_001)):
    what, ones = f"{length} of {dtype}", torch.arange(length).remainder(7)
    mine = [(ones * (n + 1)).to(dtype) for n in range(2)]
    verdict.equal(workers.allreduce_(mine[node].clone(), "x").wait(), (3 * ones).to(dtype), f"all-reduce of {what}")
    for sizes in (None, [length, length + 3]):
        given = torch.cat([mine[node], torch.full((3 * node,), 5, dtype=dtype)])
        gathered = workers.allgather(given, "x", sizes).wait()
        verdict.equal(torch.cat(gathered), torch.cat([*mine, torch.full((3,), 5, dtype=dtype)]), f"all-gather of {what}")
    swapped = workers.alltoall(mine[node], [length // 3, length - length // 3], "x").wait()
    verdict.equal(swapped[1 - node], mine[1 - node].split([length // 3, length - length // 3])[node], f"all-to-all of {what}")
    verdict.equal(workers.broadcast_(mine[node].clone(), 1, "x").wait(), mine[1], f"broadcast of {what}")
    if dtype.is_floating_point:
        inside = workers.average_inside_((ones * (1 + 2 * (rank % 2))).to(dtype), "x").wait()
        verdict.equal(inside, (2 * ones).to(dtype), f"mean inside of {what}")
verdict.raises(TransportError, lambda: workers.average_inside_(torch.ones(2, dtype=torch.int64), "n"), "integers", "'n'", "floats")


# ---- methods: the bits of two workers that are given the means
def gradients(r: int, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * r + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in mlp().named_parameters()}


def exchanged(transport: Any, case: Any, ranks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    model = mlp()
    options = {"lr": 0.1, "momentum": case.momentum} if bound_method(case).feedback.takes.update else {"lr": 0.1}
    exchange = GradientExchange(model.named_parameters(), case.make(), transport, **options)
    for step in range(4):
        first, *others = [gradients(r, step) for r in ranks]
        for name in first:
            for other in others:
                first[name] += other[name]
            first[name] /= len(ranks)
        for name, mean in exchange.reduce(first).items():
            model.get_parameter(name).data.sub_(mean, alpha=0.1)
    return weights(model, exchange.compression), slot(exchange.compression, "residual")


SOME = "fp16 random_block-everything double_squeeze-central-threshold-global_random_block comp_skip-norm cser-everything power_sgd-own-everything"
for case in CASES:
    if case.name not in (sys.argv[1:] or [*SOME.split(), "detached-local_steps-average_errors"]):
        continue
    real = exchanged(everybody, case, (rank,))
    expected = run_simulated(2, lambda t, case=case: exchanged(t, case, (2 * t.rank, 2 * t.rank + 1)))[node]  # type: ignore[misc]
    verdict.equal(real[0], expected[0], f"weights of {case.name}")
    verdict.equal(real[1], expected[1], f"residuals of {case.name}")

alone, one = NodesTransport(Link(world, nodes_of(world, "1"))), NodesTransport(Link(world, nodes_of(world, "hosts")))
verdict.expect((alone.workers.size, one.workers.size, one.workers.rank) == (4, 1, 0), "nodes of one rank, and one node of all")
for transport in (alone, one):  # the control: what is compressed is a mean already, or what each rank has
    real = exchanged(transport, by_name("one_bit"), (rank,))[0]
    everyones = [tuple(range(4))] if transport is one else [(r,) for r in range(4)]
    expected = run_simulated(len(everyones), lambda t, of=everyones: exchanged(t, by_name("one_bit"), of[t.rank])[0])[0]  # type: ignore[misc]
    verdict.equal(real, expected, f"weights of {transport.workers.size} workers")

# ---- an optimizer: what its ranks hold, what one of them alone would do, and checkpoints
warnings.simplefilter("ignore")
hvd.init()
model = mlp()
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=Compression.double_squeeze())
train(model, optimizer, rank, range(3))
verdict.same_bits(flat(model.parameters()), "after three steps")
residuals = world.allgather(slot(optimizer.compression, "residual"))
verdict.equal(residuals[2 * node], residuals[2 * node + 1], "the residual is the node's")
verdict.expect(not torch.equal(residuals[0], residuals[2]), "the control: the nodes' residuals differ")
verdict.expect(optimizer.compression.state_dict()["size"] == 2, "two workers have state")

before, state = flat(model.parameters()).clone(), slot(optimizer.compression, "residual").clone()
x, y = batch(rank, 3)
torch.nn.functional.cross_entropy(model(x * (float("inf") if rank == 1 else 1.0)), y).backward()
optimizer.step()
verdict.equal(flat(model.parameters()), before, "an inf on one rank of one node undoes the step on all")
verdict.expect((slot(optimizer.compression, "residual") - state).abs().max().item() < 1e-5, "and takes it back from the residual")
optimizer.zero_grad()

with tempfile.TemporaryDirectory() as own:
    folder = Path(world.bcast(own)) / "checkpoint"
    save_checkpoint(folder, model, optimizer, optimizer.compression)
    train(model, optimizer, rank, range(4, 6))
    after = flat(model.parameters()).clone()
    load_checkpoint(folder, model, optimizer, optimizer.compression)
    train(model, optimizer, rank, range(4, 6))
    verdict.equal(flat(model.parameters()), after, "training goes on from a checkpoint")
    if rank == 0:  # with one rank
        alone = mlp()
        single = DistributedOptimizer(torch.optim.SGD(alone.parameters(), lr=0.1), alone.named_parameters(), Compression.double_squeeze())
        refused = lambda: load_checkpoint(folder, alone, single, single.compression)  # noqa: E731
        verdict.raises(CheckpointError, refused, "another number of ranks", "4 ranks, 2 workers", "1 ranks, 1 workers", "nodes of the same size")
    world.Barrier()

other = mlp()
differs = hvd.DistributedOptimizer(
    torch.optim.SGD(other.parameters(), lr=0.1), other.named_parameters(), compression=Compression.top_k(10 + rank % 2)
)
verdict.raises(
    DisagreementError,
    lambda: train(other, differs, rank, range(1)),
    "other settings inside of a node",
    "rank 0 has TopK(ratio=10",
    "rank 1 has TopK(ratio=11",
)
hvd.shutdown()
verdict.conclude()
