"""Hessian-aided error compensation: the table of docs/algorithms.md §6, changing learning rates, diagonals, and what the rule refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import Identity, RandomBlock, Rounding, TopK
from hvd_ecsgd.core.aggregator import Aggregator
from hvd_ecsgd.core.state import MethodState
from hvd_ecsgd.exchange import AllReduce, CompSkip, Every
from hvd_ecsgd.feedback import ErrorFeedback, GradientSquares, HessianAided, Hutchinson, LocalMomentum, Matrix, NoFeedback, Product
from hvd_ecsgd.horovod.slot import HorovodSlot
from hvd_ecsgd.horovod.transport import SlotHandle
from hvd_ecsgd.protocols import Accumulated, Feedback, GroupSettings, Part, StepContext, zeros
from hvd_ecsgd.reproduce.lockstep import Quadratics, descend
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import ALL
from tests.problems import batch, flat, mlp, slot, weights


def matrices(problem: Quadratics, which: str) -> Callable[[int], Feedback]:
    """The rows of the table."""
    return {
        "0": lambda i: NoFeedback(),
        "I": lambda i: ErrorFeedback(),
        "I - ηH_i": lambda i: HessianAided(Matrix({"x": problem.h[i]})),  # a local matrix given out as the global one
        "I - ηH": lambda i: HessianAided(Matrix({"x": problem.mean_h})),
        "I - ηH_i, mean e": lambda i: HessianAided(Matrix({"x": problem.h[i]}, local=True)),
        "product, mean e": lambda i: HessianAided(Product(lambda vectors: {"x": problem.h[i] @ vectors["x"]})),
        "product, global": lambda i: HessianAided(Product(lambda vectors: {"x": problem.mean_h @ vectors["x"]}, local=False)),
    }[which]


# row → |x − x*|, |z − x*| for n=1, n=5 with one H, n=5 with different H; None: exact, and so below 1e-9 by the last step
TABLE: dict[str, tuple[tuple[float, float | None], ...]] = {
    "0": ((0.74, 0.74), (0.18, 0.18), (0.040, 0.040)),
    "I": ((0.053, 0.038), (0.030, 0.024), (0.036, 0.026)),
    "I - ηH_i": ((0.034, None), (0.018, None), (0.051, 0.031)),
    "I - ηH": ((0.034, None), (0.018, None), (0.031, None)),
    "I - ηH_i, mean e": ((0.034, None), (0.018, None), (0.031, None)),
    "product, mean e": ((0.034, None), (0.018, None), (0.031, None)),
}


def columns(row: str) -> list[Any]:
    """Five workers with one H are, but for a local matrix given out as the global one, between the columns beside them: with --full."""
    shown = list(zip((1, 5, 5), (True, True, False), TABLE[row], strict=True))
    taken = shown[2:] if row.startswith("product") else shown
    return [pytest.param(row, *column, marks=pytest.mark.full if column[:2] == (5, True) and row != "I - ηH_i" else ()) for column in taken]


@pytest.mark.parametrize(("row", "n", "same", "expected"), [c for row in TABLE for c in columns(row)])
def test_the_table(row: str, n: int, same: bool, expected: tuple[float, float | None]) -> None:
    """Exact entries as near as plain descent comes in so many steps, the others within a factor of three; the rows are each other's controls."""
    problem = Quadratics(n, same=same)
    x, z = descend(problem, matrices(problem, row), 1400 if expected[1] is None else 600)
    assert expected[0] / 3 < x < expected[0] * 3
    if expected[1] is None:
        assert z < 1e-9
    else:
        assert expected[1] / 3 < z < expected[1] * 3


