"""`join` while optimizers step: ranks have different numbers of batches. With `different`, rank 0 has dropped an optimizer that the
others hold, with `dropped` one that they step; with `unthreaded`, there is no communication thread."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import mpi_backend as hvd
from hvd_ecsgd import DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.mpi.verdict import Verdict
from tests.problems import batch, flat, mlp, train, weights

verdict = Verdict()
hvd.init()
rank, size = hvd.rank(), hvd.size()
last = size - 1

METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: hvd.Compression.none,
    "double_squeeze": lambda: hvd.Compression.double_squeeze(dense_below=0, dense_1d=False),
    "detached": lambda: hvd.Compression.detached(8, verify_every=2),
    "cser": lambda: hvd.Compression.cser(),
}


def epochs(model: torch.nn.Module, optimizer: Any, r: int, join: Callable[[], int], after_step: Callable[[], object]) -> tuple[Any, list[int]]:
    """Rank r has 2r + 1 batches; then an epoch in which all have two; then one without rank 0. Who trains clamps the weights after each step.
    The weights, and what `join` said."""
    said = []
    for count in (2 * r + 1, 2, min(r, 1)):
        for t in range(count):
            train(model, optimizer, r, [t], lambda t: optimizer.param_groups[0].update(lr=0.1 / (1 + t)))
            with optimizer.compression.at("averaged"), torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.4, 0.4)
            after_step()
        said.append(join())
    return weights(model, optimizer.compression), said


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def simulated(make: Callable[[], Any]) -> torch.Tensor:
    def worker(transport: Transport) -> torch.Tensor:
        model = mlp()
        optimizer = DistributedOptimizer(sgd(model), model.named_parameters(), make(), transport=transport)
        return epochs(model, optimizer, transport.rank, optimizer.join, lambda: None)[0]

    return run_simulated(size, worker)[0]


if "different" in sys.argv:
    models = [mlp(), mlp()]
    optimizers = [hvd.DistributedOptimizer(sgd(m), m.named_parameters()) for m in models]
    if rank == 0:
        del optimizers[1], models[1]  # the hooks of its parameters keep an optimizer
    hvd.join()
    raise SystemExit("it went on")

if "dropped" in sys.argv:
    networks = {"kept": mlp(), "dropped": mlp()}
    held = {k: hvd.DistributedOptimizer(sgd(m), [(f"{k}.{n}", p) for n, p in m.named_parameters()]) for k, m in networks.items()}
    for name, network in networks.items():
        train(network, held[name], rank, range(2))
    if rank == 0:
        del held["dropped"]
    else:
        train(networks["kept"], held["kept"], rank, range(2))
        print(f"fails at {time.time()}", flush=True)
        train(networks["dropped"], held["dropped"], rank, range(2))
    hvd.join()
    raise SystemExit("it went on")

if "unthreaded" in sys.argv:
    model = mlp()
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    train(model, optimizer, rank, range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verdict.expect(hvd.join() in range(size), "all ranks join after equal numbers of steps")
    said = ["waits for all ranks in every step" in str(w.message) for w in caught]
    verdict.expect(said == [True] * (size > 1), f"join() without threads: {[str(w.message) for w in caught]}")
    verdict.conclude()
    sys.exit()

for name, make in METHODS.items():
    model = mlp()
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), make())
    # A metric is averaged after every step, as scripts do, by the ranks that still train.
    x, joined = epochs(model, optimizer, rank, hvd.join, lambda: hvd.allreduce(torch.ones(1), name="metric"))
    verdict.same_bits(x, f"{name}: weights")
    verdict.expect(joined[0] == last and (joined[2] != 0 or size == 1), f"{name}: the last to join were {joined}")
    rates = hvd.allgather(torch.tensor([optimizer.param_groups[0]["lr"]], dtype=torch.float64))
    verdict.expect(bool((rates == rates[0]).all()), f"{name}: learning rates {rates}")
    expected = simulated(make)
    if size <= 2:
        verdict.equal(x, expected, f"{name}: as simulated")
    else:
        verdict.expect(torch.allclose(x, expected, rtol=1e-4, atol=1e-5), f"{name}: differs from the simulation by {(x - expected).abs().max()}")

# Two models in one backward pass, the second of which steps first, and sometimes alone; one of a process set.
a, b, c = mlp(), mlp(), mlp()
pair = hvd.add_process_set([0, 1]) if size > 2 else hvd.global_process_set
optimizer_a = hvd.DistributedOptimizer(sgd(a), a.named_parameters(), hvd.Compression.double_squeeze())
optimizer_b = hvd.DistributedOptimizer(sgd(b), b.named_parameters(), hvd.Compression.power_sgd(2))
optimizer_c = hvd.DistributedOptimizer(sgd(c), c.named_parameters(), process_set=pair)
for t in range(3 * rank):
    optimizer_a.zero_grad()
    optimizer_b.zero_grad()
    x, y = batch(rank, t)
    loss = torch.nn.functional.cross_entropy(b(x), y)
    if t % 3 != 1:
        loss = loss + torch.nn.functional.cross_entropy(a(x), y)
    loss.backward()
    optimizer_b.step()
    if t % 3 != 1:
        optimizer_a.step()
for t in range(rank % 2):
    train(c, optimizer_c, rank, [t])
if rank == last and size > 1:
    time.sleep(1.7)  # the others tell which optimizers they have dropped: those of above, as everybody has
verdict.expect(hvd.join() == last, "the last rank has the most batches")
for model, what in ((a, "a"), (b, "b")):
    verdict.same_bits(weights(model), f"two models: {what}")
if size > 1:
    verdict.expect(not torch.equal(flat(a.parameters()), flat(mlp().parameters())), "rank 0 has taken part without a batch")
    everyones = hvd.allgather(weights(c)[None])
    verdict.expect(torch.equal(everyones[0], everyones[1]) and not torch.equal(everyones[0], weights(mlp())), "process set: its members have stepped")
    verdict.expect(all(torch.equal(w, weights(mlp())) for w in everyones[2:]), "process set: others have not")
if size > 1:
    a(batch(rank, 0)[0]).sum().backward()
    verdict.raises(ValueError, hvd.join, "join() with gradients under way", "call it after step()")
    optimizer_a.step()
    verdict.expect(hvd.join() in range(size), "the refused join() was none")
    verdict.same_bits(weights(a), "after a refused join()")
hvd.shutdown()
hvd.init()
verdict.expect(hvd.join() in range(size), "optimizers from before shutdown() are not waited for")
verdict.conclude()
