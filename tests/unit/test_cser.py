"""CSER: its recursion as in the paper, line by line, and what the errors and resets must keep (docs/algorithms.md §3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock, TopK
from hvd_ecsgd.core.step import BucketStep
from hvd_ecsgd.exchange import AllReduce, ErrorReset
from hvd_ecsgd.feedback import CSER, ErrorFeedback
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import batch, flat, mlp, same_bits, simulate, slot, train
from tests.unit.test_invariants import LRS, N, largest_violation_of_z, mean, trajectory, vary


def make(period: int = 3) -> Compression:
    return Compression.cser(RandomBlock(8), RandomBlock(2), period, **ALL)


def split(named: list[tuple[str, torch.Tensor]], v: torch.Tensor, compressor: RandomBlock, seed: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(C(v), v − C(v)), parameter by parameter."""
    c, start = torch.zeros_like(v), 0
    for name, parameter in named:
        part = v[start : start + parameter.numel()].clone()
        segments, key = Segments.of([(name, part)]), Key(seed, t, None, "reduce")
        compressor.add_(c[start : start + parameter.numel()], compressor.extract_(part, segments, key), segments, key)
        start += parameter.numel()
    return c, v - c


def paper(period: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """(models, errors) of all workers after each step, with the paper's sign of the errors."""
    model = mlp(torch.float64)
    named: list[tuple[str, torch.Tensor]] = list(model.named_parameters())
    x = [flat(model.parameters())] * N
    err, m = [torch.zeros_like(x[0])] * N, [torch.zeros_like(x[0])] * N
    history = []
    for t, lr in enumerate(LRS):
        mu, wd = (0.9, 0.5, 0.95)[t % 3], (1e-3, 0.0, 1e-2)[t % 3]
        parts = []
        for i in range(N):
            torch.nn.utils.vector_to_parameters(x[i], model.parameters())
            inputs, labels = batch(i, t, torch.float64)
            g = flat(torch.autograd.grad(torch.nn.functional.cross_entropy(model(inputs), labels), list(model.parameters())))
            m[i] = mu * m[i] + g + wd * x[i]
            parts.append(split(named, lr * m[i], RandomBlock(8), 0, t))
        c = mean(part for part, _ in parts)
        x = [x[i] - c - parts[i][1] for i in range(N)]
        err = [err[i] - parts[i][1] for i in range(N)]
        if (t + 1) % period == 0:
            parts = [split(named, e, RandomBlock(2), 1, t) for e in err]
            c = mean(part for part, _ in parts)
            x = [x[i] - (err[i] - c - parts[i][1]) for i in range(N)]
            err = [r for _, r in parts]
        history.append((x, err))
    return history


def test_the_recursion_of_the_paper() -> None:
    """Models and errors of every worker, with η, μ and weight decay changing; x_i − err_i is equal on all. Another period (control): another run."""
    records, other = trajectory(make, LRS, momentum=0.9, change=vary), paper(2)
    for t, (x, err) in enumerate(paper(3)):
        assert same_bits(r.x for r in records[t])
        for i in range(N):
            assert (records[t][i].e + err[i]).abs().max() < 1e-12
            assert (records[t][i].x - (x[i] - err[i])).abs().max() < 1e-12
    assert (other[-1][0][0] - (records[-1][0].x - records[-1][0].e)).abs().max() > 1e-4


def test_the_mean_model_moves_as_momentum_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what C1 leaves (control) it does not."""
    assert largest_violation_of_z(trajectory(make, LRS, momentum=0.9, change=vary), LRS) < 1e-12
    monkeypatch.setattr(ErrorReset, "run", lambda self, task, transport: AllReduce().run(task, transport))
    assert largest_violation_of_z(trajectory(make, LRS, momentum=0.9, change=vary), LRS) > 1e-3


def test_resets_bring_the_models_together() -> None:
    """The models' distance from their mean falls with a reset; with C2 = everything they are equal after it."""

    def spread(period: int, reset: Any) -> list[float]:
        records = trajectory(lambda: Compression.cser(RandomBlock(8), reset, period, **ALL), (0.1,) * 8)
        return [max(float((r.e - mean(q.e for q in ranks)).norm()) for r in ranks) for ranks in records]

    assert spread(4, RandomBlock(1))[3] < 1e-12
    assert spread(4, RandomBlock(1))[2] > 1e-3
    resets, never = spread(4, RandomBlock(2)), spread(100, RandomBlock(2))
    assert resets[3] < 0.9 * never[3]
    assert resets[:3] == never[:3]


def test_bytes() -> None:
    """Two bytes more per element and reset: d/8 elements of 4 bytes in each of 6 steps, d/2 in two of them."""
    traffic = simulate(2, make, range(6), after=lambda model, optimizer, transport: optimizer.compression.traffic)[0]
    sizes = [p.numel() for p in mlp().parameters()]
    assert traffic.payload == traffic.sent == 4 * (6 * sum(max(1, d // 8) for d in sizes) + 2 * sum(max(1, d // 2) for d in sizes))


def test_what_it_refuses() -> None:
    with pytest.raises(CompressionError, match="ErrorReset"):
        Compression(RandomBlock(8), CSER(), AllReduce())
    with pytest.raises(CompressionError, match="only CSER"):
        Compression(RandomBlock(8), ErrorFeedback(), ErrorReset())
    with pytest.raises(CompressionError, match="reset_compressor"):
        ErrorReset(TopK)  # type: ignore[arg-type]
    for period in (0, -1, 2.0, True, None):
        with pytest.raises(CompressionError, match="period"):
            ErrorReset(period=period)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_undoing_an_uncompressed_step_keeps_the_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up begins while there are errors, by a switch; it sends changes, not errors. Control: that everything was sent is taken to mean that
    the residual is zero."""

    def errors_lost() -> float:
        def worker(transport: Transport) -> float:
            model = mlp(torch.float64)
            sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(50), transport=transport)
            train(model, optimizer, transport.rank, range(3))
            optimizer.compression.switch(Compression.cser(RandomBlock(8), RandomBlock(2), 50, warmup_steps=20, **ALL))
            train(model, optimizer, transport.rank, range(3, 5))
            before = slot(optimizer.compression, "residual").clone()
            assert before.any()
            x, y = batch(transport.rank, 5, torch.float64)
            optimizer.zero_grad()
            (torch.nn.functional.cross_entropy(model(x), y) * (float("nan") if transport.rank == 0 else 1.0)).backward()
            optimizer.step()
            return float((slot(optimizer.compression, "residual") - before).abs().max())

        return max(run_simulated(2, worker))

    assert errors_lost() == 0
    commit = BucketStep.commit

    def forgetful(self: BucketStep) -> None:
        commit(self)
        self.bucket.residual_is_zero = self.task.compressor.lossless

    monkeypatch.setattr(BucketStep, "commit", forgetful)
    assert errors_lost() > 1e-3