@pytest.mark.parametrize("k", [20, pytest.param(10, marks=pytest.mark.full)])
def test_plain_feedback_is_exact_too_where_errors_are_relative(k: int) -> None:
    """Top-k of 40, exact gradients, one worker: x and z reach the optimum, to 1e-13. Not with two (the control), nor with rounding (the table)."""

    def distances(n: int, row: str = "I", steps: int = 2500 if k == 20 else 4000) -> tuple[float, float]:
        problem = Quadratics(n, same=False)
        return descend(problem, matrices(problem, row), steps, TopK(k=k))

    assert max(distances(1)) < 5e-13
    assert max(distances(1, "I - ηH")) < 5e-13
    assert min(distances(2, steps=600)) > 1e-3


def test_the_hessian_bears_what_plain_feedback_does_not() -> None:
    """A tenth of the entries, at η = 2/(μ + L): with H it converges, without (control) it diverges; at 0.7 of this η both converge."""
    problem = Quadratics(1)
    results = {
        (row, share): descend(problem, matrices(problem, row), 2000, TopK(k=4), rate=lambda t, share=share: share * problem.eta)[0]  # type: ignore[misc]
        for row in ("I", "I - ηH")
        for share in (0.7, 1.0)
    }
    assert results.pop(("I", 1.0)) > 1e3
    assert max(results.values()) < 1e-9


def violation(which: str, forget_ratio: bool = False) -> float:
    """Largest of |z⁺ − (z − η∇f(z))| in 60 steps with a learning rate that changes in each, z_t = x_t − η_{t−1}·mean e_t, relative to |z|."""
    problem = Quadratics(3, same=False)
    z, worst = [problem.start], [0.0]

    def look(t: int, eta: float, x: torch.Tensor, residuals: list[torch.Tensor]) -> None:
        expected = z[0] - eta * problem.mean_h @ (z[0] - problem.best)
        z[0] = x - eta * torch.stack(residuals).mean(0)
        worst[0] = max(worst[0], ((z[0] - expected).norm() / z[0].norm()).item())

    def rule(i: int) -> Feedback:
        made = matrices(problem, which)(i)
        return Forgetful(made.curvature) if forget_ratio and isinstance(made, HessianAided) else made

    rates = (1.0, 0.3, 1.0, 0.05, 0.7, 0.7)
    descend(problem, rule, 60, rate=lambda t: problem.eta * rates[t % 6], watch=look)
    return worst[0]


class Forgetful(HessianAided):
    """Without the ratio of learning rates."""

    def accumulate_(self, part: Part, gradients: Any, ctx: StepContext) -> Accumulated:
        return super().accumulate_(part, gradients, StepContext(ctx.seed, ctx.step, settings=ctx.settings))


@pytest.mark.parametrize("which", ["I - ηH", "I - ηH_i, mean e", "product, mean e", "product, global"])
def test_z_is_gradient_descent_whatever_the_learning_rate_does(which: str) -> None:
    assert violation(which) < 1e-14


def test_the_recursion_of_z_notices_what_is_wrong() -> None:
    """Controls: plain error feedback, local matrices without ē, and the ratio of learning rates left out."""
    assert violation("I") > 1e-3
    assert violation("I - ηH_i") > 1e-3
    assert violation("I - ηH", forget_ratio=True) > 1e-3


# -- diagonals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_diagonal_helps_where_h_is_nearly_diagonal_and_harms_where_it_is_rotated(seed: int) -> None:
    """n = 1, Hutchinson's estimate against plain error feedback; where one helps the other is the control."""

    def distances(problem: Quadratics) -> tuple[float, float]:
        def estimated(i: int) -> Feedback:
            return HessianAided(Hutchinson(lambda vectors: {"x": problem.mean_h @ vectors["x"]}, 0.98))

        return descend(problem, estimated, 1100)[1], descend(problem, matrices(problem, "I"), 1100)[1]

    near, plain = distances(Quadratics(1, rotated=False, off_diagonal=0.01, seed=seed))
    assert near < plain / 3, (near, plain)
    rotated, plain = distances(Quadratics(1, seed=seed))
    assert rotated > 2 * plain, (rotated, plain)


