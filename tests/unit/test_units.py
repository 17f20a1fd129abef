"""Units of residuals in front of optimizers with a memory: they never fall, so that no jump of η blows up what waits (docs/algorithms.md §2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.core.bucket import Bucket
from hvd_ecsgd.protocols import GroupSettings, Role
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import CASES, Case, bound_method, by_name, ids
from tests.problems import batch, flat, mlp
from tests.unit.test_invariants import GRADIENT_UNITS, mean, pieces, slot, whole

REMEMBERED = [c for c in GRADIENT_UNITS if Role.RESIDUAL in (m := bound_method(c)).slot_names and not m.feedback.takes.momentum] + [by_name("pef")]
"""In front of an optimizer with momentum, or with momentum after the exchange."""


def cosine(t: int, period: int, peak: float = 0.05) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * t / period))


SCHEDULES: dict[str, list[float]] = {
    "warm-up from zero": [0.0, 0.0] + [0.05 * t / 4 for t in range(1, 5)],
    "plateau": [0.05] * 4 + [5e-3] * 3 + [5e-4] * 3 + [5e-5] * 3 + [0.05] * 3,
    "restarts": [cosine(t % 24, 24) for t in range(30)],
    "one-cycle": [0.05 * t / 4 for t in range(1, 4)] + [cosine(t, 14) + 5e-6 for t in range(15)] + [0.05] * 3,
}
EVERYTHING = [lr for lrs in SCHEDULES.values() for lr in lrs]
FALLING: Callable[[Bucket, GroupSettings], float] = lambda bucket, settings: settings.lr  # noqa: E731
"""The control: units that follow η, as they do where nothing remembers."""


def largest_momentum(make: Callable[[], Any], lrs: Sequence[float]) -> float:
    """Of the optimizer, or of the method after the exchange: norm over all parameters, with one worker."""
    model, largest = mlp(), 0.0
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=SelfTransport())
    for t, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(0, t)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        applied = optimizer.compression.method.feedback.takes.update
        held = slot(optimizer.compression, "momentum") if applied else flat(s["momentum_buffer"] for s in optimizer.state.values())
        largest = max(largest, held.norm().item())
    return largest


@pytest.fixture(scope="module")
def plain() -> float:
    return largest_momentum(lambda: Compression.none, EVERYTHING)


@pytest.mark.parametrize("case", REMEMBERED, ids=ids)
def test_momentum_stays_what_it_is_without_compression(case: Case, plain: float) -> None:
    """Through warm-up from zero, plateaus, restarts and a cycle."""
    assert largest_momentum(case.make, EVERYTHING) < 2 * plain


@pytest.mark.parametrize("name", ["top_k", "random_block", "pef", "double_squeeze"])
def test_with_units_that_fall_it_blows_up(name: str, plain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the test above; in warm-up from zero η only rises, and so do units that follow it."""
    monkeypatch.setattr(Bucket, "unit_for", FALLING)
    assert largest_momentum(by_name(name).make, SCHEDULES["warm-up from zero"]) < 2 * plain
    assert largest_momentum(by_name(name).make, SCHEDULES["restarts"]) > 2.5 * plain
    assert largest_momentum(by_name(name).make, SCHEDULES["plateau"]) > 20 * plain
    assert largest_momentum(by_name(name).make, SCHEDULES["one-cycle"]) > 200 * plain


def run(make: Callable[[], Any], inner: Callable[[Any], torch.optim.Optimizer], lrs: Sequence[float]) -> tuple[float, float]:
    """The largest step of x, and the largest that an Adam-like optimizer remembers (norms over all parameters), with one worker."""
    model = mlp()
    optimizer = DistributedOptimizer(inner(model.parameters()), model.named_parameters(), make(), transport=SelfTransport())
    step, remembered, before = 0.0, 0.0, flat(model.parameters())
    for t, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        x, y = batch(0, t)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with optimizer.compression.at("averaged"):
            now = flat(model.parameters())
        step, before = max(step, (now - before).norm().item()), now
        kept = [s[name] for s in optimizer.state.values() for name in s if name in ("exp_avg_sq", "square_avg", "sum")]
        remembered = max(remembered, flat(kept).norm().item() if kept else 0.0)
    return step, remembered


ADAPTIVE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
SECOND_MOMENTS = [("Adam", name) for name in ("random_block", "double_squeeze", "power_sgd")] + [(inner, "top_k") for inner in ADAPTIVE]


@pytest.mark.parametrize(("inner", "name"), SECOND_MOMENTS)
def test_second_moments_stay_what_they_are_without_compression(inner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are inflated for long: ten times at most, where what was sent waited; with units that follow η (the control) many hundred times."""
    plain = run(lambda: Compression.none, ADAPTIVE[inner], EVERYTHING)[1]
    assert run(by_name(name).make, ADAPTIVE[inner], EVERYTHING)[1] < 10 * plain
    monkeypatch.setattr(Bucket, "unit_for", FALLING)
    assert run(by_name(name).make, ADAPTIVE[inner], EVERYTHING)[1] > 300 * plain


def test_with_momentum_before_the_compressor_steps_of_x_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing after it remembers, so units follow η: what waited comes at its own rate."""

    def step_of(make: Callable[[], Any], own: bool = False) -> float:
        return run(make, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.0 if own else 0.9), EVERYTHING)[0]

    plain = step_of(lambda: Compression.none)
    monkeypatch.setattr(Bucket, "unit_for", FALLING)
    assert step_of(lambda: Compression.dist_ef_sgd(momentum=0.9), own=True) < 2 * plain
    assert step_of(lambda: Compression.dist_ef_sgd()) < 2 * plain
    for make in (Compression.local_momentum, Compression.detached):
        assert step_of(lambda: make(16)) < 5 * plain, "updates of many steps come at once"  # noqa: B023
    assert step_of(by_name("top_k").make) > 50 * plain, "the control: momentum after it"


