"""How large a learning rate each method bears on a quadratic: mean-square limits, from the implementation, not sampled (docs/algorithms.md §3, §4).

One step is linear in the state, given what is sent. Its matrix A is read off by taking a step from unit states. The second moments of the state then
move by Σ P(A)·A⊗A over the draws, and stay bounded when that matrix's spectral radius ρ is below 1. Single runs say less: they converge almost surely
somewhat above the limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import Identity
from hvd_ecsgd.exchange import CompSkip, SkipAllReduce
from hvd_ecsgd.feedback import ErrorFeedback
from hvd_ecsgd.segments import Key, Segment
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import ALL


def radius(draws: Iterable[tuple[float, torch.Tensor]]) -> float:
    """ρ(Σ P·A⊗A) of (P, A)."""
    moments = sum(p * torch.kron(a, a) for p, a in draws)
    assert isinstance(moments, torch.Tensor)
    return float(torch.linalg.eigvals(moments).abs().max())


def step_from(transport: Transport, compression: Compression, s: float, x: torch.Tensor, slots: dict[str, torch.Tensor]) -> Any:
    """x, and the state's slots, after one step of size s down ½x² from x and the given slots; elements are independent problems."""
    p = torch.nn.Parameter(torch.zeros_like(x))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=s), [("p", p)], compression, transport=transport)
    for first in (True, False):  # the first step makes the state, and sends zeros
        optimizer.zero_grad()
        (0.5 * p**2).sum().backward()
        optimizer.step()
        state = optimizer.compression.state_dict()
        entry = state["parameters"]["p"]
        if first:
            with optimizer.compression.at("averaged"), torch.no_grad():
                p.copy_(x)
            entry |= {slot: value.to(entry[slot]) for slot, value in ({"x": x} | slots).items() if slot in entry and entry[slot].numel()}
            optimizer.compression.load_state_dict(state)
    with optimizer.compression.at("averaged"):
        return p.detach().clone(), entry


# -- random blocks with EF, DEF, SAEF ---------------------------------------------------------------------------------------------


def sent_and_kept(ratio: int, s: float, compression: Compression) -> tuple[torch.Tensor, torch.Tensor]:
    """A_sent and A_kept of the state (x, e): of `ratio` elements, the random block sends one."""
    columns_sent, columns_kept = [], []
    ones, zeros = torch.ones(ratio, dtype=torch.float64), torch.zeros(ratio, dtype=torch.float64)
    for x, e in ((ones, zeros), (zeros, ones)):
        x_after, entry = step_from(SelfTransport(), compression, s, x, {"residual": e, "momentum": zeros})
        after = torch.stack([x_after, entry.get("residual", zeros)])
        values, counts = after.unique(dim=1, return_counts=True)
        assert sorted(counts.tolist()) == [1, ratio - 1], "one element is sent, and all others fare alike"
        columns_sent.append(values[:, counts.argmin()])
        columns_kept.append(values[:, counts.argmax()])
    return torch.stack(columns_sent, 1), torch.stack(columns_kept, 1)


def radius_of_block(ratio: int, s: float, lambda_: float) -> float:
    sent, kept = sent_and_kept(ratio, s, Compression.detached(ratio, lambda_, **ALL))
    return radius([(1 / ratio, sent), (1 - 1 / ratio, kept)])


LIMITS = {(16, 0.0): 0.06452, (16, 0.3): 0.15727, (16, 0.5): 2, (16, 1.0): 2, (64, 0.0): 0.01575, (64, 0.3): 0.03914, (64, 0.5): 2, (64, 1.0): 2}


@pytest.mark.parametrize(("ratio", "lambda_"), LIMITS)
def test_detached_error_feedback_is_stable_up_to_its_limit(ratio: int, lambda_: float) -> None:
    limit = LIMITS[ratio, lambda_]
    assert radius_of_block(ratio, 0.9 * limit, lambda_) < 1
    assert radius_of_block(ratio, 1.2 * limit, lambda_) > 1
    assert radius_of_block(ratio, 0.999 * limit, lambda_) < 1 < radius_of_block(ratio, 1.001 * limit, lambda_)


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_the_matrices_are_those_of_the_recursion(lambda_: float) -> None:
    s = 0.07
    sent, kept = sent_and_kept(16, s, Compression.detached(16, lambda_, **ALL))
    torch.testing.assert_close(sent, torch.tensor([[1 - s, -(1 - lambda_ * s)], [0, 0]], dtype=torch.float64))
    torch.testing.assert_close(kept, torch.tensor([[1, 0], [s, 1 - lambda_ * s]], dtype=torch.float64))


