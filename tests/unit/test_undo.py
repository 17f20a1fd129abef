"""A step in which any rank held an inf or NaN is undone on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import Identity
from hvd_ecsgd.exchange import AllReduce, CompSkip
from hvd_ecsgd.feedback import LocalMomentum
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import batch, flat, mlp, same_bits, slot, train, weights
from tests.versions import cpu_scaler

N = 3
BAD_STEP = 4


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_training_goes_on_after_every_undone_step(case: Case) -> None:
    """Three of them, two in a row; the state stays plain numbers."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=case.momentum, weight_decay=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport)
        for t in range(10):
            hook = model[0].weight.register_hook(lambda g: g * float("nan")) if t in (2, 4, 5) and transport.rank == 1 else None
            train(model, optimizer, transport.rank, [t])
            if hook is not None:
                hook.remove()
        state = everything(model, optimizer)
        assert all(t.isfinite().all() and not t.requires_grad for t in state.values())
        return optimizer.compression.undone_steps, state["x"]

    results = run_simulated(N, worker)
    local = bound_method(case).feedback.exchanges(2) is False
    assert local or [undone for undone, _ in results] == [3] * N
    assert same_bits(x for _, x in results)


Spoil = Callable[[torch.nn.Module, int], Any]
"""Registers a hook that makes this rank's gradients bad, and returns it (or None)."""


