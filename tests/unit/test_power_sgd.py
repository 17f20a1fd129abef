"""PowerSGD: exact where it must be, near the best approximation where it cannot, and conserving (docs/algorithms.md §1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import Sign
from hvd_ecsgd.exchange import PowerSGD
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import flat, same_bits, simulate

N = 3
SHAPES = [(12, 20), (12, 20), (30, 8), (6, 3, 5), (40,), (3, 40), (1, 1)]


def low_rank(rank: int, worker: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Row spaces that all workers share, so that their mean has this rank too; vectors are anything."""
    own, shared = torch.Generator().manual_seed(100 * worker + step), torch.Generator().manual_seed(7 + step)
    if len(shape) == 1:
        return torch.randn(shape, generator=own, dtype=torch.float64)
    rows = shape[0]
    columns = torch.Size(shape).numel() // rows
    left = torch.randn(rows, rank, generator=own, dtype=torch.float64)
    return (left @ torch.randn(rank, columns, generator=shared, dtype=torch.float64)).view(shape)


def run(make: Callable[[], Any], gradient: Callable[[int, int, tuple[int, ...]], torch.Tensor], steps: int = 3, **options: Any) -> list[Any]:
    """By rank, for each step: what was applied (lr 1), the residuals, the gradients, all as lists by parameter; and bytes sent."""

    def worker(transport: Transport) -> Any:
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
        named = [(f"p{i}", p) for i, p in enumerate(parameters)]
        optimizer = DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), named, make(), transport=transport, **options)
        history = []
        for t in range(steps):
            before = [p.detach().clone() for p in parameters]
            gradients = [gradient(transport.rank, t, shape) for shape in SHAPES]
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
            saved = optimizer.compression.state_dict()["parameters"]
            residuals = [saved[n].get("residual", torch.zeros(())) for n, _ in named] if saved else []
            history.append(([b - p.detach() for b, p in zip(before, parameters, strict=True)], residuals, gradients))
        return history, optimizer.compression.traffic.payload

    return run_simulated(N, worker)


def mean(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).mean(0)


def worst(results: list[Any], expected: Callable[[int, int], torch.Tensor]) -> float:
    """Of the updates applied, over steps and parameters."""
    return max((results[0][0][t][0][i] - expected(t, i)).abs().max().item() for t in range(len(results[0][0])) for i in range(len(SHAPES)))


@pytest.mark.parametrize("residual", ["mean", "own"])
def test_matrices_of_low_rank_arrive_exactly(residual: Any) -> None:
    """In the first step already, from a random Q; of one rank more (control) they do not. All ranks apply the same bits."""
    for rank, exact in ((1, True), (2, True), (3, False)):
        results = run(lambda: Compression.power_sgd(2, residual=residual, **ALL), lambda w, t, s, rank=rank: low_rank(rank, w, t, s), steps=1)
        error = worst(results, lambda t, i, results=results: mean(r[0][t][2][i] for r in results))
        assert (error < 1e-12) == exact
        assert exact or error > 1e-2
        assert same_bits(flat(r[0][0][0]) for r in results)


@pytest.mark.parametrize("residual", ["mean", "own"])
def test_nothing_is_lost(residual: Any) -> None:
    """Mean residual + what was applied = mean gradient + mean residual before, for every parameter. Without feedback (control) it is lost."""

    def noise(worker: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(50 * worker + step), dtype=torch.float64)

    results = run(lambda: Compression.power_sgd(1, residual=residual, **ALL), noise)
    for i in range(len(SHAPES)):
        before = torch.zeros(SHAPES[i], dtype=torch.float64)
        for t in range(3):
            after = mean(r[0][t][1][i] for r in results)
            total = before + mean(r[0][t][2][i] for r in results)
            torch.testing.assert_close(after + results[0][0][t][0][i], total, rtol=0, atol=1e-12)
            before = after
    lost = run(lambda: Compression.power_sgd(1, error_feedback=False, **ALL), noise)
    assert worst(lost, lambda t, i: mean(r[0][t][2][i] for r in lost)) > 0.1
    if residual == "own":  # a projection: never more than there was; the mean's may be more
        assert all(float(r[0][0][1][i].norm()) <= float(r[0][0][2][i].norm()) + 1e-12 for r in results for i in range(len(SHAPES)))


def test_power_iteration_over_steps_finds_the_best_approximation() -> None:
    """One iteration a step on a gradient that stays: from well above the truncated SVD's error to within 1 % of it, thanks to the Q that is kept."""

    def still(worker: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(60 + worker), dtype=torch.float64)

    results = run(lambda: Compression.power_sgd(2, error_feedback=False, **ALL), still, steps=60)
    target = mean(r[0][0][2][0] for r in results)
    best = float(torch.linalg.svdvals(target)[2:].norm())
    errors = [float((target - results[0][0][t][0][0]).norm()) for t in range(60)]
    assert errors[0] > 1.05 * best
    assert best * (1 - 1e-9) <= errors[-1] < 1.01 * best


