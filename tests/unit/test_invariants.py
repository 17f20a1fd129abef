"""The equations that error feedback must obey, in float64 on three simulated workers (docs/algorithms.md §2, §3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock
from hvd_ecsgd.feedback import CSER, LocalMomentum, MemSGD
from hvd_ecsgd.protocols import StepContext
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids
from tests.problems import batch, flat, mlp, same_bits, slot, weights

N = 3
LRS = (0.1, 0.1, 0.02, 0.3, 0.001, 0.05, 0.05, 0.2)
CONSTANT = (0.1,) * 8

GRADIENT_UNITS = [c for c in CASES if bound_method(c).feedback.unit == "gradient"]
UPDATE_UNITS = [c for c in CASES if isinstance(bound_method(c).feedback, LocalMomentum | CSER)]
HELD_BACK = [*UPDATE_UNITS, *(c for c in CASES if isinstance(bound_method(c).feedback, MemSGD))]


@dataclass
class Record:
    """One worker's quantities after a step; `gradient` and `moment` are those of the step that led here."""

    x: torch.Tensor
    e: torch.Tensor
    server: dict[str, torch.Tensor]
    gradient: torch.Tensor
    moment: torch.Tensor


def trajectory(
    make: Callable[[], Any], lrs: Sequence[float], momentum: float = 0.0, weight_decay: float = 0.0, change: Any = None
) -> list[list[Record]]:
    """records[t][rank], after step t. `change(optimizer, t)` may change hyper-parameters before step t."""

    def worker(transport: Transport) -> list[Record]:
        model = mlp(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=lrs[0], momentum=momentum, weight_decay=weight_decay)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
        compression, records = optimizer.compression, []
        for t, lr in enumerate(lrs):
            optimizer.param_groups[0]["lr"] = lr
            if change:
                change(optimizer, t)
            optimizer.zero_grad()
            inputs, labels = batch(transport.rank, t, torch.float64)
            gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(model(inputs), labels), list(model.parameters()))
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            e, m = slot(compression, "residual"), slot(compression, "momentum")
            records.append(Record(weights(model, compression), e, pieces(compression), flat(gradients), m))
        return records

    by_rank = run_simulated(N, worker)
    return [list(step) for step in zip(*by_rank, strict=True)]


def mean(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).mean(0)


def pieces(compression: Any) -> dict[str, torch.Tensor]:
    """What this rank holds of E, by parameter."""
    saved = compression.state_dict()["parameters"]
    return {n: entry["server_residual"] for n, entry in saved.items() if "server_residual" in entry}