def train(make: Callable[[], Any], n: int, steps: int = 40, dtype: torch.dtype = torch.float64) -> list[Any]:
    """(diagonals, mean of the workers' squared gradients by step) of the small network, by rank."""

    def worker(transport: Transport) -> Any:
        model = mlp(dtype)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), make(), transport=transport)
        squares = []
        for t in range(steps):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, dtype)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            squares.append(flat(p.grad for p in model.parameters()).square())
            optimizer.step()
        saved = optimizer.compression.state_dict()["parameters"]
        return flat(saved[n]["diagonal"] for n, _ in model.named_parameters()), squares, flat(model.parameters())

    return run_simulated(n, worker)


def test_hutchinsons_diagonal_is_global_and_right() -> None:
    """Three workers with different products: the same bits everywhere, the mean of their diagonals; from a product that is not diagonal too."""

    def rank_of(vectors: Any) -> int:
        import threading

        return int(threading.current_thread().name.removeprefix("worker-"))

    def diagonal(vectors: Any) -> Any:
        return {name: (1.0 + rank_of(vectors)) * v for name, v in vectors.items()}

    def rotated(vectors: Any) -> Any:
        return {name: 2.0 * v + 0.01 * v.sum() for name, v in vectors.items()}

    exact = train(lambda: Compression.hessian_aided(Hutchinson(diagonal, 0.5), **ALL), 3)
    assert all(torch.equal(r[0], exact[0][0]) for r in exact)
    torch.testing.assert_close(exact[0][0], torch.full_like(exact[0][0], 2.0), rtol=1e-11, atol=0)
    local = train(lambda: Compression.hessian_aided(Hutchinson(lambda v: {n: 3.0 * u for n, u in v.items()}, 0.5), **ALL), 3)
    assert not torch.allclose(local[0][0], exact[0][0]), "control"
    noisy = train(lambda: Compression.hessian_aided(Hutchinson(rotated, 0.95), **ALL), 3, steps=120)
    assert (noisy[0][0].mean() - 2.01).abs() < 0.1
    assert noisy[0][0].std() > 1e-3, "control: this one is estimated"


DIMENSIONS = 200


def diagonals(n: int, hutchinson: Callable[[int], Hutchinson], steps: int) -> list[torch.Tensor]:
    """Rank 0's diagonal after each step of n workers."""

    def worker(transport: Transport) -> list[torch.Tensor]:
        x = torch.nn.Parameter(torch.zeros(DIMENSIONS, dtype=torch.float64))
        method = Compression.hessian_aided(hutchinson(transport.rank), **ALL)
        optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=0.01), [("x", x)], method, transport=transport)
        seen = []
        for _ in range(steps):
            x.grad = torch.ones_like(x)
            optimizer.step()
            seen.append(slot(optimizer.compression, "diagonal"))
        return seen

    return run_simulated(n, worker)[0]