def everything(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """All numbers that a step may change: x, every slot of state, the optimizer's momentum."""
    result = {"x": weights(model, optimizer.compression), "held": flat(model.parameters())}
    for name, entry in optimizer.compression.state_dict()["parameters"].items():
        result |= {f"{name}.{slot}": t for slot, t in entry.items() if isinstance(t, torch.Tensor)}
        result[f"{name}.previous_lr"] = torch.tensor(entry["previous_lr"] or 0.0, dtype=torch.float64)  # what the residual is measured in
    for i, state in enumerate(optimizer.state_dict()["state"].values()):
        result |= {f"optimizer.{i}.{k}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return result


def run(make: Callable[[], Any], spoil: Spoil, dtype: torch.dtype = torch.float64, lr: float = 0.05, mu: float = 0.9, **options: Any) -> list[Any]:
    """Before the bad step, after it, the number of undone steps, the warnings, and the weights five steps later."""

    def worker(transport: Transport) -> Any:
        model = mlp(dtype)
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=mu, weight_decay=1e-3)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport, **options)
        before: dict[str, torch.Tensor] = {}
        after: dict[str, torch.Tensor] = {}
        for t in range(BAD_STEP + 6):
            optimizer.param_groups[0]["lr"] = lr / (1 + t)  # the units of residuals change at every step
            optimizer.zero_grad()
            if t == BAD_STEP:
                before = everything(model, optimizer)
                hook = spoil(model, transport.rank)
            x, y = batch(transport.rank, t, dtype)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if t == BAD_STEP:
                after = everything(model, optimizer)
                if hook is not None:
                    hook.remove()
        return before, after, optimizer.compression.undone_steps, weights(model, optimizer.compression)

    return run_simulated(N, worker)


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that writes `value` into row 2."""
    return lambda g: g.index_fill(0, torch.tensor([2]), value)


def nan_on_rank_1(model: torch.nn.Module, rank: int) -> Any:
    return next(model.parameters()).register_hook(put(float("nan"))) if rank == 1 else None


def inf_in_a_bias_on_rank_2(model: torch.nn.Module, rank: int) -> Any:
    return list(model.parameters())[-1].register_hook(put(float("inf"))) if rank == 2 else None


def check_undone(results: list[Any], tolerance: float) -> None:
    for before, after, undone, _ in results:
        assert undone == 1
        assert before.keys() == after.keys()
        assert torch.equal(before["x"], after["x"])
        for name in before:
            assert after[name].isfinite().all(), name
            torch.testing.assert_close(after[name], before[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    finals = [w for *_, w in results]
    assert same_bits(finals)
    assert finals[0].isfinite().all()
    assert not torch.equal(finals[0], results[0][1]["x"]), "training goes on"


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("spoil", [nan_on_rank_1, inf_in_a_bias_on_rank_2])
@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_a_bad_gradient_on_one_rank_undoes_the_step_everywhere(case: Case, spoil: Spoil) -> None:
    """Parameters and the optimizer's momentum are untouched; residuals, worker momentum and server residual are back to rounding."""
    results = run(case.make, spoil, mu=case.momentum)
    check_undone(results, 1e-13)
    for before, after, *_ in results:
        assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("optimizer"))


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_a_residual_taken_up_from_others_is_put_back() -> None:
    """Workers that send everything, in turns, and average what is left: a worker that had nothing left holds something after all."""
    check_undone(run(lambda: Compression(Identity(), LocalMomentum(0.0, average_errors=1), CompSkip(), **ALL), nan_on_rank_1), 1e-13)


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_what_is_bad_in_one_bucket_undoes_the_others_too(case: Case) -> None:
    """Where every parameter is a bucket of its own, the exchanges of the others have gone well on all ranks, and are undone all the same."""
    check_undone(run(case.make, inf_in_a_bias_on_rank_2, mu=case.momentum, bucket_bytes=0), 1e-13)


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("method", ["dist_ef_sgd", "comp_skip", "local_momentum", "detached", "cser"])
def test_without_momentum_nothing_of_an_undone_step_is_left_in_it(method: str) -> None:
    """What was there before cannot be had back, and would not be read; it is zero. With momentum (control) it is what it was."""
    for mu in (0.0, 0.9):
        for before, after, *_ in run(by_name(method).make, nan_on_rank_1, mu=mu)[::2]:  # rank 1 did not accumulate
            for name in (n for n in after if n.endswith(".momentum")):
                assert before[name].any()
                torch.testing.assert_close(after[name], before[name] if mu else torch.zeros_like(before[name]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", [by_name("fp16")], ids=ids)
@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("size", [1e6, 4e4], ids=["one worker's value", "the sum"])
def test_overflow_of_half_precision_is_undone(case: Case, size: float) -> None:
    """A finite gradient that half precision cannot hold, or whose sum it cannot hold, is not absorbed into the residual either."""
    ranks = {1} if size > 65504 else set(range(N))

    def spoil(model: torch.nn.Module, rank: int) -> Any:
        return next(model.parameters()).register_hook(put(size)) if rank in ranks else None

    check_undone(run(case.make, spoil), 1e-8)


def test_large_values_within_range_are_no_overflow() -> None:
    """Control: 4e4 on one worker alone fits, and nothing is undone."""

    def spoil(model: torch.nn.Module, rank: int) -> Any:
        return next(model.parameters()).register_hook(put(4e4)) if rank == 0 else None

    assert [r[2] for r in run(by_name("fp16").make, spoil)] == [0] * N
    assert [r[2] for r in run(by_name("fp16-feedback").make, spoil)] == [0] * N


def test_the_comparison_notices_a_step_that_stands() -> None:
    """Control: without anything bad, nothing is undone and the state before and after differs."""
    results = run(by_name("top_k").make, lambda model, rank: None)
    assert [r[2] for r in results] == [0] * N
    assert not torch.equal(results[0][0]["x"], results[0][1]["x"])
    with pytest.raises(AssertionError):
        check_undone(results, 1e-13)


def test_a_bad_first_step() -> None:
    """Nothing before it: all state is zero afterwards, and the run is the one without it."""

    def worker(transport: Transport) -> Any:
        finals = []
        for bad_first in (True, False):
            model = mlp()
            optimizer = DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(10), transport=transport
            )
            if bad_first:
                next(model.parameters()).grad = None
                (next(model.parameters()).sum() * float("nan")).backward()
                optimizer.step()
            for t in range(3):
                optimizer.zero_grad()
                x, y = batch(transport.rank, t)
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            finals.append(weights(model))
        return finals

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for with_bad, without in run_simulated(2, worker):
            assert torch.equal(with_bad, without)


def test_the_user_is_told() -> None:
    """A RuntimeWarning with the step and the count; the step is counted; the mean that is handed out is NaN."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.1), [("p", p)], Compression.one_bit(**ALL))
    (p.sum() * float("nan")).backward()
    with pytest.warns(RuntimeWarning, match="step 0 was undone on all ranks"):
        optimizer.step()
    assert optimizer.compression.undone_steps == 1
    assert optimizer.compression.state_dict()["step"] == 1
    assert p.grad is not None
    assert p.grad.isnan().any()
    assert torch.equal(p.detach(), torch.ones(4))


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("name", ["none", "one_bit-everything", "top_k", "random_block"])
def test_with_a_grad_scaler(name: str) -> None:
    """Horovod's recipe: synchronize, unscale, step inside skip_synchronize. An overflow makes the scaler skip the step, and training goes on."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), by_name(name).make(), transport=transport
        )
        scaler = cpu_scaler(init_scale=2.0**10)
        optimizer.compression.attach(optimizer, scaler)
        seen = []
        for t in range(6):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            if t == 2 and transport.rank == 0:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            seen.append(weights(model))
        return seen, scaler.get_scale(), optimizer.compression.undone_steps

    results = run_simulated(2, worker)
    for seen, scale, undone in results:
        assert undone == 1
        assert scale == 2.0**9, "every rank's scaler saw the overflow"
        assert torch.equal(seen[1], seen[2])
        assert not torch.equal(seen[4], seen[5])
    assert same_bits(seen[-1] for seen, *_ in results)


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_a_bad_exchange_of_a_loaded_run_keeps_the_local_steps() -> None:
    """Also of uncompressed parameters, whose residual is not always zero when there are local steps."""

    def worker(transport: Transport) -> Any:
        optimizers = []
        for _ in range(2):
            model = mlp(torch.float64)
            sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            optimizers.append((model, DistributedOptimizer(sgd, model.named_parameters(), Compression.detached(8, period=2), transport=transport)))
        (model, first), (other, second) = optimizers
        train(model, first, transport.rank, [0])
        second.compression.load_state_dict(first.compression.state_dict())
        before = slot(second.compression, "residual")
        (other(batch(0, 1, torch.float64)[0]) * (float("nan") if transport.rank == 1 else 1.0)).sum().backward()
        second.step()
        return before, slot(second.compression, "residual"), second.compression.undone_steps

    for before, after, undone in run_simulated(2, worker):
        assert undone == 1
        assert (before != 0).double().mean() > 0.9, "control: everything has moved locally"
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-13)


