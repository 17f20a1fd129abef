"""DoubleSqueeze: the paper's comparison (ALGORITHMS §2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import DistributedOptimizer, double_squeeze_comparison
from hvd_ecsgd.compressors import Sign, TopK
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import same_bits

N = 3


# -- the paper's comparison -------------------------------------------------------------------------------------------------------

TARGETS = torch.randn(N, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SCALES = torch.logspace(-0.5, 0, 96, dtype=torch.float64)
"""Worker i minimises ½Σ_j h_j(x_j − t_ij)²; the mean's minimum is the mean target."""


LRS = [0.2] * 80 + [0.2 * 0.8**t for t in range(25)]


def descend(make: Callable[[], Any]) -> list[Any]:
    """Per rank: where gradient descent on the workers' quadratics arrives, and the traffic."""

    def worker(transport: Transport) -> Any:
        x = torch.nn.Parameter(torch.zeros(96, dtype=torch.float64))
        optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=LRS[0]), [("x", x)], make(), transport=transport)
        for lr in LRS:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            (0.5 * SCALES * (x - TARGETS[transport.rank]) ** 2).sum().backward()
            optimizer.step()
        return x.detach(), optimizer.compression.traffic

    return run_simulated(N, worker)


@pytest.mark.parametrize(("worker", "server"), [(TopK(4), None), (TopK(4), Sign())], ids=["top_k", "top_k-sign"])
def test_both_compensations_are_needed(worker: Any, server: Any) -> None:
    """On workers with different minima, with feedback on both sides (or a dense server) the minimum of the mean is found, nearly as without
    compression; what drops either one stays away from it. Bytes: DoubleSqueeze < MEM-SGD < vanilla."""
    comparison = double_squeeze_comparison(worker, server, **ALL)
    assert list(comparison) == ["vanilla", "uncompensated", "worker_only", "mem_sgd", "double_squeeze"]
    results = {name: descend(lambda c=c: c) for name, c in comparison.items()}
    assert all(same_bits(x for x, _ in ranks) for ranks in results.values())
    distance = {name: (ranks[0][0] - TARGETS.mean(0)).norm().item() for name, ranks in results.items()}
    payload = {name: ranks[0][1].payload for name, ranks in results.items()}
    assert distance["double_squeeze"] < 1.5 * distance["mem_sgd"] < 0.5
    assert min(distance["worker_only"], distance["uncompensated"]) > 2 * distance["double_squeeze"]
    assert distance["vanilla"] < 0.01, "control: it is the minimum"
    assert payload["double_squeeze"] < payload["mem_sgd"] < payload["vanilla"]
    assert payload["double_squeeze"] == payload["worker_only"] == payload["uncompensated"]
