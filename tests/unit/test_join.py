"""Workers that have no more batches go on with gradients of zero: the same numbers as of a worker that feeds zeros, whatever the method."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.optimizer.hyper_parameters import HyperParameters
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import batch, mlp, same_bits, weights
from tests.unit.test_undo import everything
from tests.versions import cpu_scaler

STEPS = (7, 4, 0)
"""By rank: of the first epoch. Then all take three more."""
LR = 0.05


def rate(case: Case, t: int) -> float:
    """Local steps are taken before the others' rates are known, so those methods get a constant one."""
    return LR if getattr(bound_method(case).feedback, "period", 1) > 1 else LR / (1 + t)


def run(case: Case, finish: Callable[[Any, Callable[[int, bool], None], int], None], steps: tuple[int, ...] = STEPS) -> list[Any]:
    """What `everything` says after the first epoch, which `finish` ends, and after three more steps; and the hyper-parameters."""

    def worker(transport: Transport) -> Any:
        model = mlp(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=case.momentum, weight_decay=1e-3)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport)

        def step(t: int, data: bool) -> None:
            optimizer.param_groups[0]["lr"] = rate(case, t)
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, torch.float64)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss if data else sum(0 * p.sum() for p in model.parameters())).backward()
            optimizer.step()

        for t in range(steps[transport.rank]):
            step(t, True)
        finish(optimizer, step, transport.rank)
        after = everything(model, optimizer)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        first = optimizer.compression.aggregator.state.step
        for t in range(first, first + 3):
            step(t, True)
        return after, everything(model, optimizer), group, optimizer.compression.state_dict()["step"]

    return run_simulated(len(steps), worker)


def join(optimizer: Any, step: Callable[[int, bool], None], rank: int) -> None:
    optimizer.join()


