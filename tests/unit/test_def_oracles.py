"""What DEF must equal (docs/algorithms.md §3, oracles): EF and SAEF to the bit, and on a quadratic, without momentum, compensation with a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import Cast, RandomBlock, TopK
from hvd_ecsgd.exchange import AllGather
from hvd_ecsgd.feedback import LocalMomentum
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import slot, weights

N, D, WD = 3, 24, 0.01
LRS = (0.05, 0.05, 0.01, 0.15, 0.001, 0.02, 0.02, 0.1)


def quadratic(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(H_i, b_i) of F_i(x) = ½xᵀH_i x − b_iᵀx."""
    generator = torch.Generator().manual_seed(20 + i)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return root @ root.T / D, torch.randn(D, generator=generator, dtype=torch.float64)


def split(u: torch.Tensor, compressor: Any, t: int, i: int, total: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(C(u), u − C(u)) as worker i in step t draws it. `total`: add C(u)/N to this, as the exchange does, rounding once."""
    e, c = u.clone(), torch.zeros_like(u)
    segments, key = Segments.of([("x", e)]), Key(0, t, None if compressor.shared_key else i, "gather", N)
    payload = compressor.extract_(e, segments, key)
    compressor.add_(c, payload, segments, key)
    if total is not None:
        compressor.add_(total, payload, segments, key, 1.0 / N)
    return c, e


def trained(compressor: Any, lambda_: float, momentum: float) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """x and all e_i after each step, as the implementation has them."""

    def worker(transport: Transport) -> list[Any]:
        x = torch.nn.Parameter(torch.ones(D, dtype=torch.float64))
        sgd = torch.optim.SGD([x], lr=LRS[0], momentum=momentum, weight_decay=WD)
        method = Compression(compressor, LocalMomentum(lambda_), AllGather(), **ALL)
        optimizer = DistributedOptimizer(sgd, [("x", x)], method, transport=transport)
        h, b = quadratic(transport.rank)
        seen = []
        for lr in LRS:
            optimizer.param_groups[0]["lr"] = lr
            x.grad = h @ x.detach() - b
            optimizer.step()
            seen.append((weights(torch.nn.ParameterList([x]), optimizer.compression), slot(optimizer.compression, "residual")))
        return seen

    return [(ranks[0][0], [e for _, e in ranks]) for ranks in zip(*run_simulated(N, worker), strict=True)]


def difference(a: list[Any], b: list[Any]) -> float:
    return max((x - y).abs().max().item() for (x, xs), (y, ys) in zip(a, b, strict=True) for x, y in zip([x, *xs], [y, *ys], strict=True))


@pytest.mark.parametrize(("lambda_", "name"), [(0.0, "EF"), (1.0, "SAEF")])
def test_the_ends_of_lambda_are_ef_and_saef_bit_for_bit(lambda_: float, name: str) -> None:
    """Error feedback that knows no λ, and its step-ahead form at x − e, in the same order of operations. λ between them (control) is neither."""
    x, e, m = torch.ones(D, dtype=torch.float64), [torch.zeros(D, dtype=torch.float64)] * N, [torch.zeros(D, dtype=torch.float64)] * N
    expected = []
    for t, lr in enumerate(LRS):
        sent = torch.zeros(D, dtype=torch.float64)
        for i in range(N):
            h, b = quadratic(i)
            p = x if name == "EF" else x - e[i]
            m[i] = (m[i] * 0.9 + (h @ p - b)).add(p, alpha=WD)
            _, e[i] = split(e[i].add(m[i], alpha=lr), TopK(6), t, i, sent)
        x = x - sent
        expected.append((x, list(e)))
    assert difference(trained(TopK(6), lambda_, 0.9), expected) == 0.0
    assert difference(trained(TopK(6), 0.5, 0.9), expected) > 1e-3


def compensated(compressor: Any, lambda_: float, momentum: float, gradient_units: bool) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """u = η∇F_i(x) + A_i e with A_i = I − λη(H_i + wd·I), ∇F_i at x; or the same in gradient units, û = ∇F_i(x) + (η_{t−1}/η_t)·A_i ê, e = η ê."""
    x, e, m = torch.ones(D, dtype=torch.float64), [torch.zeros(D, dtype=torch.float64)] * N, [torch.zeros(D, dtype=torch.float64)] * N
    history, before = [], LRS[0]
    for t, lr in enumerate(LRS):
        sent = []
        for i in range(N):
            h, b = quadratic(i)
            a = torch.eye(D, dtype=torch.float64) - lambda_ * lr * (h + WD * torch.eye(D, dtype=torch.float64))
            m[i] = momentum * m[i] + h @ x - b + WD * x
            c, e[i] = split(m[i] + before / lr * (a @ e[i]) if gradient_units else lr * m[i] + a @ e[i], compressor, t, i)
            sent.append(lr * c if gradient_units else c)
        x, before = x - torch.stack(sent).mean(0), lr
        history.append((x, [lr * r for r in e] if gradient_units else list(e)))
    return history


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("compressor", [RandomBlock(4), TopK(6)], ids=str)
def test_without_momentum_it_is_error_compensation_with_a_matrix(compressor: Any, lambda_: float) -> None:
    """On a quadratic, with η changing, in update and in gradient units. With momentum it is not, and neither with another λ (controls)."""
    ours = trained(compressor, lambda_, 0.0)
    for gradient_units in (False, True):
        assert difference(ours, compensated(compressor, lambda_, 0.0, gradient_units)) < 1e-12
    if lambda_:
        assert difference(trained(compressor, lambda_, 0.9), compensated(compressor, lambda_, 0.9, False)) > 1e-3
        assert difference(ours, compensated(compressor, lambda_ / 2, 0.0, False)) > 1e-3


def test_gradient_units_need_a_compressor_that_scales() -> None:
    """C(av) = aC(v) is false of rounding to bfloat16: equal in update units, another run in gradient units."""
    ours = trained(Cast(torch.bfloat16), 0.3, 0.0)
    assert difference(ours, compensated(Cast(torch.bfloat16), 0.3, 0.0, False)) < 1e-12
    assert difference(ours, compensated(Cast(torch.bfloat16), 0.3, 0.0, True)) > 1e-6