LRS = (0.0, 0.05, 0.1, 0.02, 0.3, 0.001, 0.0, 0.05, 0.2)
UNITS = (1.0, 0.05, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3)
"""The largest η so far."""


def off_balance(case: Case, units: Sequence[float], momentum: float = 0.9) -> float:
    """Violation of η̃_t·D_t + η̃_t·S_{t+1} = η̃_t·ḡ + η̃_{t−1}·S_t, S = E + mean_i e_i: what arrives and what waits is what was put in."""

    def worker(transport: Transport) -> list[Any]:
        model = mlp(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport)
        records = []
        for t, lr in enumerate(LRS):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, torch.float64)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            gradient = flat(p.grad for p in model.parameters() if p.grad is not None)
            optimizer.step()
            applied = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
            records.append((gradient, applied, slot(optimizer.compression, "residual"), pieces(optimizer.compression)))
        return records

    waits, before, worst = torch.zeros(()), units[0], 0.0
    for lr, unit, ranks in zip(LRS, units, zip(*run_simulated(2, worker), strict=True), strict=True):
        waits_now = mean(r[2] for r in ranks) + whole([r[3] for r in ranks])
        if lr:
            worst = max(worst, (unit * (ranks[0][1] + waits_now - mean(r[0] for r in ranks)) - before * waits).abs().max().item())
            before = unit
        waits = waits_now
    return worst


@pytest.mark.parametrize("name", ["top_k", "random_block", "double_squeeze-everything", "power_sgd", "bf16-feedback"])
def test_what_arrives_and_what_waits_is_what_was_put_in(name: str) -> None:
    """In units of the largest η so far in front of momentum; in those of the day in front of SGD without it. The control is the other one."""
    case = by_name(name)
    of_the_day = [lr or 1.0 for lr in LRS]
    assert off_balance(case, UNITS) < 1e-14
    assert off_balance(case, of_the_day, momentum=0.0) < 1e-14
    control = 1e-6 if name == "bf16-feedback" else 1e-4
    assert off_balance(case, of_the_day) > control and off_balance(case, UNITS, momentum=0.0) > control


def test_what_remembers() -> None:
    """Only of SGD without momentum it is known that it does not."""
    p = [torch.nn.Parameter(torch.ones(1))]
    kinds: dict[Any, bool] = {
        torch.optim.SGD(p, lr=0.1): False,
        torch.optim.SGD(p, lr=0.1, momentum=0.9): True,
        torch.optim.Adam(p): True,
        torch.optim.RMSprop(p): True,
        torch.optim.Adagrad(p): True,
    }
    for optimizer, remembers in kinds.items():
        assert GroupSettings.of(optimizer.param_groups[0]).remembers == remembers, optimizer


def restarted(make: Callable[[], Any]) -> float:
    """Largest loss within 20 steps after a restart: two workers, 64-128-10, SGD .05 with momentum .9, cosine to zero in 300 steps."""

    def worker(transport: Transport) -> float:
        def draw(*shape: int, seed: int) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(draw(*p.shape, seed=i) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.zeros_like(p))
        teacher, x = draw(64, 10, seed=9), draw(1024, 64, seed=10)
        y, largest = (x @ teacher).argmax(1), 0.0
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model.named_parameters(), make(), transport=transport
        )
        for t in range(320):
            optimizer.param_groups[0]["lr"] = cosine(t % 300, 300)
            optimizer.zero_grad()
            some = torch.randint(1024, (16,), generator=torch.Generator().manual_seed(2 * t + transport.rank))
            torch.nn.functional.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            if t >= 300:
                with torch.no_grad():
                    largest = max(largest, torch.nn.functional.cross_entropy(model(x), y).item())
        return largest

    return run_simulated(2, worker)[0]


@pytest.mark.parametrize("name", ["top_k", "double_squeeze"])
def test_a_warm_restart_after_cosine_to_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompressed training stays below 1 there."""
    make: Callable[[], Any] = {"top_k": lambda: Compression.top_k(50), "double_squeeze": lambda: Compression.double_squeeze()}[name]
    assert restarted(make) < 1.5
    monkeypatch.setattr(Bucket, "unit_for", FALLING)
    assert restarted(make) > 3, "control"


def test_a_state_saved_with_an_earlier_unit_goes_on_from_there() -> None:
    """What `previous_lr` says is what the residual is measured by, and what the unit does not fall below."""
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), Compression.top_k(10))
    for lr in (0.1, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        model(torch.ones(1, 20)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = copy.deepcopy(optimizer.compression.state_dict())
    assert {e["previous_lr"] for e in state["parameters"].values()} == {0.1}
    for entry in state["parameters"].values():
        entry["previous_lr"] = 0.05
    optimizer.compression.load_state_dict(state)
    before = slot(optimizer.compression, "residual")
    model(torch.zeros(1, 20)).mul(0).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.001
    optimizer.step()
    assert {e["previous_lr"] for e in optimizer.compression.state_dict()["parameters"].values()} == {0.05}
    left = slot(optimizer.compression, "residual")
    assert torch.equal(left, torch.where(left != 0, before, 0.0)) and left.any(), "carried as it was: 10 % of it were sent"


def test_every_row_is_looked_at() -> None:
    rows = {c.name for c in CASES if Role.RESIDUAL in bound_method(c).slot_names}
    before_or_in_updates = {c.name for c in CASES if bound_method(c).feedback.takes.momentum} - {"pef"}
    assert {c.name for c in REMEMBERED} == rows - before_or_in_updates and len(REMEMBERED) > 30
