"""GradScaler and autocast: state in true units and float32, overflows undone on every rank and counted, scale changes without effect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.protocols import Role
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import batch, mlp, same_bits, weights
from tests.unit.test_state import equal
from tests.unit.test_undo import everything
from tests.versions import cpu_scaler, fused_sgd

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
    attached: bool = True,
    bad: int = BAD,
    **scale: Any,
) -> list[Any]:
    """Train with or without a GradScaler; with `bad_rank`, that rank's loss is inf in step `bad`. What each rank ends with."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = (optimizer_of or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, weight_decay=1e-3)))(model.parameters())
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
        scaler = cpu_scaler(enabled=scaled, **{"init_scale": 2.0**6, "growth_interval": 2, **scale})
        if attached:
            optimizer.compression.attach(optimizer, scaler)
        scales, moved = [], []
        for t in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
            optimizer.zero_grad()
            before = weights(model, optimizer.compression)
            x, y = batch(transport.rank, t)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            if t == bad and transport.rank == bad_rank:
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


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_plain_scaler_step_is_the_run_without_a_scaler(case: Case) -> None:
    """Weights and state, bit for bit, while the scale grows by powers of two."""
    scaled, plain = (run(case.make, s, momentum=case.momentum) for s in (True, False))
    assert scaled[0][2][0] != scaled[0][2][-1], "the scale changed"
    for (w, state, *_), (w0, state0, *_) in zip(scaled, plain):
        if case.exact or Role.RESIDUAL in bound_method(case).slot_names:
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