def test_closed_forms() -> None:
    """λ = 0: 2p/(2 − p), exactly. 0 < λ < ½: about 2p/((2 − p)(1 − 2λ)), of which 2.5 % at .3 and 15 % at .45 are too much."""

    def limit(lambda_: float, p: float) -> float:
        low, high = 0.0, 2.0
        (sent_0, kept_0), (sent_1, kept_1) = (sent_and_kept(16, s, Compression.detached(16, lambda_, **ALL)) for s in (0.1, 1.1))
        while high - low > 1e-9:  # the matrices are linear in s
            s = (low + high) / 2
            at = [a + (s - 0.1) * (b - a) for a, b in ((sent_0, sent_1), (kept_0, kept_1))]
            low, high = (s, high) if radius([(p, at[0]), (1 - p, at[1])]) < 1 else (low, s)
        return low

    p = 1 / 16
    assert limit(0.0, p) == pytest.approx(2 * p / (2 - p), rel=1e-6)
    for lambda_, excess in ((0.3, 0.025), (0.45, 0.15)):
        assert 1 - limit(lambda_, p) / (2 * p / ((2 - p) * (1 - 2 * lambda_))) == pytest.approx(excess, abs=0.005)


def test_the_limits_tell_methods_apart() -> None:
    """Controls: beyond the limit of λ = 0, λ = .3 is stable; and without feedback the matrices are others."""
    assert radius_of_block(16, 1.2 * LIMITS[16, 0.0], 0.3) < 1 < radius_of_block(16, 1.2 * LIMITS[16, 0.0], 0.0)
    ones = torch.ones(16, dtype=torch.float64)
    x, _ = step_from(SelfTransport(), Compression.random_block(16, error_feedback=False, **ALL), 0.5, ones, {})
    assert sorted(x.tolist()) == [0.5, *[1.0] * 15]


def descended(compression: Compression, s: float, steps: int) -> float:
    """Mean x² after descending ½x² from 1 in 1024 dimensions by steps of size s; of a run that passes 1e6, or falls below 1e-3, what it is soon
    after."""
    p = torch.nn.Parameter(torch.ones(1024, dtype=torch.float64))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=s), [("p", p)], compression)
    x = torch.zeros(())
    for t in range(1, steps + 1):
        p.grad = p.detach().clone()
        optimizer.step()
        if t % 100 == 0 or t == steps:
            with optimizer.compression.at("averaged"):
                x = p.detach().clone()
            if not 1e-3 < x.square().mean() < 1e6:
                break
    return float(x.square().mean())


