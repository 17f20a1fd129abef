"""Compressors in training on simulated workers: the same bits on all of them, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import BoundCompression, Compression, DistributedOptimizer
from hvd_ecsgd.compressors import (
    QSGD,
    Cast,
    GlobalRandomBlock,
    Identity,
    Natural,
    Sign,
    Threshold,
)
from hvd_ecsgd.exchange import AllGather, AllReduce, TwoPass
from hvd_ecsgd.feedback import ErrorFeedback, NoFeedback
from hvd_ecsgd.protocols import StepContext
from hvd_ecsgd.segments import Key
from hvd_ecsgd.transport import run_simulated
from tests.cases import ALL


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    made = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return made


def trained(
    n: int, make: Callable[[], Any], steps: int = 8, bucket_bytes: int = 2**20, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, BoundCompression]]:
    def worker(transport: Any) -> tuple[torch.Tensor, BoundCompression]:
        net = model(dtype)
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, net.named_parameters(), make(), transport=transport, bucket_bytes=bucket_bytes)
        for step in range(steps):
            x = torch.randn(5, 7, generator=torch.Generator().manual_seed(100 * step + transport.rank)).to(dtype)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()]), optimizer.compression

    return run_simulated(n, worker)


METHODS: dict[str, Callable[[], Any]] = {
    "threshold, all-gather": lambda: Compression.threshold(4, **ALL),
    "threshold, two-pass": lambda: Compression.double_squeeze(Threshold(4), **ALL),
    "threshold, two-pass, dense server": lambda: Compression.double_squeeze(Threshold(4), Identity(), **ALL),
    "signs, two-pass, threshold server": lambda: Compression.double_squeeze(Sign(), Threshold(4), **ALL),
    "global random block": lambda: Compression.global_random_block(4, 40, **ALL),
    "global random block, two-pass": lambda: Compression.double_squeeze(GlobalRandomBlock(4, 40), **ALL),
    "global random block, all-gather": lambda: Compression(GlobalRandomBlock(4, 40), ErrorFeedback(), AllGather(), **ALL),
    "random k": lambda: Compression.random_k(4, **ALL),
    "qsgd, two-pass": lambda: Compression.double_squeeze(QSGD(15, 64, "max"), Natural(), **ALL),
    "bf16": lambda: Compression.bf16(**ALL),
    "bf16, all-reduce": lambda: Compression(Cast(torch.bfloat16), exchange=AllReduce(), **ALL),
}


@pytest.mark.parametrize("what", METHODS)
def test_all_ranks_hold_the_same_bits_whatever_the_buckets(what: str) -> None:
    """Three workers, one bucket or one per parameter; pieces of some parameters are empty."""
    runs = [trained(3, METHODS[what], bucket_bytes=size) for size in (0, 2**20)]
    reference = runs[0][0][0]
    assert all(torch.equal(weights, reference) for run in runs for weights, _ in run)
    assert reference.isfinite().all()
    assert not torch.equal(reference, torch.cat([p.detach().flatten() for p in model().parameters()]))


@pytest.mark.parametrize("exchange", [AllGather(), TwoPass(Identity(), server_feedback=False)], ids=repr)
@pytest.mark.parametrize("compressor", [QSGD(1, 64), QSGD(7, 64, "max"), Natural()], ids=repr)
def test_private_draws_average_out(compressor: Any, exchange: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradient on n workers: the error of the mean has 1/n of a draw's exact variance. With draws that ranks share (control) it has all."""
    v = torch.randn(8192, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def error(n: int) -> float:
        def worker(transport: Any) -> float:
            p = torch.nn.Parameter(torch.zeros_like(v))
            method = Compression(compressor, NoFeedback(), exchange, **ALL)
            optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("p", p)], method, transport=transport)
            p.grad = v.clone()
            optimizer.step()
            return float((p.detach() + v).square().sum() / v.square().sum())

        return run_simulated(n, worker)[0]

    exact = 1 - compressor.delta(v)
    for n in (2, 8):
        assert error(n) == pytest.approx(exact / n, rel=0.15)
    monkeypatch.setattr(StepContext, "key", lambda self, compressor, stage, rank=None: Key(self.seed, self.step, None, stage, self.size))
    assert error(8) == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("what", [m for m in METHODS if "bf16" not in m])
def test_nothing_is_lost(what: str) -> None:
    """One step from zero residuals: mean update = mean gradient − mean e − E, to float64 rounding."""
    runs = trained(3, METHODS[what], steps=1, dtype=torch.float64)
    dense = trained(3, lambda: Compression.none(), steps=1, dtype=torch.float64)
    states = [bound.state_dict()["parameters"] for _, bound in runs]
    start = torch.cat([p.detach().flatten() for p in model(torch.float64).parameters()])
    held = torch.zeros_like(start)
    at = 0
    for name, p in model().named_parameters():
        part = held[at : at + p.numel()]
        for state in states:
            part += state[name]["residual"].flatten() / len(states)
        server = [state[name]["server_residual"].flatten() for state in states if "server_residual" in state[name]]
        if server:
            part += torch.cat(server)
        at += p.numel()
    assert held.any()
    torch.testing.assert_close(runs[0][0] - start - 0.05 * held, dense[0][0] - start, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(runs[0][0], dense[0][0]), "control: without the residuals it does not add up"
