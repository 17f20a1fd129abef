"""Every method that works on an unmodified Horovod: the same bits on all ranks, and the weights of the simulation of as many workers."""

from __future__ import annotations

import sys

import torch

from hvd_ecsgd import Compression
from hvd_ecsgd.protocols import Role
from tests.cases import CASES, Case, bound_method, by_name
from tests.horovod.programs import hvd, prefixed, run_checks, same_on_all, stock, train_stock
from tests.problems import mlp, simulate, weights

STEPS = 8
"""Of periods of 3 and 5 steps one and the beginning of another, and all of the schedules."""


def tolerance(case: Case) -> float:
    """n = 2: none. More: Horovod sums in another order than the simulation. Half precision is summed in half precision."""
    if not case.exact:
        return 5e-3
    return 0.0 if hvd.size() == 2 else 2e-5


def expected(case: Case, prefix: str) -> torch.Tensor:
    """The simulation; parameter names seed the random blocks, so they must be the same."""
    from hvd_ecsgd import DistributedOptimizer
    from hvd_ecsgd.transport import run_simulated
    from tests.problems import train

    def worker(transport: object) -> torch.Tensor:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum)
        optimizer = DistributedOptimizer(sgd, prefixed(model, prefix), case.make(), transport=transport)  # type: ignore[arg-type]
        train(model, optimizer, transport.rank, range(STEPS))  # type: ignore[attr-defined]
        return weights(model, optimizer.compression)

    return run_simulated(hvd.size(), worker)[0]


def check(case: Case) -> None:
    model = mlp()
    compression, feedback = case.make(), bound_method(case).feedback
    if Role.RESIDUAL in bound_method(case).slot_names or case.name not in ("none", "fp16"):
        compression = compression.bind(prefixed(model, case.name))
    optimizer = stock(model, compression, case.name, momentum=case.momentum)
    if feedback.takes.learning_rate:
        compression.attach(optimizer)
    train_stock(model, optimizer, range(STEPS))
    w = weights(model, compression if feedback.takes.update else None)
    assert same_on_all(w, case.name), "ranks hold different bits"
    if CASES.index(case) % hvd.size() != hvd.rank():
        return  # all hold the same bits: ranks take turns in simulating
    difference = (w - expected(case, case.name)).abs().max().item()
    assert difference <= tolerance(case), f"{difference} from the simulation, allowed {tolerance(case)}"


def controls() -> None:
    """What the comparison must notice: no feedback instead of feedback, another seed, another number of workers."""
    reference = simulate(hvd.size(), by_name("random_block").make, range(STEPS), weight_decay=0)[0]
    for other in (by_name("random_block-no_feedback").make, lambda: Compression.random_block(8, seed=1)):
        assert (simulate(hvd.size(), other, range(STEPS), weight_decay=0)[0] - reference).abs().max() > 1e-3
    assert (simulate(hvd.size() + 1, by_name("random_block").make, range(STEPS), weight_decay=0)[0] - reference).abs().max() > 1e-3


if __name__ == "__main__":
    hvd.init()
    names = sys.argv[1:]
    checks = {case.name: (lambda case=case: check(case)) for case in CASES if not names or case.name in names}  # type: ignore[misc]
    run_checks({**checks, "controls": controls})
