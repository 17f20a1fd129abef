"""GradScaler and autocast: state in true units and float32, overflows undone on every rank and counted, scale changes without effect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids
from tests.problems import batch, mlp, same_bits, weights
from tests.unit.test_state import equal
from tests.unit.test_undo import everything

N = 2
STEPS, BAD = 7, 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a gradient or a payload held an inf or NaN")
        yield


def run(
    make: Callable[[], Any],
    scaled: bool,
    bad_rank: int | None = None,
    recipe: str = "plain",
    optimizer_of: Any = None,
    momentum: float = 0.9,
    **scale: Any,
) -> list[Any]:
    """Train with or without a GradScaler; with `bad_rank`, that rank's loss is inf in one step. What each rank ends with."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = (optimizer_of or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, weight_decay=1e-3)))(model.parameters())
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, **{"init_scale": 2.0**6, "growth_interval": 2, **scale})
        optimizer.compression.attach(optimizer, scaler)
        scales, moved = [], []
        for t in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
            optimizer.zero_grad()
            before = weights(model, optimizer.compression)
            x, y = batch(transport.rank, t)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            if t == BAD and transport.rank == bad_rank:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if recipe == "plain":
                scaler.step(optimizer)
            else:
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append(not torch.equal(weights(model, optimizer.compression), before))
        return weights(model, optimizer.compression), optimizer.compression.state_dict(), scales, moved

    return run_simulated(N, worker)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_plain_scaler_step_is_the_run_without_a_scaler(case: Case) -> None:
    """Weights and state, bit for bit, while the scale grows by powers of two."""
    scaled, plain = (run(case.make, s, momentum=case.momentum) for s in (True, False))
    assert scaled[0][2][0] != scaled[0][2][-1], "the scale changed"
    for (w, state, *_), (w0, state0, *_) in zip(scaled, plain):
        if case.exact or bound_method(case).feedback.keeps_residual:
            assert torch.equal(w, w0)
            assert equal(state, state0)
        else:
            torch.testing.assert_close(w, w0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["plain", "synchronize first"])
@pytest.mark.parametrize("name", ["none", "top_k", "double_squeeze-everything", "dist_ef_sgd", "detached", "pef", "bf16", "comp_skip"])
def test_an_overflow_on_one_rank_is_known_to_every_scaler(name: str, recipe: str) -> None:
    """The step is not applied on any rank, is counted, all scales are halved alike, and training goes on."""
    results = run(by_name(name).make, True, bad_rank=1, recipe=recipe)
    assert same_bits(w for w, *_ in results)
    for w, state, scales, moved in results:
        assert scales == results[0][2]
        assert scales[BAD] == scales[BAD - 1] / 2
        assert not moved[BAD]
        assert moved[BAD + 1] or moved[BAD + 2]
        assert state["undone"] == 1
        assert w.isfinite().all()


@pytest.mark.parametrize("scale", [2.0**4, 2.0**12])
def test_saved_residuals_are_in_true_units(scale: float) -> None:
    for name in ("top_k", "one_bit-everything"):
        (_, state, *_), *_ = run(by_name(name).make, True, init_scale=scale, growth_interval=1000)
        (_, plain, *_), *_ = run(by_name(name).make, False)
        assert equal(state, plain)


def test_other_optimizers_and_fused_ones() -> None:
    """Adam is indifferent to a wrong scale but for ε, so SGD's fused form, which unscales by itself, and RMSprop are looked at too."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.1),
    ):
        scaled, plain = (run(by_name("top_k").make, s, optimizer_of=make) for s in (True, False))
        assert torch.equal(scaled[0][0], plain[0][0])


def test_a_scaler_that_is_not_attached_is_refused() -> None:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(10))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(batch(0, 0)[0]).sum()).backward()
    with pytest.raises(CompressionError, match=r"not attached.*attach\(optimizer, scaler\)"):
        scaler.step(optimizer)


def test_unscaling_or_clipping_before_the_exchange_is_refused() -> None:
    """Not silently ignored, as the gradients have left already."""
    for spoil in (lambda m, o, s: s.unscale_(o), lambda m, o, s: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3)):
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(10))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.compression.attach(optimizer, scaler)
        scaler.scale(model(batch(0, 0)[0]).sum()).backward()
        spoil(model, optimizer, scaler)
        with pytest.raises(CompressionError, match=r"exchange had started.*optimizer\.synchronize\(\)"):
            scaler.step(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("name", ["top_k", "double_squeeze", "detached", "bf16-feedback"])
def test_autocast(name: str, dtype: torch.dtype | None) -> None:
    """Under autocast bf16 state stays float32, replicas equal, and the loss falls as without (the control)."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), by_name(name).make(), transport=transport)
        losses = []
        for t in range(40):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
                out = model(x)
                loss = torch.nn.functional.cross_entropy(out, y)
            assert out.dtype == (dtype or torch.float32)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        entries = optimizer.compression.state_dict()["parameters"].values()
        types = {t.dtype for entry in entries for t in entry.values() if isinstance(t, torch.Tensor)}
        return weights(model, optimizer.compression), sum(losses[:4]), sum(losses[-4:]), types

    results = run_simulated(N, worker)
    assert same_bits(w for w, *_ in results)
    for _, first, last, types in results:
        assert last < 0.3 * first
        assert types == {torch.float32}


# -- exact -----------------------------------------------------------------------------------------------------------------------


def bad_step(case: Case, exact: bool) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """All numbers before and after a step that is undone because of a NaN on the last rank."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        made = case.make()
        made = made if isinstance(made, Compression) else made()
        made.method = replace(made.method, exact=exact)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum, weight_decay=1e-3)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), made, transport=transport)
        held: dict[str, torch.Tensor] = {}
        for t in range(5):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
            optimizer.zero_grad()
            held = everything(model, optimizer)
            x, y = batch(transport.rank, t)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss * float("nan") if t == 4 and transport.rank == N - 1 else loss).backward()
            optimizer.step()
        assert optimizer.compression.undone_steps == 1
        return held, everything(model, optimizer)

    return run_simulated(N, worker)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_exact_undoes_bit_for_bit(case: Case) -> None:
    for before, after in bad_step(case, exact=True):
        assert before.keys() == after.keys()
        assert [k for k in before if not torch.equal(before[k], after[k])] == []


def test_without_exact_it_is_to_rounding() -> None:
    """Control: in float32, and with a learning rate that changes, some residual is off by a rounding."""
    off = [k for before, after in bad_step(by_name("top_k"), exact=False) for k in before if not torch.equal(before[k], after[k])]
    assert off
    assert all("residual" in k for k in off)


def test_exact_is_no_part_of_what_a_state_belongs_to() -> None:
    """A run may begin without it and be resumed with it; it says so when it is no boolean."""
    plain, exact = Compression.top_k(10).bind(mlp()), Compression.top_k(10, exact=True).bind(mlp())
    exact.load_state_dict(plain.state_dict())
    with pytest.raises(CompressionError, match="exact must be True or False"):
        Compression.top_k(10, exact=1, **ALL)