@pytest.mark.parametrize("lambda_", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [16, pytest.param(64, marks=pytest.mark.full)])
def test_runs_converge_below_the_limit_and_diverge_far_above_it(ratio: int, lambda_: float) -> None:
    """At 0.9 and 6 times the mean-square limit, each the other's control. Steps of the latter size are no trouble to plain descent, nor to λ = 1."""
    limit = LIMITS[ratio, lambda_]
    steps = {16: 1500, 64: 3000}[ratio]  # the first of these converges last, in steps of 0.9 · limit ≈ 1 / ratio
    assert descended(Compression.detached(ratio, lambda_, **ALL), 0.9 * limit, steps) < 1e-3
    assert descended(Compression.detached(ratio, lambda_, **ALL), 6 * limit, steps) > 1e6
    assert descended(Compression.none(**ALL), 6 * limit, steps) < 1e-3
    assert descended(Compression.detached(ratio, 1.0, **ALL), 6 * limit, steps) < 1e-3


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_x_is_the_average_of_the_virtual_iterates(lambda_: float) -> None:
    """E x⁺ = (1 − b)x + b·z⁺ with b = block/d, over one draw of every start; of another b, or of some starts (controls), it is not."""
    d, ratio, s = 24, 4, 0.3
    generator = torch.Generator().manual_seed(3)
    x, e = torch.randn(2, d, generator=generator, dtype=torch.float64)
    by_start: dict[int, torch.Tensor] = {}
    for seed in itertools.count():
        start = Key(seed, 1, None, "reduce").below(Segment("p", 0, d), d, "block")  # `step_from` takes steps 0 and 1
        if start not in by_start:
            slots = {"residual": e, "momentum": torch.zeros_like(x)}
            by_start[start], _ = step_from(SelfTransport(), Compression.detached(ratio, lambda_, seed=seed, **ALL), s, x, slots)
        if len(by_start) == d:
            break
    z = x - e - s * (x - lambda_ * e)
    mean = torch.stack(list(by_start.values())).mean(0)
    torch.testing.assert_close(mean, (1 - 1 / ratio) * x + z / ratio, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(mean, (1 - 1 / (ratio + 1)) * x + z / (ratio + 1))
    assert not torch.allclose(torch.stack(list(by_start.values())[1:]).mean(0), mean)


# -- CompSkip ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A policy that sends as told: by worker, or once for the servers."""

    sends_: tuple[bool, ...]
    cap: int | None = None
    predictable: bool = True

    def sends(self, key: Key, energy: float, movement: float) -> bool:
        return self.sends_[key.rank or 0]


def skip_matrix(n: int, s: float, workers: Sequence[bool], server: bool) -> torch.Tensor:
    """A of the state (x, e_1 … e_n, E) when these workers, and the server, send or not. Element j of the parameter is in unit state j."""
    units = torch.eye(n + 2, dtype=torch.float64)  # 8 elements or fewer are one piece, whose server is rank 0
    exchange = CompSkip(Told(tuple(workers)), Told((server,)))

    def worker(transport: Transport) -> Any:
        compression = Compression(Identity(), ErrorFeedback(), exchange, **ALL)
        slots = {"residual": units[1 + transport.rank], "server_residual": units[n + 1]}
        return step_from(transport, compression, s, units[0], slots)

    results = run_simulated(n, worker)
    return torch.stack([results[0][0], *(entry["residual"] for _, entry in results), results[0][1]["server_residual"]])


def skip_radius(n: int, s: float, q: float, server_q: float = 1.0) -> float:
    """With workers that send independently with probability q."""
    draws = []
    for *workers, server in itertools.product([True, False], repeat=n + 1):
        chance = server_q if server else 1 - server_q
        for sends in workers:
            chance *= q if sends else 1 - q
        if chance:
            draws.append((chance, skip_matrix(n, s, workers, server)))
    return radius(draws)


SKIP_LIMITS: dict[str, tuple[int, float, float, float]] = {  # workers, their q, the server's q, limit
    "one worker, 1/2": (1, 0.5, 1.0, 2 * 0.5 / 1.5),
    "one worker, 1/5": (1, 0.2, 1.0, 2 * 0.2 / 1.8),
    "the server": (1, 1.0, 0.5, 2 * 0.5 / 1.5),
    "the server of two": (2, 1.0, 0.3, 2 * 0.3 / 1.7),
    "four workers": (4, 0.5, 1.0, 2.0),
    "both sides": (1, 0.5, 0.5, 0.479),
}


@pytest.mark.parametrize("what", SKIP_LIMITS)
def test_skipping_is_stable_up_to_its_limit(what: str) -> None:
    """A shared draw allows 2q/(2 − q), four independent workers of q = ½ as much as without skipping, two sides less than one."""
    n, q, server_q, limit = SKIP_LIMITS[what]
    below, above = skip_radius(n, 0.9 * limit, q, server_q), skip_radius(n, 1.2 * limit, q, server_q)
    assert below < 1 < above
    assert skip_radius(n, 0.995 * limit, q, server_q) < 1 < skip_radius(n, 1.005 * limit, q, server_q)


def test_the_limits_of_skipping_tell_it_apart() -> None:
    """Controls: a worker that never skips bears steps beyond the limit of one that does, and what is beyond 2 nobody bears."""
    s = 1.2 * SKIP_LIMITS["one worker, 1/2"][3]
    assert skip_radius(1, s, 1.0) < 1 < skip_radius(1, s, 0.5)
    assert skip_radius(1, 2.01, 1.0) > 1


def test_an_all_reduce_that_is_skipped_is_one_shared_draw() -> None:
    """The state (x, e) moves as with one worker: equal matrices."""
    units = torch.eye(2, dtype=torch.float64)
    for sends in (True, False):
        compression = Compression(Identity(), ErrorFeedback(), SkipAllReduce(Told((sends,))), **ALL)
        x, entry = step_from(SelfTransport(), compression, 0.3, units[0], {"residual": units[1]})
        torch.testing.assert_close(torch.stack([x, entry["residual"]]), skip_matrix(1, 0.3, [sends], True)[:2, :2])