def feed_zeros(optimizer: Any, step: Callable[[int, bool], None], rank: int) -> None:
    aggregator = optimizer.compression.aggregator
    while aggregator.state.step < max(STEPS) or aggregator.state.local:
        step(aggregator.state.step, False)


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_joining_is_feeding_zeros(case: Case) -> None:
    joined, fed = run(case, join), run(case, feed_zeros)
    for rank, (one, other) in enumerate(zip(joined, fed, strict=True)):
        for mine, theirs in zip(one[:2], other[:2], strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert torch.equal(mine[name], theirs[name]), f"rank {rank}: {name}"
        assert one[2:] == other[2:]
    assert same_bits(after["x"] for after, *_ in joined)
    assert same_bits(later["x"] for _, later, *_ in joined)


def test_without_the_others_learning_rates_replicas_come_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr(HyperParameters, "adopt", lambda *numbers: None)
    with pytest.raises((AssertionError, DisagreementError)):
        test_joining_is_feeding_zeros(by_name("double_squeeze"))


def test_with_equal_numbers_of_steps_nothing_happens() -> None:
    steps = (3, 3)
    joined = run(by_name("top_k"), lambda optimizer, step, rank: optimizer.join(), steps)
    plain = run(by_name("top_k"), lambda optimizer, step, rank: None, steps)
    assert torch.equal(joined[0][1]["x"], plain[0][1]["x"])
    assert joined[0][3] == plain[0][3] == 6


def test_all_hyper_parameters_follow_and_keep_their_kind() -> None:
    """As OneCycleLR changes them: Adam's betas too; and a learning rate that is a tensor."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        adam = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01), betas=(0.9, 0.99))
        optimizer = DistributedOptimizer(adam, model.named_parameters(), Compression.one_bit(), transport=transport)
        rate = optimizer.param_groups[0]["lr"]
        for t in range(2 + 3 * transport.rank):
            rate.fill_(0.01 / (1 + t))
            optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * t, 0.99)
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert optimizer.join() == 3 - 3 * transport.rank
        group = optimizer.param_groups[0]
        assert group["lr"] is rate and isinstance(group["betas"], tuple) and group["amsgrad"] is False
        return weights(model), float(rate), group["betas"]

    (w0, *hyper0), (w1, *hyper1) = run_simulated(2, worker)
    assert torch.equal(w0, w1)
    assert hyper0 == hyper1 and hyper0[1] == (0.9 - 0.1 * 4, 0.99)


@pytest.mark.parametrize(
    ("case", "attached"), [(by_name("none"), True), (by_name("none"), False), (by_name("top_k"), True), (by_name("local_momentum"), True)], ids=ids
)
def test_a_grad_scaler_follows(case: Case, attached: bool) -> None:
    """Also what it makes of an overflow after this worker has joined, and when it grows next; and, without state, one that was never attached."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport)
        scaler = cpu_scaler(init_scale=64.0, growth_interval=3)
        if attached:
            optimizer.compression.attach(optimizer, scaler)
        for t in range(2 + 4 * transport.rank):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            loss = scaler.scale(torch.nn.functional.cross_entropy(model(x), y))
            (loss * float("inf") if t == 3 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.join()
        return weights(model, optimizer.compression), scaler.state_dict(), optimizer.compression.undone_steps

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a gradient or a payload held an inf or NaN")
        (w0, scaler0, undone0), (w1, scaler1, undone1) = run_simulated(2, worker)
    assert torch.equal(w0, w1) and w0.isfinite().all()
    assert scaler0 == scaler1 and (scaler0["scale"], scaler0["_growth_tracker"]) == (64.0, 2)
    assert undone0 == undone1 == 1


@pytest.mark.parametrize("attached", [True, False])
def test_a_grad_scaler_that_took_no_step_must_be_attached_to_follow(attached: bool) -> None:
    """Without data and without attach nobody knows it here: an error on all workers, after all that can be taken over was."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), transport=transport)
        scaler = cpu_scaler(init_scale=64.0, growth_interval=3)
        if attached:
            optimizer.compression.attach(optimizer, scaler)
        for t in range(4 * transport.rank):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        if attached:
            assert optimizer.join() == 4 * (1 - transport.rank)
        else:
            with pytest.raises(CompressionError, match=r"the others' loss scale is 128, and workers 0 \(by rank\), .*attach\(optimizer, scaler\)"):
                optimizer.join()
        return weights(model), scaler.get_scale()

    (w0, scale0), (w1, scale1) = run_simulated(2, worker)
    assert torch.equal(w0, w1)
    assert (scale0, scale1) == (128.0 if attached else 64.0, 128.0)


def test_other_settings_of_those_that_train_are_named() -> None:
    """The rank that has joined has no say, and learns of it all the same."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.top_k(4), transport=transport)
        for t in range(1 + (transport.rank > 0)):
            optimizer.param_groups[0]["lr"] = 0.05 - 0.01 * t * transport.rank
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.join()

    with pytest.raises(DisagreementError, match=r"hyper-parameters: rank 1 has .*0\.04.*, rank 2 has .*0\.03"):
        run_simulated(3, worker)


def clip(model: torch.nn.Module, optimizer: Any, t: int) -> None:
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    with optimizer.skip_synchronize():
        optimizer.step()


def leave_out(model: torch.nn.Module, optimizer: Any, t: int) -> None:
    optimizer.synchronize()
    if t != 3:
        with optimizer.skip_synchronize():
            optimizer.step()


def clamp(model: torch.nn.Module, optimizer: Any, t: int) -> None:
    optimizer.step()
    with optimizer.compression.at("averaged"), torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.3, 0.3)


def freeze(model: torch.nn.Module, optimizer: Any, t: int) -> None:
    optimizer.step()
    if t == 3:
        model[0].weight.requires_grad_(False)  # type: ignore[index,operator,union-attr]


AROUND = {
    "clip": (clip, lambda: Compression.double_squeeze(verify_every=1)),
    "leave out": (leave_out, lambda: Compression.top_k(4, error_feedback=False)),
    "clamp": (clamp, lambda: Compression.none),
    "clamp, pef": (clamp, lambda: Compression.pef(4)),
    "clamp, detached": (clamp, lambda: Compression.detached(4, verify_every=1)),
    "freeze": (freeze, lambda: Compression.none),
}
"""What only the scripts of those that train do around a step."""


def around(what: str) -> list[torch.Tensor]:
    """By rank, after two epochs: all that is alike on all workers."""
    step, make = AROUND[what]

    def worker(transport: Transport) -> torch.Tensor:
        model = mlp()
        if "," in what:
            inner: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        else:
            inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), make(), transport=transport)
        for epoch in range(2):
            for t in range(2 + 4 * (transport.rank + epoch) % 8):
                optimizer.zero_grad()
                x, y = batch(transport.rank, t)
                torch.nn.functional.cross_entropy(model(x), y).backward()
                step(model, optimizer, t)
            optimizer.join()
            for p in model.parameters():
                p.requires_grad_()
        held = [v for p in model.parameters() for _, v in sorted(optimizer.state.get(p, {}).items())]
        held += [b.state["momentum"] for b in optimizer.compression.aggregator.state.buckets if what == "clamp, pef"]
        return torch.cat([weights(model, optimizer.compression), *(v.flatten() for v in held)])

    return run_simulated(2, worker)


