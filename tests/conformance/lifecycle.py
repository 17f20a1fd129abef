"""What the checks of program_lifecycle.py share: optimizers of the backend that sys.argv[1] names, and a run against simulated workers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.transport import run_simulated
from tests.cases import bound_method, by_name
from tests.problems import batch, flat, mlp, weights

BACKENDS = {"mpi": "mpi_backend", "horovod": "horovod.torch"}


METHODS = ("random_block-everything", "top_k-k", "double_squeeze-everything", "detached")
"""In an all-reduce, an all-gather, in two passes; and one that applies the update itself, at shifted parameters."""


BACKEND = sys.argv[1]


hvd: Any = importlib.import_module(BACKENDS[BACKEND])


Build = Callable[[torch.nn.Module, str, str], Any]
"""(model, method, prefix of names) → the distributed optimizer, attached."""


def compression_of(method: str, **changes: Any) -> Compression:
    made = by_name(method).make()
    made.method = replace(bound_method(by_name(method)), **changes)
    return made  # type: ignore[no-any-return]


def prefixed(model: torch.nn.Module, prefix: str) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{prefix}/{n}", p) for n, p in model.named_parameters()]


def real(model: torch.nn.Module, method: str, prefix: str, scaler: Any = None, changes: Any = None, **options: Any) -> Any:
    named = prefixed(model, prefix)
    bound = compression_of(method, **(changes or {})).bind(named)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=named, compression=bound, **options)
    bound.attach(optimizer, scaler)
    optimizer.bound = bound
    return optimizer


def everywhere(t: torch.Tensor, what: str) -> list[torch.Tensor]:
    return list(hvd.allgather(t.detach().contiguous().view(1, -1), name=f"everywhere.{what}"))


def check_run(name: str, run: Callable[[torch.nn.Module, Any, int], object], make: Callable[[], torch.nn.Module] = mlp, **options: Any) -> None:
    """`run(model, optimizer, rank)` with every method: the same bits on all ranks, and (on two) those of simulated workers."""

    def simulated(method: str, transport: Any) -> torch.Tensor:
        model = make()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        own = DistributedOptimizer(sgd, prefixed(model, f"{name}.{method}"), compression_of(method), transport=transport, **options)
        own.bound = own.compression
        run(model, own, transport.rank)
        return weights(model, own.compression)

    found = {}
    for method in METHODS:
        model = make()
        optimizer = real(model, method, f"{name}.{method}", **options)
        run(model, optimizer, hvd.rank())
        found[method] = weights(model, optimizer.bound)
        assert not torch.equal(found[method], flat(make().parameters())), f"{name}.{method}: nothing was trained"
    check_simulated(name, found, simulated)


def check_simulated(name: str, found: Mapping[str, torch.Tensor], simulated: Callable[[str, Any], torch.Tensor]) -> None:
    """By method: all ranks found the same bits, and (on two) those of `simulated(method, transport)`. Each rank simulates a share of the methods."""
    for i, (method, w) in enumerate(found.items()):
        assert all(torch.equal(w, other) for other in everywhere(w, f"{name}.{method}")), f"{name}.{method}: ranks hold different bits"
        if i % hvd.size() == hvd.rank():
            off = (w - run_simulated(hvd.size(), partial(simulated, method))[0]).abs().max().item()
            assert off <= (0.0 if hvd.size() == 2 else 2e-5), f"{name}.{method}: {off} from the simulation"


def backward(model: Any, rank: int, step: int) -> None:
    x, y = batch(rank, step)
    torch.nn.functional.cross_entropy(model(x), y).backward()