def whole(servers: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """E of the whole model, of every rank's pieces."""
    named = list(mlp(torch.float64).named_parameters())
    return flat(torch.cat([s[n] for s in servers]) if n in servers[0] else torch.zeros_like(p) for n, p in named)


def server_residual(ranks: list[Record]) -> torch.Tensor:
    return whole([r.server for r in ranks])


def largest_violation(records: list[list[Record]], lrs: Sequence[float], unit: Sequence[float] | None = None) -> float:
    """Of y⁺ = y − η·mean g with y = x − η(E + mean e). The residuals are worth `unit`; the learning rate they were made with by default."""
    x = flat(mlp(torch.float64).parameters())
    y, worst = x, 0.0
    for ranks, lr, worth in zip(records, lrs, unit or lrs, strict=True):
        expected = y - lr * mean(r.gradient for r in ranks)
        y = ranks[0].x - worth * (server_residual(ranks) + mean(r.e for r in ranks))
        worst = max(worst, (y - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("case", [c for c in GRADIENT_UNITS if c.conserves], ids=ids)
def test_nothing_is_lost_in_gradient_units(case: Case) -> None:
    """y = x − η(E + mean e) moves as uncompressed SGD, also when η changes; it does not in some of the steps."""
    records = trajectory(case.make, LRS)
    assert all(same_bits(r.x for r in ranks) for ranks in records)
    assert largest_violation(records, LRS) < 1e-13


@pytest.mark.parametrize("name", ["top_k", "random_block", "double_squeeze"])
def test_without_the_ratio_of_learning_rates_it_is_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a residual that is added back as it is breaks the invariant, but only when η changes."""
    monkeypatch.setattr(StepContext, "carry", property(lambda self: 1.0))
    assert largest_violation(trajectory(by_name(name).make, CONSTANT), CONSTANT) < 1e-13
    assert largest_violation(trajectory(by_name(name).make, LRS), LRS) > 1e-3


@pytest.mark.parametrize("name", ["top_k", "double_squeeze", "double_squeeze-central"])
def test_with_the_next_learning_rate_it_is_lost(name: str) -> None:
    """Control: between steps a residual is worth the learning rate of the step that made it, not of the one to come."""
    records = trajectory(by_name(name).make, LRS)
    assert largest_violation(records, LRS) < 1e-13
    assert largest_violation(records, LRS, unit=(*LRS[1:], LRS[-1])) > 1e-3


@pytest.mark.parametrize("name", ["top_k-no_feedback", "double_squeeze-worker_only", "double_squeeze-uncompensated"])
def test_without_feedback_it_is_lost(name: str) -> None:
    """Control: methods that forget what they did not send violate the invariant."""
    assert largest_violation(trajectory(by_name(name).make, CONSTANT), CONSTANT) > 1e-3


# -- update units ----------------------------------------------------------------------------------------------------------------


def vary(optimizer: Any, t: int) -> None:
    optimizer.param_groups[0]["momentum"] = (0.9, 0.5, 0.95)[t % 3]
    optimizer.param_groups[0]["weight_decay"] = (1e-3, 0.0, 1e-2)[t % 3]


def largest_violation_of_z(records: list[list[Record]], lrs: Sequence[float]) -> float:
    """Of z⁺ = z − η·mean m with z = x − mean e (and the server's E, which is in update units here)."""
    z, worst = flat(mlp(torch.float64).parameters()), 0.0
    for ranks, lr in zip(records, lrs, strict=True):
        expected = z - lr * mean(r.moment for r in ranks)
        z = ranks[0].x - mean(r.e for r in ranks) - server_residual(ranks)
        worst = max(worst, (z - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("case", UPDATE_UNITS, ids=ids)
def test_nothing_is_lost_in_update_units(case: Case) -> None:
    """z = x − mean e obeys z⁺ = z − η·mean m with η, μ and weight decay changing; x is equal on all ranks."""
    records = trajectory(case.make, LRS, momentum=0.9, change=vary)
    assert all(same_bits(r.x for r in ranks) for ranks in records)
    assert largest_violation_of_z(records, LRS) < 1e-12


def test_the_invariant_of_z_notices_a_wrong_learning_rate() -> None:
    """Control: with the rates of the steps before, the identity is far off."""
    records = trajectory(by_name("local_momentum").make, LRS, momentum=0.9, change=vary)
    assert largest_violation_of_z(records, (LRS[0], *LRS[:-1])) > 1e-3


@pytest.mark.parametrize(("lambda_", "period", "average_errors"), [(0.0, 1, None), (0.3, 1, None), (1.0, 1, 2), (0.3, 3, None), (0.0, 2, 4)])
def test_detached_error_feedback_is_the_recursion(lambda_: float, period: int, average_errors: int | None) -> None:
    """docs/algorithms.md §3, line by line in plain tensors: p, g, m, u, c, e, x (to 1e-12 over 8 steps, with η, μ, wd changing)."""
    records = trajectory(
        lambda: Compression.detached(8, lambda_, period=period, average_errors=average_errors, **ALL), LRS, momentum=0.9, change=vary
    )
    model = mlp(torch.float64)
    named = list(model.named_parameters())
    compressor = RandomBlock(8)
    x = flat(model.parameters())
    e, m = [torch.zeros_like(x) for _ in range(N)], [torch.zeros_like(x) for _ in range(N)]
    points = [x] * N
    for t, lr in enumerate(LRS):
        mu, wd = (0.9, 0.5, 0.95)[t % 3], (1e-3, 0.0, 1e-2)[t % 3]
        sent = []
        for i in range(N):
            p = points[i]
            torch.nn.utils.vector_to_parameters(p, model.parameters())
            inputs, labels = batch(i, t, torch.float64)
            g = flat(torch.autograd.grad(torch.nn.functional.cross_entropy(model(inputs), labels), list(model.parameters())))
            m[i] = mu * m[i] + (g + wd * p)
            u = e[i] + lr * m[i]
            if (t + 1) % period:
                e[i], points[i] = u, p - lr * m[i]
                continue
            c, start = torch.zeros_like(u), 0
            for name, parameter in named:
                part = u[start : start + parameter.numel()].clone()
                segments = Segments.of([(name, part)])
                payload = compressor.extract_(part, segments, Key(0, t, None, "reduce"))
                compressor.add_(c[start : start + parameter.numel()], payload, segments, Key(0, t, None, "reduce"))
                start += parameter.numel()
            e[i] = u - c
            sent.append(c)
        if sent:
            if average_errors and (t + 1) % average_errors == 0:
                e = [mean(e)] * N
            x = x - mean(sent)
            points = [x - lambda_ * e[i] for i in range(N)]
        assert (records[t][0].x - x).abs().max().item() < 1e-12
        assert max((records[t][i].e - e[i]).abs().max().item() for i in range(N)) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_detaching_compensates_with_the_hessian(lambda_: float, momentum: float) -> None:
    """On a quadratic u = η·∇F(x) + A·e with A = I − λη(H + wd·I) and ∇F including wd·x, also when η changes. Momentum (control) breaks it."""
    d, wd = 24, 0.1
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    hessian, b = root @ root.T, torch.randn(d, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(torch.randn(d, generator=generator, dtype=torch.float64))
    sgd = torch.optim.SGD([p], lr=0.1, momentum=momentum, weight_decay=wd)
    optimizer = DistributedOptimizer(sgd, [("p", p)], Compression.detached(6, lambda_, **ALL))
    x, e, worst = p.detach().clone(), torch.zeros(d, dtype=torch.float64), 0.0
    for lr in LRS:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (0.5 * p @ hessian @ p - b @ p).backward()
        optimizer.step()
        u = lr * (hessian @ x - b + wd * x) + e - lambda_ * lr * (hessian @ e + wd * e)
        x_now, e_now = weights(torch.nn.ParameterList([p]), optimizer.compression), slot(optimizer.compression, "residual")
        worst = max(worst, (x - x_now + e_now - u).abs().max().item())  # c + e⁺ = u
        x, e = x_now, e_now
    assert worst < 1e-14 if momentum == 0 else worst > 1e-2


def test_lambda_zero_is_local_momentum_bit_for_bit() -> None:
    a = trajectory(lambda: Compression.local_momentum(8), LRS, momentum=0.9, change=vary)
    b = trajectory(lambda: Compression.detached(8, 0.0), LRS, momentum=0.9, change=vary)
    c = trajectory(lambda: Compression.detached(8, 0.3), LRS, momentum=0.9, change=vary)
    assert all(torch.equal(p[0].x, q[0].x) and torch.equal(p[0].e, q[0].e) for p, q in zip(a, b, strict=True))
    assert not torch.equal(a[-1][0].x, c[-1][0].x)


# -- a learning rate of zero -----------------------------------------------------------------------------------------------------

PAUSE = (0.1, 0.1, 0.0, 0.0, 0.02, 0.05)


@pytest.mark.parametrize("case", [c for c in CASES if not c.draws and (c.slots or c.server_slots)], ids=ids)
def test_a_step_with_learning_rate_zero_sends_nothing_and_keeps_the_units(case: Case) -> None:
    """The run is bit for bit the one without these steps: parameters, residuals, and bytes sent."""

    def run(lrs: Sequence[float]) -> list[Any]:
        def worker(transport: Transport) -> Any:
            model = mlp()
            optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), case.make(), transport=transport)
            t = 0
            for lr in lrs:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                x, y = batch(transport.rank, t)
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                t += lr > 0  # the same batch again after a pause
            c = optimizer.compression
            return weights(model, c), slot(c, "residual"), slot(c, "momentum"), c.traffic.payload

        return run_simulated(2, worker)

    with_pause, without = run(PAUSE), run([lr for lr in PAUSE if lr])
    for a, b in zip(with_pause, without, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[2], b[2])
        assert a[3] == b[3] > 0


def test_a_small_learning_rate_is_not_a_pause() -> None:
    """Control: with η = 1e-6 instead of 0 the same runs differ, in bytes and residuals."""
    a = trajectory(by_name("top_k").make, (0.1, 1e-6, 0.1))
    b = trajectory(by_name("top_k").make, (0.1, 0.1))
    assert not torch.equal(a[-1][0].e, b[-1][0].e)


def test_training_may_begin_with_learning_rate_zero() -> None:
    """Warm-up from 0: no division by zero, no NaN, nothing moves."""
    lrs = (0.0, 0.0, 0.1, 0.05)
    records = trajectory(by_name("top_k").make, lrs)
    assert torch.equal(records[1][0].x, flat(mlp(torch.float64).parameters()))
    assert not records[1][0].e.any()
    assert largest_violation(records[2:], lrs[2:]) < 1e-13


# -- where the model is evaluated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HELD_BACK, ids=ids)
def test_points_of_evaluation(case: Case) -> None:
    """`averaged` is x, equal everywhere; `virtual` is x − mean e − E; `local` is x − λe, as held. Training goes on as if not looked at."""
    feedback = bound_method(case).feedback
    lambda_, period = (1.0, 1) if isinstance(feedback, CSER) else (getattr(feedback, "lambda_", 0.0), getattr(feedback, "period", 1))

    def run(looking: bool) -> list[Any]:
        def worker(transport: Transport) -> Any:
            model = mlp(torch.float64)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum)
            optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport)
            points: dict[str, torch.Tensor] = {}
            for t in range(6):
                optimizer.zero_grad()
                x, y = batch(transport.rank, t, torch.float64)
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                if looking:
                    held = flat(model.parameters())
                    for point in ("averaged", "virtual", "local"):
                        with optimizer.compression.at(point):
                            points[point] = flat(model.parameters())
                    assert torch.equal(held, flat(model.parameters())), "the parameters are put back"
                    points |= {"held": held, "displacement": slot(optimizer.compression, "displacement")}
            return weights(model, optimizer.compression), points, slot(optimizer.compression, "residual"), pieces(optimizer.compression)

        return run_simulated(N, worker)

    seen, unseen = run(True), run(False)
    mean_error, server = mean(e for _, _, e, _ in seen), whole([s for *_, s in seen])
    for (x, points, e, _), (x_unseen, _, e_unseen, _) in zip(seen, unseen, strict=True):
        assert torch.equal(x, seen[0][0])
        assert torch.equal(x, x_unseen)
        assert torch.equal(e, e_unseen)
        assert torch.equal(points["averaged"], x)
        assert torch.equal(points["local"], points["held"])
        torch.testing.assert_close(points["virtual"], x - mean_error - server, rtol=0, atol=1e-13)
        displacement = lambda_ * e if period == 1 else points["displacement"]
        torch.testing.assert_close(points["local"], x - displacement, rtol=0, atol=1e-13)
    if bound_method(case).compressor.lossless:
        return
    assert mean_error.abs().max().item() > 1e-4, "control: the points differ"
    assert (server.abs().max().item() > 1e-4) == bool(case.server_slots), "control: and servers hold something"


def test_methods_in_gradient_units_are_where_they_are() -> None:
    """`averaged` and `local` do nothing, `virtual` is refused, and so are unknown points; also after an exception inside."""

    def worker(transport: Transport) -> None:
        model = mlp()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(), transport=transport
        )
        torch.nn.functional.cross_entropy(model(batch(0, 0)[0]), batch(0, 0)[1]).backward()
        optimizer.step()
        held = flat(model.parameters())
        for point in ("averaged", "local"):
            with pytest.raises(KeyError), optimizer.compression.at(point):
                assert torch.equal(held, flat(model.parameters()))
                raise KeyError
        with pytest.raises(ValueError, match="update-unit"), optimizer.compression.at("virtual"):
            pass
        with pytest.raises(ValueError, match="averaged"), optimizer.compression.at("elsewhere"):
            pass
        assert torch.equal(held, flat(model.parameters()))

    run_simulated(2, worker)