@pytest.mark.parametrize("what", AROUND)
def test_what_others_do_around_their_steps_arrives_too(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: it does not, when nothing is taken over in the end."""
    assert same_bits(around(what))
    monkeypatch.setattr("hvd_ecsgd.optimizer.join.receive_state", lambda driver, root: None)
    with contextlib.suppress(DisagreementError):  # as verify_every says
        assert not same_bits(around(what))


@pytest.mark.parametrize("make", [lambda: Compression.local_momentum(4), lambda: Compression.detached(4, period=3)], ids=["ef", "local steps"])
def test_what_needs_all_workers_is_refused_while_some_have_joined(make: Callable[[], Any]) -> None:
    """And nothing comes of it: training goes on."""

    def worker(transport: Transport) -> torch.Tensor:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
        for t in range(1 + 5 * transport.rank):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if t == 3:
                with pytest.raises(CompressionError, match=r"at\('virtual'\) needs all workers, and 0 \(by rank\) joined"):
                    optimizer.compression.at("virtual").__enter__()
                with pytest.raises(CompressionError, match=r"switch needs all workers"):
                    optimizer.compression.switch(make())
        optimizer.join()
        with optimizer.compression.at("virtual"):
            pass
        return weights(model, optimizer.compression)

    assert same_bits(run_simulated(2, worker))


def test_state_that_cannot_be_given_away_is_an_error_on_all_workers() -> None:
    errors = []

    def worker(transport: Transport) -> None:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), transport=transport)
        for t in range(1 + transport.rank):
            optimizer.zero_grad()
            model(batch(transport.rank, t)[0]).sum().backward()
            optimizer.step()
            optimizer.state["mine"] = transport.rank  # belongs to no parameter: stays each worker's own
        optimizer.join()
        assert optimizer.state["mine"] == transport.rank
        for t in range(1 + transport.rank):
            optimizer.zero_grad()
            model(batch(transport.rank, t)[0]).sum().backward()
            optimizer.step()
        optimizer.state[next(model.parameters())]["odd"] = object()
        with pytest.raises(CompressionError, match="cannot be given to the workers that joined earlier; '0/odd' is a") as caught:
            optimizer.join()
        errors.append(caught)

    run_simulated(2, worker)
    assert len(errors) == 2


def test_not_while_the_parameters_are_held_at_a_point() -> None:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), transport=SelfTransport())
    with optimizer.compression.at("averaged"), pytest.raises(CompressionError, match=r"leave `with compression\.at"):
        optimizer.join()


def test_gradients_under_way_are_not_forgotten() -> None:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), transport=SelfTransport())
    model(batch(0, 0)[0]).sum().backward()
    with pytest.raises(CompressionError, match=r"join\(\): gradients of this step are under way; call it after step\(\)"):
        optimizer.join()
    optimizer.step()
    assert optimizer.join() == 0


def test_giving_up() -> None:
    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), transport=transport)
        for _ in range(1 + transport.rank):
            if optimizer.compression.state_dict()["step"] == 1:
                return "left"
            model(batch(0, 0)[0]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.join(lambda: True)

    assert run_simulated(2, worker) == [0, "left"]
