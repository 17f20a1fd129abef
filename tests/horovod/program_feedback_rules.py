"""Rules with momentum inside, on the stock optimizer: the bits of the simulation, and momentum in one place only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock, TopK
from hvd_ecsgd.exchange import Bernoulli, CompSkip, Every, NormBased, SkipAllReduce
from hvd_ecsgd.feedback import DistEFSGD, ErrorFeedback
from hvd_ecsgd.transport import run_simulated
from tests.horovod.programs import run_checks
from tests.problems import batch, flat, mlp

ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
INSIDE: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}

METHODS: dict[str, Callable[[], Compression]] = {
    "dist_ef_sgd": lambda: Compression.dist_ef_sgd(**INSIDE, **ALL),
    "comp_skip": lambda: Compression.comp_skip(Bernoulli(0.5), Bernoulli(0.6), **INSIDE, **ALL),
    "comp_skip-every": lambda: Compression.comp_skip(Every(3), Every(2), TopK(5), **INSIDE),
    "comp_skip-norm": lambda: Compression.comp_skip(NormBased(3.0), NormBased(2.0), **INSIDE, **ALL),
    "skip_all_reduce": lambda: Compression(RandomBlock(4), DistEFSGD(**INSIDE), SkipAllReduce(Every(2)), **ALL),
}


def train(model: Any, optimizer: Any, rank: int) -> torch.Tensor:
    for t in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
        optimizer.zero_grad()
        x, y = batch(rank, t)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return flat(model.parameters())


def stock(name: str, bound_to: Compression, attach: bool = True, **sgd: Any) -> tuple[Any, Any]:
    model = mlp()
    named = [(f"{name}/{n}", p) for n, p in model.named_parameters()]
    bound = bound_to.bind(named)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, **sgd)
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=named, compression=bound)
    if attach:
        bound.attach(optimizer)
    return model, optimizer


def check(name: str, make: Callable[[], Compression]) -> None:
    def worker(transport: Any) -> torch.Tensor:
        model = mlp()
        named = [(f"{name}/{n}", p) for n, p in model.named_parameters()]
        return train(
            model,
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named, make(), transport=transport, bucket_bytes=0),
            transport.rank,
        )

    model, optimizer = stock(name, make())
    w = train(model, optimizer, hvd.rank())
    everywhere = hvd.allgather(w.view(1, -1), name=f"check.{name}")
    assert all(torch.equal(row, w) for row in everywhere), "ranks hold different bits"
    simulated = run_simulated(hvd.size(), worker)[0]
    assert (w - simulated).abs().max() <= (0.0 if hvd.size() == 2 else 2e-5), (w - simulated).abs().max()
    assert not torch.equal(w, flat(mlp().parameters()))


def refused(message: str, run: Callable[[], object]) -> None:
    try:
        run()
    except CompressionError as error:
        assert message in str(error), error
        return
    raise AssertionError(f"expected an error about {message}")


def mistakes() -> None:
    refused("attach(optimizer)", lambda: train(*stock("no attach", METHODS["dist_ef_sgd"](), attach=False), hvd.rank()))
    refused("at the same time", lambda: stock("twice", METHODS["dist_ef_sgd"](), momentum=0.9))
    refused("attach(optimizer)", lambda: train(*stock("reading", Compression.dist_ef_sgd(), attach=False), hvd.rank()))
    skipping = Compression(TopK(5), ErrorFeedback(), CompSkip(Every(1), Every(2)), **ALL)
    refused("this step is skipped", lambda: train(*stock("skip", skipping, momentum=0.9), hvd.rank()))
    model, optimizer = stock("later", METHODS["dist_ef_sgd"]())
    train(model, optimizer, hvd.rank())
    optimizer.param_groups[0]["momentum"] = 0.9
    refused("at the same time", lambda: train(model, optimizer, hvd.rank()))


if __name__ == "__main__":
    hvd.init()
    checks: dict[str, Callable[[], None]] = {name: (lambda n=name, m=make: check(n, m)) for name, make in METHODS.items()}
    checks["mistakes"] = mistakes
    run_checks(checks)