def test_every_worker_draws_signs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the variance of a sample of the diagonal, Σ_{k≠j} H_jk² with one worker, falls as 1/n. With shared signs (control) it does not."""
    root = torch.randn(DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    h, decay, steps = root + root.T, 0.5, 12

    def variance(n: int) -> float:
        """Relative to what one worker's should be."""
        drawn: list[list[torch.Tensor]] = [[] for _ in range(n)]

        def made(rank: int) -> Hutchinson:
            return Hutchinson(lambda vectors: drawn[rank].append(vectors["x"].clone()) or {"x": h @ vectors["x"]}, decay)

        kept = diagonals(n, made, steps)
        samples = [(after - decay * before) / (1 - decay) for before, after in zip([torch.zeros(DIMENSIONS), *kept], kept, strict=False)]
        for rank in range(1, n):
            assert any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[rank], strict=True)) == shared
        assert all(bool((z.abs() == 1).all()) for signs in drawn for z in signs)
        squares = torch.stack([(sample - h.diagonal()).square() for sample in samples])
        return float(squares.sum() / (h.square().sum() - h.diagonal().square().sum()) / steps)

    shared = False
    assert variance(1) == pytest.approx(1, abs=0.25)
    assert variance(4) == pytest.approx(1 / 4, abs=0.25 / 4)
    shared, generator = True, Key.generator
    monkeypatch.setattr(Key, "generator", lambda self, *arguments: generator(replace(self, rank=None), *arguments))
    assert variance(4) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_hutchinsons_diagonal_is_an_exponential_mean_from_zero(every: int) -> None:
    """Of k equal samples c it is c·(1 − decayᵏ), one from every `every`-th step, from the first on. Another decay (control) is another value."""
    c, decay = torch.linspace(-2, 5, DIMENSIONS, dtype=torch.float64), 0.9
    kept = diagonals(1, lambda rank: Hutchinson(lambda vectors: {"x": c * vectors["x"]}, decay, every), 7)
    for t, h in enumerate(kept):
        torch.testing.assert_close(h, c * (1 - decay ** (t // every + 1)), rtol=1e-13, atol=1e-15)
        assert not torch.allclose(h, c * (1 - 0.89 ** (t // every + 1)), rtol=1e-3)


@pytest.mark.parametrize("curvature", [Hutchinson(lambda v: v), GradientSquares()], ids=["hutchinson", "squares"])
def test_a_diagonal_never_makes_a_residual_grow(curvature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor is (η_{t−1}/η_t)(1 − ηh) with ηh cut to [0, 2]; inside that range h is taken as it is. Unclamped (control), entries grow."""
    x = torch.zeros(6, dtype=torch.float64)
    segments, rule = Segments.of([("x", x)]), HessianAided(curvature)

    def factors() -> list[float]:
        state = zeros(rule.slots(segments), segments)
        state["residual"].fill_(1.0)
        state["diagonal"].copy_(torch.tensor([-3.0, 0.0, 0.5, 2.0, 4.0, 10.0]))
        ctx = StepContext(0, 1, settings=GroupSettings(0.5), unit=0.5, previous_unit=0.25)
        kept: list[float] = rule.accumulate_(Part(state, [x], segments), [x], ctx).buffer.tolist()
        return kept

    assert factors() == [0.5, 0.5, 0.375, 0.0, -0.5, -0.5]
    monkeypatch.setattr(type(curvature), "correction", lambda self, part, lr: part.state["diagonal"] * part.state["residual"])
    assert factors() == [1.25, 0.5, 0.375, 0.0, -0.5, -2.0]


def test_gradient_squares_are_the_mean_of_all_workers() -> None:
    results = train(lambda: Compression.hessian_aided(GradientSquares(4.0, 0.9), **ALL), 3)
    expected = torch.zeros_like(results[0][0])
    for squares in zip(*(r[1] for r in results), strict=True):
        expected = 0.9 * expected + 0.1 * 4.0 * torch.stack(squares).mean(0)
    assert all(torch.equal(r[0], results[0][0]) for r in results)
    torch.testing.assert_close(results[0][0], expected, rtol=1e-12, atol=1e-18)
    assert not torch.allclose(results[0][0], expected * 1.01), "control"


# -- the whole way: optimizer, buckets, transport --------------------------------------------------------------------------------


class Coupled(torch.nn.Module):
    """½(x − b)ᵀH(x − b) in two parameters, of which the second is small and travels uncompressed; H couples them."""

    def __init__(self, rank: int, same: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(11 + rank)
        root = torch.randn(50, 50, generator=torch.Generator().manual_seed(7) if same else g, dtype=torch.float64) / 10
        self.hessian = root @ root.T + torch.eye(50, dtype=torch.float64)
        self.target = torch.randn(50, generator=g, dtype=torch.float64) * 50
        self.large = torch.nn.Parameter(torch.ones(8, 5, dtype=torch.float64))
        self.small = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))

    def loss(self) -> torch.Tensor:
        off = torch.cat([self.large.flatten(), self.small]) - self.target
        return 0.5 * off @ self.hessian @ off

    def product(self, vectors: Any) -> Any:
        """By double backward, as for a network."""
        parameters = dict(self.named_parameters())
        gradients = torch.autograd.grad(self.loss(), list(parameters.values()), create_graph=True)
        inner = sum((g * vectors[name]).sum() for g, name in zip(gradients, parameters, strict=True))
        return dict(zip(parameters, torch.autograd.grad(inner, list(parameters.values())), strict=True))


def coupled_violation(make: Callable[[Coupled], Any], same: bool = False) -> float:
    """|z⁺ − (z − η∇f(z))| in 12 steps of three workers under changing learning rates."""
    rates = (0.3, 0.3, 0.05, 0.4, 0.1, 0.1) * 2

    def worker(transport: Transport) -> Any:
        model = Coupled(transport.rank, same)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), make(model), transport=transport)
        seen = []
        for eta in rates:
            optimizer.param_groups[0]["lr"] = eta
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
            e = slot(optimizer.compression, "residual")
            seen.append((weights(model, optimizer.compression), e if optimizer.compression.method.feedback.unit == "gradient" else e / eta))
        return model, seen

    results = run_simulated(3, worker)
    h = torch.stack([m.hessian for m, _ in results]).mean(0)
    c = torch.stack([m.hessian @ m.target for m, _ in results]).mean(0)
    z, worst = torch.ones(50, dtype=torch.float64), 0.0
    for t, eta in enumerate(rates):
        expected = z - eta * (h @ z - c)
        z = results[0][1][t][0] - eta * torch.stack([seen[t][1] for _, seen in results]).mean(0)
        worst = max(worst, (z - expected).abs().max().item())
    return worst


def test_a_product_through_the_optimizer_is_exact_also_in_parameters_that_travel_uncompressed() -> None:
    def made(feedback: Feedback) -> Compression:
        return Compression(Rounding(8.0), feedback, dense_below=20)

    assert coupled_violation(lambda m: made(HessianAided(Product(m.product)))) < 1e-11
    assert coupled_violation(lambda m: made(ErrorFeedback())) > 0.1, "control: plain error feedback"
    assert coupled_violation(lambda m: made(HessianAided(Matrix({"large": m.hessian[:40, :40]}, local=True)))) > 0.01, "control: without coupling"


def test_what_a_skip_holds_back_is_corrected_too() -> None:
    """Where workers skip there are residuals without a lossy compressor. Controls: plain error feedback, and one's own e for the mean."""

    def made(feedback: Feedback) -> Compression:
        return Compression(Identity(), feedback, CompSkip(Every(2)), dense_below=20)

    assert coupled_violation(lambda m: made(HessianAided(Product(m.product)))) < 1e-11
    assert coupled_violation(lambda m: made(ErrorFeedback())) > 0.1
    assert coupled_violation(lambda m: made(HessianAided(Product(m.product, local=False)))) > 0.1


def test_the_mean_error_costs_one_dense_all_reduce_of_what_is_compressed() -> None:
    """40 numbers of 8 bytes in a step; parameters that travel uncompressed have no error. With the global H (control) nothing."""

    def payload(local: bool) -> int:
        def worker(transport: Transport) -> int:
            model = Coupled(transport.rank)
            method = Compression(Rounding(8.0), HessianAided(Product(model.product, local)), dense_below=20)
            optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), method, transport=transport)
            for _ in range(3):
                optimizer.zero_grad()
                model.loss().backward()
                optimizer.step()
            return int(optimizer.compression.traffic.payload)

        return run_simulated(2, worker)[0]

    assert payload(True) - payload(False) == 3 * 40 * 8
    assert payload(False) == 3 * (2 * 40 + 10 * 8)


def test_the_mean_error_of_what_rests_is_a_mean() -> None:
    """A param group with η = 0 in the step that begins to send everything still holds its errors; H_i gets their mean, not (control) one's own."""

    def worker(transport: Transport) -> Any:
        model, given = Coupled(transport.rank), []

        def product(vectors: Any) -> Any:
            given.append(vectors["large"].flatten())
            return model.product(vectors)

        rule = HessianAided(Product(product))
        groups = [{"params": [model.large]}, {"params": [model.small]}]
        made = Compression(Rounding(8.0), rule, **ALL)
        optimizer = DistributedOptimizer(torch.optim.SGD(groups, lr=0.05), model.named_parameters(), made, transport=transport)
        for t in range(3):
            if t == 2:
                optimizer.compression.switch(Compression(Identity(), rule, AllReduce()))
                groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.0
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
        return given[-1], optimizer.compression.state_dict()["parameters"]["large"]["residual"].flatten()

    (first, own), (second, other) = run_simulated(2, worker)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, (own + other) / 2, rtol=0, atol=1e-14)
    assert (own - other).abs().max() > 0.1


def test_a_gradient_at_the_shifted_point_is_the_same_where_hessians_are_equal() -> None:
    """Without a Hessian: ∇f_i(x − η_{t−1}e_i) supplies H_i·e_i. Controls: Hessians that differ, and no shift."""

    def made(lambda_: float) -> Callable[[Coupled], Compression]:
        return lambda model: Compression(Rounding(1.0), LocalMomentum(lambda_), **ALL)

    assert coupled_violation(made(1.0), same=True) < 1e-11
    assert coupled_violation(made(1.0)) > 0.01
    assert coupled_violation(made(0.0), same=True) > 0.01


# -- bad input -------------------------------------------------------------------------------------------------------------------


def one_step(curvature: Any) -> None:
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    made = Compression.hessian_aided(curvature, dense_below=5)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), made)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()


EYE = torch.eye(12, dtype=torch.float64)


@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        (Matrix({"weight": torch.eye(4)}), r"'weight' \(shape \(3, 4\)\) must have shape \(12, 12\), got shape \(4, 4\)"),
        (Matrix({"weight": torch.ones(12)}, local=True), r"must have shape \(12, 12\), got shape \(12,\)"),
        (Matrix({"weigth": EYE}), "no Hessian for parameter 'weight'"),
        (Matrix({"weight": EYE * float("nan")}), "inf or NaN"),
        (
            Product(lambda vectors: {**vectors, "weight": vectors["weight"].flatten()}),
            r"'weight' must be real and have shape .* of shape \(12,\)",
        ),
        (Product(lambda vectors: {}), "got nothing"),
        (Product(lambda vectors: None), "dictionary"),  # type: ignore[arg-type, return-value]
        (Hutchinson(lambda vectors: {"weight": 1.0}), "got 1.0"),  # type: ignore[dict-item]
    ],
)
def test_a_hessian_that_does_not_fit_is_named(curvature: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        one_step(curvature)


@pytest.mark.parametrize("curvature", [Matrix({"weight": EYE}), Product(lambda v: v), Hutchinson(lambda v: v), GradientSquares()])
def test_one_that_fits_is_taken(curvature: Any) -> None:
    """Control."""
    one_step(curvature)


def test_wrong_settings() -> None:
    for wrong in (
        lambda: HessianAided(Matrix),  # type: ignore[arg-type]
        lambda: HessianAided(EYE),  # type: ignore[arg-type]
        lambda: Hutchinson(lambda v: v, 1.0),
        lambda: Hutchinson(lambda v: v, every=0),
        lambda: GradientSquares(0.0),
        lambda: GradientSquares(decay=-0.1),
        lambda: Rounding(0.0),
        lambda: Rounding(bits=12),
    ):
        with pytest.raises(CompressionError):
            wrong()


class OneSlot(SelfTransport):
    """A group of one whose all-reduce the caller hands in, as on Horovod."""

    divisor = 1
    direct = SelfTransport()

    def allreduce_(self, t: torch.Tensor, name: str) -> Any:
        return SlotHandle(t)


def test_what_it_needs_of_an_unmodified_horovod() -> None:
    """The learning rate itself, so an attached optimizer; and averages, not sums."""
    model = torch.nn.Linear(40, 30)
    bound = Compression.hessian_aided(compressor=RandomBlock(4)).bind(model)
    model(torch.ones(2, 40)).sum().backward()
    weight = model.weight.grad
    assert weight is not None

    def slot() -> HorovodSlot:
        state = MethodState(bound.method, bound.named, settings=lambda bucket: bound.attached.settings(bound.method, bucket))
        return HorovodSlot(Aggregator(state), OneSlot(), [])  # type: ignore[arg-type]

    with pytest.raises(CompressionError, match=r"needs the learning rate itself .*: call compression.attach"):
        slot().compress(weight)
    bound.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    attached = slot()
    payload, context = attached.compress(weight)
    attached.decompress(payload, context)  # control: with an average it goes on
    summed = slot()
    payload, context = summed.compress(weight)
    with pytest.raises(CompressionError, match=r"op=hvd\.Sum"):
        summed.decompress(payload * 2, context)


@pytest.mark.filterwarnings("ignore:Product:RuntimeWarning")
def test_a_product_that_is_not_finite_is_left_out() -> None:
    """The run is that of plain error feedback, and the residual stays finite."""

    def run(feedback: Feedback) -> torch.Tensor:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression(TopK(8), feedback))
        for t in range(5):
            optimizer.zero_grad()
            x, y = batch(0, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return flat(model.parameters())

    nan = run(HessianAided(Product(lambda vectors: {name: v * float("nan") for name, v in vectors.items()})))
    assert torch.equal(nan, run(ErrorFeedback()))
    assert not torch.equal(nan, run(HessianAided(Product(lambda vectors: vectors)))), "control"


@pytest.mark.filterwarnings("ignore:Product:RuntimeWarning")
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_product_with_a_nan_in_one_parameter_is_left_out_in_all(name: str) -> None:
    """From an H that is not finite in one entry nothing is taken; from one that is (control), all."""

    def run(feedback: Feedback) -> torch.Tensor:
        model = mlp()
        method = Compression(TopK(8), feedback, **ALL)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), method)
        for t in range(3):
            optimizer.zero_grad()
            x, y = batch(0, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return flat(model.parameters())

    def product(value: float) -> Product:
        def times(vectors: Any) -> Any:
            h = {n: v.clone() for n, v in vectors.items()}
            h[name].view(-1)[0] = value
            return h

        return Product(times)

    plain = run(ErrorFeedback())
    assert torch.equal(run(HessianAided(product(float("nan")))), plain)
    assert not torch.equal(run(HessianAided(product(1.0))), plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_sample_of_the_diagonal_that_is_not_finite_on_one_rank_is_left_out_on_all(bad: float | None) -> None:
    """h stays as it was, and goes on with the next sample. A sample that is finite (control) is taken."""

    def made(rank: int) -> Hutchinson:
        calls = []

        def product(vectors: Any) -> Any:
            calls.append(None)
            h = 2.0 * vectors["x"]
            if rank == 1 and len(calls) == 2 and bad is not None:
                h[7] = bad
            return {"x": h}

        return Hutchinson(product, 0.5)

    for h, samples in zip(diagonals(3, made, 3), (1, 1, 2) if bad is not None else (1, 2, 3), strict=True):
        torch.testing.assert_close(h, torch.full_like(h, 2 * (1 - 0.5**samples)))


def test_rounding_keeps_what_does_not_fit_and_names_what_is_not_finite() -> None:
    v = torch.tensor([0.4, -0.6, 2.5, 1000.0, -1e30, float("nan"), float("inf")])
    buffer, compressor = v.clone(), Rounding(bits=8)
    segments = Segments.of([("v", v)])
    payload = compressor.extract_(buffer, segments, Key(0, 0))
    out = torch.zeros_like(v)
    compressor.add_(out, payload, segments, Key(0, 0))
    assert out[:5].tolist() == [0.0, -1.0, 2.0, 127.0, -127.0]
    assert buffer[:5].tolist() == pytest.approx([0.4, 0.4, 0.5, 873.0, -1e30])
    assert out[5:].isnan().all() and not compressor.finite(payload, segments)
    assert payload.numel() == 8
