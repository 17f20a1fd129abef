"""Changing the method during training: what is not sent yet stays in residuals, whichever exchange held it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer, TransportError
from hvd_ecsgd.compressors import Identity, Sign, TopK
from hvd_ecsgd.core import switch as switching_module
from hvd_ecsgd.exchange import AllReduce, Central, TwoPass
from hvd_ecsgd.feedback import ErrorFeedback, HessianAided, LocalMomentum, Matrix, NoFeedback
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, SWITCHES, by_name
from tests.problems import mlp, same_bits, slot, train, weights
from tests.unit.test_invariants import CONSTANT, LRS, largest_violation, largest_violation_of_z, mean, trajectory, vary

Plan = dict[int, Callable[[], Compression]]

DETACHED: Plan = {
    0: lambda: Compression(TopK(5), LocalMomentum(0.3), TwoPass(Sign())),
    2: lambda: Compression.detached(8, 0.3),
    4: lambda: Compression(Sign(), LocalMomentum(0.3), Central()),
    6: lambda: Compression(Identity(), LocalMomentum(0.3), AllReduce()),
}


def switching(plan: Plan, change: Any = None) -> Callable[[Any, int], None]:
    """For `trajectory`."""

    def before_step(optimizer: Any, t: int) -> None:
        if t in plan and t > 0:
            optimizer.compression.switch(plan[t]())
        if change:
            change(optimizer, t)

    return before_step


@pytest.mark.parametrize("lrs", [CONSTANT, LRS], ids=["constant", "changing"])
def test_nothing_is_lost_in_gradient_units(lrs: Sequence[float]) -> None:
    records = trajectory(SWITCHES[0], lrs, change=switching(SWITCHES))
    assert all(same_bits(r.x for r in ranks) for ranks in records)
    assert largest_violation(records, lrs) < 1e-13
    assert not any(r.e.any() for r in records[5]), "a step with Identity sends all that is left"


def test_what_servers_hold_goes_back_to_workers_when_a_warm_up_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks the servers in uncompressed steps. Control: they keep their residuals, in units of an η of long ago."""

    def warm() -> Compression:
        return Compression.double_squeeze(TopK(5), Sign(), warmup_steps=6, **ALL)

    plan: Plan = {0: lambda: Compression.double_squeeze(TopK(5), Sign(), **ALL), 2: warm}
    records = trajectory(plan[0], LRS, change=switching(plan))
    assert largest_violation(records, LRS) < 1e-13
    carry_over = switching_module.carry_over
    monkeypatch.setattr(switching_module, "carry_over", lambda state, bucket, old, same_pieces: carry_over(state, bucket, old, True))
    assert largest_violation(trajectory(plan[0], LRS, change=switching(plan)), LRS) > 1e-3


def test_nothing_is_lost_in_update_units() -> None:
    """DEF with momentum, weight decay and learning rates that change too; x stays equal on all ranks."""
    records = trajectory(DETACHED[0], LRS, momentum=0.9, change=switching(DETACHED, vary))
    assert all(same_bits(r.x for r in ranks) for ranks in records)
    assert largest_violation_of_z(records, LRS) < 1e-12