def test_parameters_that_would_not_shrink_travel_as_they_are() -> None:
    """An approximation rank of at least the smaller side: the bits of no compression. Smaller: the bytes are a·(rows + columns) and the vectors."""

    def noise(worker: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(50 * worker + step), dtype=torch.float64)

    dense = run(lambda: Compression.none, noise)
    for rank in (20, 100):
        wide = run(lambda rank=rank: Compression.power_sgd(rank, **ALL), noise)
        assert torch.equal(flat(dense[0][0][-1][0]), flat(wide[0][0][-1][0]))
        assert wide[0][1] == dense[0][1]
    numbers = 2 * (32 + 32 + 38 + 21 + 0) + 40 + 2 * 43 + 1
    assert run(lambda: Compression.power_sgd(2, **ALL), noise, steps=1)[0][1] == 8 * numbers


@pytest.mark.parametrize(("shape", "whole"), [((4, 4), True), ((4, 5), False), ((3, 6), True), ((6, 2, 2), False)])
def test_what_would_not_shrink_arrives_whole(shape: tuple[int, ...], whole: bool) -> None:
    """a·(rows + columns) numbers that are as many as rows·columns are not fewer; where they are fewer (controls), a random matrix arrives changed."""
    a = 2
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("p", p)], Compression.power_sgd(a, **ALL))
    p.grad = gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = gradient.clone()
    optimizer.step()
    assert (a * (shape[0] + gradient[0].numel()) >= gradient.numel()) == whole
    assert torch.equal(p.detach(), -gradient) == whole


def test_results_do_not_depend_on_buckets() -> None:
    """One bucket for each parameter, several, or one for all: the same bits, though shapes are batched differently."""
    runs = [
        run(lambda: Compression.power_sgd(2, **ALL), lambda w, t, s: low_rank(4, w, t, s), bucket_bytes=size)[0][0][-1] for size in (0, 3000, 10**8)
    ]
    for other in runs[1:]:
        assert torch.equal(flat(other[0]), flat(runs[0][0]))
        assert torch.equal(flat(other[1]), flat(runs[0][1]))


def test_it_recovers_from_zero_gradients_and_lost_directions() -> None:
    """After a step of zeros, and after one of rank 1, matrices of rank 2 arrive exactly again."""
    ranks = (2, 0, 2, 1, 2)
    results = run(lambda: Compression.power_sgd(2, error_feedback=False, **ALL), lambda w, t, s: low_rank(ranks[t], w, t, s), steps=5)
    assert worst(results, lambda t, i: mean(r[0][t][2][i] for r in results)) < 1e-10


def test_the_first_q_is_drawn_from_seed_step_and_name() -> None:
    """So another seed, another parameter, and a gradient that comes a step later, approximate one matrix otherwise; the same again (control) not."""
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def approximation(seed: int, zeros: int = 0, name: str = "p") -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros_like(matrix))
        optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [(name, p)], Compression.power_sgd(1, seed=seed, **ALL))
        for t in range(zeros + 1):
            p.grad = matrix * (t == zeros)
            optimizer.step()
        return p.detach()

    reference = approximation(0)
    assert torch.equal(reference, approximation(0))
    for other in (approximation(1), approximation(0, 1), approximation(0, 2), approximation(0, name="q")):
        assert (other - reference).abs().max() > 1e-3


def test_q_is_saved() -> None:
    """By name, columns × approximation rank; a run resumed without it (control) is another."""

    def state(model: Any, optimizer: Any, transport: Transport) -> Any:
        return copy.deepcopy(optimizer.compression.state_dict())

    saved = simulate(2, lambda: Compression.power_sgd(3, **ALL), after=state)
    assert tuple(saved[0]["parameters"]["0.weight"]["q"].shape) in ((60,), (20, 3))
    assert same_bits(s["parameters"]["0.weight"]["q"] for s in saved)
    assert saved[0]["parameters"]["0.weight"]["q"].any()
    assert saved[0]["parameters"]["0.bias"]["q"].numel() == 0


def test_what_it_refuses() -> None:
    for rank in (0, -1, 1.5, True, "2"):
        with pytest.raises(CompressionError, match="approximation_rank"):
            Compression.power_sgd(rank)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="residual"):
        Compression.power_sgd(residual="both")  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="Identity"):
        Compression(Sign(), exchange=PowerSGD())
    with pytest.raises(CompressionError, match="bind"):
        Compression.power_sgd(error_feedback=False).compress(torch.ones(3))
