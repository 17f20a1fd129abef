"""CentralVR: its recursion, that a constant learning rate leads to the minimum with and without compression, and what it refuses."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from hvd_ecsgd import CentralVR, Compression, CompressionError
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL

N, BATCHES, D, LR = 3, 4, 6, 0.04


@cache
def task(rank: int, d: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Batches of least squares (a, b), which no x fits."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(BATCHES, 5, d, generator=generator, dtype=torch.float64), torch.randn(BATCHES, 5, generator=generator, dtype=torch.float64)


def gradient(rank: int, k: int, x: torch.Tensor) -> torch.Tensor:
    a, b = task(rank)
    return a[k].T @ (a[k] @ x - b[k]) / 5


def minimum() -> torch.Tensor:
    a, b = (torch.cat([task(r)[i] for r in range(N)]) for i in (0, 1))
    return torch.linalg.lstsq(a.reshape(-1, D), b.reshape(-1, 1)).solution.flatten()


def order(rank: int, epoch: int) -> list[int]:
    return torch.randperm(BATCHES, generator=torch.Generator().manual_seed(100 * epoch + rank)).tolist()


def run(make: Any, epochs: int, transport: Transport, *, stored: bool = True) -> tuple[torch.nn.Parameter, CentralVR]:
    x = torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))
    optimizer = CentralVR([("x", x)], LR, BATCHES, make(), transport)
    train(x, optimizer, range(epochs), transport.rank, stored=stored)
    return x, optimizer


def train(x: torch.nn.Parameter, optimizer: CentralVR, epochs: range, rank: int, *, stored: bool = True) -> None:
    for epoch in epochs:
        for k in order(rank, epoch):
            x.grad = gradient(rank, k, x.detach())
            optimizer.step(k)
            if not stored:
                optimizer.state[x]["seen"].zero_()
        optimizer.exchange()


def test_the_recursion() -> None:
    """By hand; and all workers hold the same x after an exchange. Without the table (control) it is another run."""
    x, mean, table = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64), torch.zeros(N, BATCHES, D, dtype=torch.float64)
    for epoch in range(3):
        p = [x.clone() for _ in range(N)]
        for i in range(N):
            for k in order(i, epoch):
                g = gradient(i, k, p[i])
                p[i] -= LR * (g - table[i, k] + mean)
                table[i, k] = g
        x, mean = torch.stack(p).mean(0), table.mean((0, 1))
    got = run_simulated(N, lambda t: run(lambda: Compression.none, 3, t)[0].detach().clone())
    assert all(torch.equal(g, got[0]) for g in got) and (got[0] - x).abs().max() < 1e-14
    plain = run_simulated(N, lambda t: run(lambda: Compression.none, 3, t, stored=False)[0].detach().clone())
    assert (plain[0] - x).abs().max() > 1e-3


METHODS = {
    "none": lambda: Compression.none,
    "random_block": lambda: Compression.random_block(2, **ALL),
    "fp16": lambda: Compression.fp16(error_feedback=True),
    "top_k": lambda: Compression.top_k(3, **ALL),
}


def test_a_constant_learning_rate_leads_to_the_minimum() -> None:
    """With the workers' different tasks, and compressed where all send the same places. The controls stay away from it: local steps of SGD, and
    places of each worker's own."""
    best = minimum()

    def distance(name: str, epochs: int = 100, stored: bool = True) -> float:
        return float((run_simulated(N, lambda t: run(METHODS[name], epochs, t, stored=stored)[0].detach() - best)[0]).norm())

    assert distance("none") < 3e-5 and distance("fp16") < 3e-5 and distance("random_block", 250) < 3e-5
    assert distance("none", stored=False) > 3e-3 and distance("top_k") > 3e-3


def test_it_sends_once_in_an_epoch() -> None:
    traffic = run_simulated(N, lambda t: run(lambda: Compression.none, 5, t)[1].compression.traffic)
    assert all(one.payload == 5 * 2 * 8 * D for one in traffic)


def test_it_goes_on_bit_for_bit() -> None:
    def broken(transport: Transport) -> tuple[torch.Tensor, torch.Tensor]:
        whole, _ = run(METHODS["top_k"], 6, transport)
        x, optimizer = run(METHODS["top_k"], 3, transport)
        saved = x.detach().clone(), optimizer.state_dict(), optimizer.compression.state_dict()
        again = torch.nn.Parameter(saved[0])
        optimizer = CentralVR([("x", again)], LR, BATCHES, METHODS["top_k"](), transport)
        optimizer.load_state_dict(saved[1])
        optimizer.compression.load_state_dict(saved[2])
        train(again, optimizer, range(3, 6), transport.rank)
        return whole.detach(), again.detach()

    for whole, resumed in run_simulated(N, broken):
        assert torch.equal(whole, resumed)


def test_batches_without_a_gradient_are_left_out() -> None:
    """With an inf or NaN, said once; the table and the model stay as they are."""
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = CentralVR([("x", x)], 0.1, 2)
    x.grad = torch.tensor([1.0, math.nan])
    with pytest.warns(RuntimeWarning, match="batch 1 holds an inf or NaN"):
        optimizer.step(1)
    optimizer.step(1)
    assert x.tolist() == [1.0, 1.0] and not optimizer.state[x]["seen"].any()
    x.grad = None
    optimizer.step(0)
    x.grad = torch.ones(2)
    optimizer.step(0)
    optimizer.exchange()
    assert x.tolist() == pytest.approx([0.9, 0.9]) and optimizer.state[x]["mean"].tolist() == [1.0, 1.0]


def test_what_it_refuses() -> None:
    x = torch.nn.Parameter(torch.ones(4))
    for batches in (0, -1, 2.0, True):
        with pytest.raises(CompressionError, match="batches must be how many batches"):
            CentralVR([("x", x)], 0.1, batches)  # type: ignore[arg-type]
    optimizer = CentralVR([("x", x)], 0.1, 2)
    for batch in (2, -1, 0.0, True, None):
        with pytest.raises(CompressionError, match="an integer from 0 to 1"):
            optimizer.step(batch)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="learning rate itself"):
        CentralVR([("x", x)], 0.1, 2, Compression.detached())
    with pytest.raises(CompressionError, match="that of 2 batches, and there are 3"):
        CentralVR([("x", x)], 0.1, 3).load_state_dict(optimizer.state_dict())