def test_what_travels_uncompressed_holds_nothing_back_after_a_bad_gradient() -> None:
    """To the bit, as such payloads are not kept for adding back: also on the rank that takes back what it had added before it came upon the NaN."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4000, generator=generator))
    compression = Compression(Identity(), LocalMomentum(0.0), AllReduce(), **ALL)
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.1, momentum=0.9), [("p", p)], compression)
    for bad in (False, True):
        p.grad = None
        factors = torch.randn(4000, generator=generator)
        factors[-1] = float("nan") if bad else 1.0
        (p * factors).sum().backward()
        optimizer.step()
    assert optimizer.compression.undone_steps == 1
    assert not slot(optimizer.compression, "residual").any()


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_a_parameter_that_is_spoilt_itself_is_named(eps: float) -> None:
    """As by Adam in half precision, whose eps of 1e-8 is 0 there: it divides 0 by 0 where gradients are 0. With another eps nothing is (control)."""
    model = torch.nn.Linear(4, 2).to(torch.float16)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps, foreach=False)
    optimizer = DistributedOptimizer(adam, model.named_parameters(), Compression.none)
    x = torch.ones(1, 4, dtype=torch.float16)
    x[0, 0] = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    told = [str(w.message) for w in said if "was undone" in str(w.message)]
    if eps == 1e-8:
        assert len(told) == 2 and all("Parameter 'weight' holds one itself" in text and "With a GradScaler" not in text for text in told)
    else:
        assert not told


def test_a_spoilt_gradient_names_no_parameter() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.none)
    model(torch.full((1, 4), float("inf"))).sum().backward()
    with pytest.warns(RuntimeWarning, match="was undone on all ranks .* With a GradScaler this happens"):
        optimizer.step()