def test_without_folding_the_servers_residuals_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an exchange that starts anew, or a fold that forgets that the mean divides by n."""
    carry_over = switching_module.carry_over

    def anew(state: Any, bucket: Any, old: Any, same_pieces: bool) -> None:
        bucket.exchange_state = bucket.new_exchange_state(state.rank, state.size)

    def undivided(state: Any, bucket: Any, old: Any, same_pieces: bool) -> None:
        bucket.exchange_state["server_residual"] = bucket.exchange_state.get("server_residual", torch.zeros(0)) / state.size
        carry_over(state, bucket, old, same_pieces)

    for wrong in (anew, undivided):
        monkeypatch.setattr(switching_module, "carry_over", wrong)
        some = {0: SWITCHES[0], 2: SWITCHES[2]}
        assert largest_violation(trajectory(SWITCHES[0], CONSTANT, change=switching(some)), CONSTANT) > 1e-3


def test_the_servers_residuals_stay_where_their_pieces_do() -> None:
    """From one two-pass method to another; a switch to the same method changes nothing at all."""
    same = {3: lambda: Compression.double_squeeze(TopK(5), Sign())}
    a, b = (trajectory(SWITCHES[0], LRS, change=change) for change in (None, switching(same)))
    assert all(torch.equal(p.x, q.x) and torch.equal(p.e, q.e) for p, q in zip(a[-1], b[-1], strict=True))
    other = {3: lambda: Compression.double_squeeze(TopK(5), TopK(5))}
    c = trajectory(SWITCHES[0], LRS, change=switching(other))
    assert all(torch.equal(p.e, q.e) for p, q in zip(a[2], c[2], strict=True))
    assert not torch.equal(a[-1][0].x, c[-1][0].x), "control"
    assert largest_violation(c, LRS) < 1e-13


@pytest.mark.parametrize("local", [True, False])
def test_no_correction_outlives_the_residual(local: bool) -> None:
    """From Hessian-aided compression to sending all with the same rule: x then moves by the plain mean of gradients."""
    hessians = {name: 0.5 * torch.eye(p.numel(), dtype=torch.float64) for name, p in mlp().named_parameters()}
    rule = HessianAided(Matrix(hessians, local))
    plan: Plan = {0: lambda: Compression(TopK(5), rule, **ALL), 3: lambda: Compression(Identity(), rule, AllReduce())}
    records = trajectory(plan[0], CONSTANT, change=switching(plan))
    for before, after, lr in zip(records[3:], records[4:], CONSTANT[4:]):
        assert not any(r.e.any() for r in before)
        assert (after[0].x - (before[0].x - lr * mean(r.gradient for r in after))).abs().max() < 1e-14
    held_back = records[3][0].x - (records[2][0].x - CONSTANT[3] * mean(r.gradient for r in records[3]))
    assert held_back.abs().max() > 1e-3, "control"


def test_feedback_may_begin() -> None:
    """From a method without residuals: they are zero at first."""

    def worker(transport: Transport) -> Any:
        optimizer, model = make(Compression.qsgd(), transport)
        train(model, optimizer, transport.rank, range(2))
        optimizer.compression.switch(Compression.top_k(10))
        assert not slot(optimizer.compression, "residual").any()
        train(model, optimizer, transport.rank, [2])
        assert slot(optimizer.compression, "residual").any()
        return weights(model)

    assert same_bits(run_simulated(2, worker))


def make(compression: Any, transport: Transport) -> tuple[Any, torch.nn.Module]:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression, transport=transport)
    return optimizer, model


def test_switching_before_the_first_step_is_making_it_so() -> None:
    def worker(transport: Transport) -> Any:
        finals = []
        for switch in (True, False):
            optimizer, model = make(Compression.double_squeeze() if switch else Compression.top_k(7), transport)
            if switch:
                optimizer.compression.switch(Compression.top_k(7))
            train(model, optimizer, transport.rank, range(3))
            finals.append(weights(model))
        bound = Compression.one_bit().bind(mlp())
        bound.switch(Compression.top_k(7))
        return *finals, bound.method == Compression.top_k(7).method

    for switched, made, bound_too in run_simulated(2, worker):
        assert torch.equal(switched, made)
        assert bound_too


def test_seed_and_what_is_dense_stay_as_they_were() -> None:
    """Switching from 1/8 to 1/4 is a schedule that does, bit for bit, whatever else the new method says; another seed (control) is another run.
    `exact` and `verify_every` stay too."""

    def run(first: Compression, then: Compression | None = None) -> torch.Tensor:
        def worker(transport: Transport) -> torch.Tensor:
            optimizer, model = make(first, transport)
            train(model, optimizer, transport.rank, range(2))
            if then is not None:
                optimizer.compression.switch(then)
            train(model, optimizer, transport.rank, range(2, 5))
            return weights(model)

        return run_simulated(2, worker)[0]

    switched = run(Compression.random_block(8, seed=7, **ALL), Compression.random_block(4, seed=9, dense_below=10**6))
    bound = Compression.top_k(verify_every=3, exact=True).bind(mlp())
    bound.switch(Compression.top_k(7, verify_every=5))
    assert (bound.method.verify_every, bound.method.exact) == (3, True)
    assert torch.equal(switched, run(Compression.random_block(8, seed=7, ratio_schedule=[(0, 8), (2, 4)], **ALL)))
    assert not torch.equal(switched, run(Compression.random_block(8, seed=9, ratio_schedule=[(0, 8), (2, 4)], **ALL)))


def test_a_resumed_run_binds_the_new_method() -> None:
    """Bit for bit; the one it began with is refused."""

    def worker(transport: Transport) -> Any:
        optimizer, model = make(Compression.double_squeeze(TopK(5)), transport)
        train(model, optimizer, transport.rank, range(2))
        optimizer.compression.switch(Compression.top_k(20))
        saved, x = optimizer.compression.state_dict(), model.state_dict()
        resumed, other = make(Compression.top_k(20), transport)
        other.load_state_dict(x)
        resumed.compression.load_state_dict(saved)
        with pytest.raises(CompressionError, match="another method"):
            make(Compression.double_squeeze(TopK(5)), transport)[0].compression.load_state_dict(saved)
        for o, m in ((optimizer, model), (resumed, other)):
            train(m, o, transport.rank, range(2, 5))
        return torch.equal(weights(model), weights(other))

    assert all(run_simulated(2, worker))


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize(
    "first", [Compression.top_k(10, **ALL), Compression.double_squeeze(Identity(), TopK(5), **ALL)], ids=["the worker's", "the servers'"]
)
def test_an_uncompressed_step_that_is_undone_keeps_what_was_left(first: Compression) -> None:
    """The residual that a step with Identity was about to send, the worker's own or what servers left it, is there again after a NaN; and is gone
    after a good step (control)."""

    def worker(transport: Transport) -> Any:
        optimizer, model = make(first, transport)
        train(model, optimizer, transport.rank, range(3))
        optimizer.compression.switch(Compression(Identity(), ErrorFeedback(), AllReduce()))
        before = slot(optimizer.compression, "residual")
        loss = (model(torch.ones(2, 20)) * (float("nan") if transport.rank == 1 else 1.0)).sum()
        loss.backward()
        optimizer.step()
        after = slot(optimizer.compression, "residual")
        optimizer.zero_grad()
        train(model, optimizer, transport.rank, [4])
        return before, after, slot(optimizer.compression, "residual")

    for before, undone, sent in run_simulated(2, worker):
        assert before.abs().max() > 1e-3
        torch.testing.assert_close(undone, before, rtol=1e-5, atol=1e-5)
        assert not sent.any()


# -- mistakes ---------------------------------------------------------------------------------------------------------------------


def test_ranks_that_switch_to_different_methods_are_told() -> None:
    """On every rank, with nothing changed: training goes on as if nothing had been tried."""

    def worker(transport: Transport) -> Any:
        finals = []
        for attempt in (True, False):
            optimizer, model = make(Compression.double_squeeze(TopK(5)), transport)
            train(model, optimizer, transport.rank, range(2))
            if attempt:
                with pytest.raises(DisagreementError, match="compressor"):
                    optimizer.compression.switch(Compression.top_k(10 + transport.rank))
            train(model, optimizer, transport.rank, range(2, 4))
            finals.append(weights(model))
        return finals

    for a, b in run_simulated(2, worker):
        assert torch.equal(a, b)


def test_a_rank_that_switches_alone_is_told() -> None:
    """It waits for the others in the comparison, and they find something else there than their own next collective."""

    def worker(transport: Transport) -> None:
        optimizer, model = make(Compression.top_k(10), transport)
        train(model, optimizer, transport.rank, range(2))
        if transport.rank == 1:
            optimizer.compression.switch(Compression.top_k(50))
        train(model, optimizer, transport.rank, [2])

    with pytest.raises((TransportError, DisagreementError), match="switch"):
        run_simulated(2, worker)


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "feedback lost": (Compression.top_k, lambda: Compression.top_k(error_feedback=False), "switch to Compression\\(Identity"),
    "none": (Compression.top_k, lambda: Compression.none, "loses nothing"),
    "other units": (Compression.random_block, Compression.local_momentum, "feedback rule"),
    "momentum": (Compression.random_block, lambda: Compression.dist_ef_sgd(momentum=0.9), "feedback rule"),
    "another lambda": (Compression.detached, lambda: Compression.detached(lambda_=0.5), "feedback rule"),
    "coupled with what is dense": (lambda: Compression.top_k(error_feedback=False), by_name("hessian_aided-product").make, "feedback rule"),
    "a compressor": (Compression.top_k, TopK, "expected Compression"),
    "a bound one": (Compression.top_k, lambda: Compression.top_k().bind(mlp()), "not bound"),
    "servers' residuals": (lambda: Compression(Sign(), NoFeedback(), TwoPass()), lambda: Compression.qsgd(), "servers' residuals"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    old, new, message = REFUSED[what]

    def worker(transport: Transport) -> None:
        optimizer, model = make(old(), transport)
        for steps in (range(0), range(2)):
            train(model, optimizer, transport.rank, steps)
            if steps or what != "servers' residuals":
                with pytest.raises(CompressionError, match=message):
                    optimizer.compression.switch(new())
        train(model, optimizer, transport.rank, [2])

    run_simulated(2, worker)


def test_not_within_a_step() -> None:
    def worker(transport: Transport) -> None:
        optimizer, model = make(Compression.top_k(), transport)
        model(torch.ones(2, 20)).sum().backward()
        with pytest.raises(CompressionError, match="between a backward pass"):
            optimizer.compression.switch(Compression.top_k(50))
        optimizer.step()
        with pytest.raises(CompressionError, match="leave"), optimizer.compression.at("averaged"):
            optimizer.compression.switch(Compression.top_k(50))
        optimizer.compression.switch(Compression.top_k(50))  # control

    run_simulated(1, worker)
