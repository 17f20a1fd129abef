"""Butterfly mixing: its recursion line by line, what it keeps, and how far a worker's news have come (docs/algorithms.md §3)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock, Sign, TopK
from hvd_ecsgd.exchange import AllReduce, Butterfly
from hvd_ecsgd.feedback import CSER, ErrorFeedback
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import batch, flat, mlp, same_bits, simulate, slot
from tests.unit.test_invariants import LRS, N, largest_violation_of_z, mean, trajectory, vary


def mixed(size: int, steps: range) -> torch.Tensor:
    """How much of each worker's model (columns) is in each one's (rows) after these steps."""
    share = torch.eye(size, dtype=torch.float64)
    for t in steps:
        w = torch.zeros(size, size, dtype=torch.float64)
        for r in range(size):
            to, source = Butterfly.partners(r, size, t)
            assert Butterfly.partners(to, size, t)[1] == r != to  # who is sent to expects it
            w[r, r] += 0.5
            w[r, source] += 0.5
        share = w @ share
    return share


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 16, 17])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_after_as_many_steps_as_the_logarithm_everybody_has_of_everybody(size: int, first: int) -> None:
    """Equal shares where n is a power of two. One step earlier (control) some have nothing of some. The mean is kept at all times."""
    rounds = math.ceil(math.log2(size))
    share = mixed(size, range(first, first + rounds))
    assert (share > 0).all() and share.sum(0).allclose(torch.ones(size, dtype=torch.float64))
    assert (mixed(size, range(first, first + rounds - 1)) == 0).any()
    if size & (size - 1) == 0:
        assert (share == 1 / size).all()


def by_hand(period: int) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """(x, models) after each step, uncompressed: p_i = (p_i + p_j)/2 − ηm_i, and in meetings the mean of p_i − ηm_i."""
    model = mlp(torch.float64)
    start = flat(model.parameters())
    x, p, m = start, [start] * N, [torch.zeros_like(start)] * N
    history = []
    for t, lr in enumerate(LRS):
        mu, wd = (0.9, 0.5, 0.95)[t % 3], (1e-3, 0.0, 1e-2)[t % 3]
        for i in range(N):
            torch.nn.utils.vector_to_parameters(p[i], model.parameters())
            inputs, labels = batch(i, t, torch.float64)
            g = flat(torch.autograd.grad(torch.nn.functional.cross_entropy(model(inputs), labels), list(model.parameters())))
            m[i] = mu * m[i] + g + wd * p[i]
        if (t + 1) % period == 0:
            x = mean(p[i] - lr * m[i] for i in range(N))
            p = [x] * N
        else:
            p = [(p[i] + p[(i - (1, 2)[t % 2]) % N]) / 2 - lr * m[i] for i in range(N)]
        history.append((x, p))
    return history


def test_the_recursion() -> None:
    """Models of every worker, with η, μ and weight decay changing. Another period (control): another run."""
    records, other = trajectory(lambda: Compression.butterfly(period=3, **ALL), LRS, momentum=0.9, change=vary), by_hand(2)
    for t, (x, p) in enumerate(by_hand(3)):
        assert same_bits(r.x for r in records[t])
        for i in range(N):
            assert (records[t][i].x - x).abs().max() < 1e-12
            assert (records[t][i].x - records[t][i].e - p[i]).abs().max() < 1e-12
    assert (other[-1][1][0] - (records[-1][0].x - records[-1][0].e)).abs().max() > 1e-4


def test_the_mean_model_moves_as_momentum_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compressor leaves. Control: what a worker gives to its partner stays with it, too."""
    for make in (lambda: Compression.butterfly(Sign(), 4, **ALL), lambda: Compression.butterfly(TopK(8), 100, **ALL)):
        assert largest_violation_of_z(trajectory(make, LRS, momentum=0.9, change=vary), LRS) < 1e-12
    add = TopK.add_

    def keeps(self: TopK, out: Any, payload: Any, segments: Any, key: Any, alpha: float = 1.0) -> None:
        add(self, out, payload, segments, key, max(alpha, 0.0))

    monkeypatch.setattr(TopK, "add_", keeps)
    assert largest_violation_of_z(trajectory(make, LRS, momentum=0.9, change=vary), LRS) > 1e-3


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_one_workers_nan_undoes_the_step_on_all() -> None:
    """Also on those that it sends nothing to. A step without (control) stands on all."""

    def worker(transport: Transport) -> list[bool]:
        model = mlp(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.butterfly(**ALL), transport=transport)
        stayed = []
        for t in range(4):
            before = slot(optimizer.compression, "residual").clone()
            x, y = batch(transport.rank, t, torch.float64)
            optimizer.zero_grad()
            (torch.nn.functional.cross_entropy(model(x), y) * (math.nan if (transport.rank, t) == (0, 2) else 1.0)).backward()
            optimizer.step()
            stayed.append(torch.equal(before, slot(optimizer.compression, "residual")))
        return stayed

    assert run_simulated(5, worker) == [[False, False, True, False]] * 5


def test_bytes() -> None:
    """One message of the model in each step, to one worker, and an all-reduce in each fourth; four bytes beside each."""
    traffic = simulate(
        4, lambda: Compression.butterfly(period=4, **ALL), range(8), after=lambda model, optimizer, transport: optimizer.compression.traffic
    )
    sizes, buckets = 4 * sum(p.numel() for p in mlp().parameters()), 1
    for one in traffic:
        assert one.payload == 6 * sizes + 2 * sizes + 8 * 4 * buckets
        assert one.sent == 6 * sizes + 2 * (2 * 3 * sizes // 4) + 8 * (2 * 3 * 4 // 4) * buckets


def test_what_it_refuses() -> None:
    with pytest.raises(CompressionError, match="Butterfly"):
        Compression(RandomBlock(8), CSER(), AllReduce())
    with pytest.raises(CompressionError, match="only CSER"):
        Compression(TopK(), ErrorFeedback(), Butterfly())
    for period in (0, -1, 2.0, True, None):
        with pytest.raises(CompressionError, match="period"):
            Butterfly(period=period)  # type: ignore[arg-type]