@fused_sgd
def test_other_optimizers_and_fused_ones() -> None:
    """Adam is indifferent to a wrong scale but for ε, so SGD's fused form, which unscales by itself, and RMSprop are looked at too."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.1),
    ):
        scaled, plain = (run(by_name("top_k").make, s, optimizer_of=make) for s in (True, False))
        assert torch.equal(scaled[0][0], plain[0][0])


STATELESS = [c for c in CASES if not bound_method(c).stateful]
"""Nothing is carried from step to step."""


@pytest.mark.parametrize("recipe", ["plain", "synchronize first"])
@pytest.mark.parametrize("bad", [0, BAD])
@pytest.mark.parametrize("case", STATELESS, ids=ids)
def test_without_state_a_scaler_need_not_be_attached(case: Case, bad: int, recipe: str) -> None:
    """With one import changed a stock script is right: the bits of the run with attach, an overflow on one rank, also in the first step, included."""
    bare, attached = (run(case.make, True, bad_rank=1, recipe=recipe, attached=a, bad=bad) for a in (False, True))
    assert bare[0][2][bad] == (2.0**6 if bad == 0 else bare[0][2][bad - 1]) / 2
    for (w, state, scales, moved), (w1, state1, scales1, moved1) in zip(bare, attached, strict=True):
        assert torch.equal(w, w1) and w.isfinite().all()
        assert equal(state, state1) and state["undone"] == 1
        assert scales == scales1 and moved == moved1


def test_the_presets_without_state_are_those_without_feedback() -> None:
    assert {"none", "fp16", "bf16", "qsgd", "top_k-no_feedback", "double_squeeze-uncompensated"} < {c.name for c in STATELESS}
    assert not any(Role.RESIDUAL in bound_method(c).slot_names for c in STATELESS)
    assert "power_sgd-no_feedback" not in {c.name for c in STATELESS}, "its factors are those of the last step"


def test_what_finds_the_scaler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr("hvd_ecsgd.optimizer.scaler._calling_scaler", lambda: None)
    with pytest.raises(CompressionError, match="not attached"):
        run(by_name("none").make, True, attached=False)


def test_another_scaler_takes_over() -> None:
    """As in a script that makes one per epoch."""
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    alone = mlp()
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    for t, scale in enumerate((8.0, 32.0)):
        scaler = cpu_scaler(init_scale=scale)
        scaler.scale(model(batch(0, t)[0]).square().mean()).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        alone(batch(0, t)[0]).square().mean().backward()
        reference.step()
        reference.zero_grad()
        assert optimizer.compression.scaler is scaler
    assert torch.equal(weights(model), weights(alone))


def test_another_scaler_of_the_same_scale_hears_of_an_overflow() -> None:
    """The one that steps is told, not one that was there before: else ranks would go on with different scales."""

    def worker(transport: Transport) -> float:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), transport=transport)
        for t in range(3):
            if t != 1:
                scaler = cpu_scaler(init_scale=2.0**8)
            optimizer.zero_grad()
            loss = scaler.scale(model(batch(transport.rank, t)[0]).square().mean())
            (loss * float("inf") if (t, transport.rank) == (2, 1) else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale()

    assert run_simulated(2, worker) == [2.0**7, 2.0**7]


@pytest.mark.parametrize("recipe", ["plain", "synchronize first"])
def test_with_state_another_scaler_is_refused(recipe: str) -> None:
    """Also of the same scale, with which the next step would be of another."""
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(10))
    attached, other = cpu_scaler(init_scale=2.0**8), cpu_scaler(init_scale=2.0**8)
    optimizer.compression.attach(optimizer, attached)
    for scaler in (attached, other):
        optimizer.zero_grad()
        scaler.scale(model(batch(0, 0)[0]).square().mean()).backward()
        with pytest.raises(CompressionError, match="not attached") if scaler is other else nullcontext(), ExitStack() as stack:
            if recipe != "plain":
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                stack.enter_context(optimizer.skip_synchronize())
            scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("recipe", ["plain", "synchronize first"])
@pytest.mark.parametrize("name", ["none", "top_k", "double_squeeze", "detached"])
def test_a_worker_without_gradients_steps_with_its_scaler(name: str, recipe: str) -> None:
    """`GradScaler.update` asks that somebody looked for overflows. The run is that of a worker whose gradients are zero."""

    def worker(transport: Transport, zeros: bool) -> Any:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), by_name(name).make(), transport=transport)
        scaler = cpu_scaler(init_scale=2.0**8)
        optimizer.compression.attach(optimizer, scaler)
        for t in range(3):
            optimizer.zero_grad()
            loss = model(batch(transport.rank, t)[0]).square().mean()
            if transport.rank == 0 or t != 1:
                scaler.scale(loss).backward()
            elif zeros:
                scaler.scale(0 * loss).backward()
            with ExitStack() as stack:
                if recipe != "plain":
                    optimizer.synchronize()
                    scaler.unscale_(optimizer)
                    stack.enter_context(optimizer.skip_synchronize())
                scaler.step(optimizer)
            scaler.update()
        return weights(model, optimizer.compression), scaler.get_scale()

    without, zeros = (run_simulated(2, partial(worker, zeros=z)) for z in (False, True))
    assert torch.equal(without[0][0], without[1][0])
    assert torch.equal(without[0][0], zeros[0][0])
    assert [scale for _, scale in without] == [2.0**8, 2.0**8]


@pytest.mark.parametrize("recipe", ["plain", "synchronize first"])
@pytest.mark.parametrize("name", ["top_k", "power_sgd-no_feedback", "double_squeeze", "detached"])
def test_with_state_a_scaler_that_is_not_attached_is_refused(name: str, recipe: str) -> None:
    with pytest.raises(CompressionError, match=r"not attached.*attach\(optimizer, scaler\)"):
        run(by_name(name).make, True, recipe=recipe, attached=False)


def test_unscaling_or_clipping_before_the_exchange_is_refused() -> None:
    """Not silently ignored, as the gradients have left already."""
    for spoil in (lambda m, o, s: s.unscale_(o), lambda m, o, s: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3)):
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(10))
        scaler = cpu_scaler(init_scale=8.0)
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


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
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
