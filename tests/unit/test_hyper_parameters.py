"""Hyper-parameters that no step can be taken with, and optimizers that have none: what one process can tell of them."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer, GradientExchange
from hvd_ecsgd.protocols import GroupSettings
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import CASES, Case, bound_method, by_name, ids
from tests.problems import batch, flat, mlp, same_bits, train, weights
from tests.unit.test_state import equal

NAN, INF = float("nan"), float("inf")
BAD: tuple[tuple[str, float], ...] = (("lr", NAN), ("lr", INF), ("lr", -0.1), ("momentum", NAN), ("weight_decay", INF))


def test_what_is_wrong_with_a_param_group() -> None:
    """None of it raises at once: other ranks may have other values."""
    for option, value in BAD:
        for given in (value, torch.tensor(value)):
            assert GroupSettings.of({"lr": 0.1, option: given}, where="param group 3 of SGD").wrong == f"param group 3 of SGD has {option}={given!r}"
    mixed = {"lr": 0.1, "momentum": (0.9, NAN), "weight_decay": None}
    for good in ({"lr": 0.0}, {"lr": torch.tensor(0.1), "momentum": -0.0}, {"lr": None}, {}, mixed):
        assert GroupSettings.of(good).wrong == ""
    assert GroupSettings.of({"lr": torch.tensor(0.25), "weight_decay": 1}) == GroupSettings(0.25, 0.0, 1.0)
    assert GroupSettings.of({}) == GroupSettings.of({"lr": None}) == GroupSettings.of({"lr": "auto"}) == GroupSettings()
    assert "lr=None" in GroupSettings.of({"lr": None}, needs_learning_rate=True).wrong


STATEFUL = [c for c in CASES if bound_method(c).stateful]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", STATEFUL[::4], ids=ids)
def test_a_step_that_is_refused_is_none(case: Case) -> None:
    """On two workers, of which one has a bad value, or both. State is as before: to the bit where the value was, elsewhere to rounding."""

    def worker(transport: Transport) -> torch.Tensor:
        model, rank = mlp(torch.float64), transport.rank
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=case.momentum)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport)
        group, compression = optimizer.param_groups[0], optimizer.compression
        train(model, optimizer, rank, range(3))
        for i, (option, value) in enumerate(BAD):
            here = i % 3 in (2, rank)  # rank 0 alone, rank 1 alone, both
            before, x, good = compression.state_dict(), weights(model, compression), group[option]
            group[option] = value if here else good
            local = compression.aggregator.state.local
            if here or not local:
                with pytest.raises(CompressionError, match=rf"param group 0 of SGD has {option}={value}.*this rank \(a local" if local else option):
                    train(model, optimizer, rank, [3 + i])
                assert torch.equal(x, weights(model, compression))
                after = compression.state_dict()
                assert after["undone"] == before["undone"] + 1
                if here:
                    assert equal(after["parameters"], before["parameters"]), "nothing was accumulated"
            else:
                train(model, optimizer, rank, [3 + i])
            group[option] = good
        train(model, optimizer, rank, range(8, 14))
        assert not torch.equal(x, weights(model, compression)), "training goes on"
        return weights(model, compression)

    found = run_simulated(2, worker)
    assert same_bits(found) and found[0].isfinite().all()


@pytest.mark.parametrize("value", [NAN, 0.1], ids=["bad", "not 0"])
@pytest.mark.parametrize("name", ["top_k", "double_squeeze", "detached", "random_block-everything"])
def test_a_worker_that_goes_on_where_the_others_rest(name: str, value: float) -> None:
    """Where η is 0 nothing is sent: one that refuses the step sends nothing then, and one whose η is not 0 is told. Nobody waits for ever."""

    def worker(transport: Transport) -> str:
        model = mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters()}]
        optimizer = DistributedOptimizer(
            torch.optim.SGD(groups, lr=0.1, momentum=0.9), model.named_parameters(), by_name(name).make(), transport=transport
        )
        train(model, optimizer, transport.rank, range(2))
        optimizer.param_groups[1]["lr"] = value if transport.rank == 1 else 0.0
        optimizer.param_groups[0]["lr"] = 0.05 if math.isnan(value) else 0.0
        with pytest.raises(CompressionError if math.isnan(value) else DisagreementError) as told:
            train(model, optimizer, transport.rank, [2])
        if math.isnan(value):
            optimizer.param_groups[1]["lr"] = 0.0
            train(model, optimizer, transport.rank, [3])
        return str(told.value)

    found = run_simulated(2, worker)
    expected = "rank 1: param group 1 of SGD has lr=nan" if math.isnan(value) else "learning rate of param group 1 is 0 on rank 0, and not on rank 1"
    assert found[0] == found[1] and expected in found[0]


def test_methods_without_state_leave_it_to_the_optimizer() -> None:
    """There is nothing to spoil; the optimizer does what it does without us, as with a negative learning rate that climbs."""
    model, other = mlp(), mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.none)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = -0.1
    train(model, optimizer, 0, range(2))
    train(other, plain, 0, range(2))
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_an_exchange_without_an_optimizer_refuses_too() -> None:
    model = mlp()
    exchange = GradientExchange(model, Compression.top_k(10), lr=0.1)

    def reduce(t: int) -> Any:
        x, y = batch(0, t)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        return exchange.reduce(torch.autograd.grad(loss, list(model.parameters())))

    reduce(0)
    before = copy.deepcopy(exchange.compression.state_dict()["parameters"])
    exchange.param_groups[0]["lr"] = NAN
    with pytest.raises(CompressionError, match="param group 0 of GradientExchange has lr=nan"):
        reduce(1)
    assert equal(exchange.compression.state_dict()["parameters"], before)
    exchange.param_groups[0]["lr"] = 0.1
    assert reduce(2) and not equal(exchange.compression.state_dict()["parameters"], before)


class WithoutRate(torch.optim.Optimizer):
    """Parameter-free: its groups hold parameters only."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(p.grad.sign(), alpha=1e-3)


def test_a_worker_that_joined_follows_an_optimizer_without_a_learning_rate() -> None:
    """It has no numbers to tell; who has no more batches takes part all the same. The warning comes once."""

    def worker(transport: Transport) -> torch.Tensor:
        model = mlp()
        optimizer = DistributedOptimizer(WithoutRate(model.parameters()), model.named_parameters(), Compression.top_k(10), transport=transport)
        train(model, optimizer, transport.rank, range(2 + 3 * transport.rank))
        assert optimizer.join() == (3 if transport.rank == 0 else 0)
        return flat(model.parameters())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same_bits(run_simulated(2, worker))
    said = [str(w.message) for w in caught if "no learning rate" in str(w.message)]
    assert len(said) == 2 and all(s.startswith("param group 0 of WithoutRate has no learning rate") for s in said), "once in each worker"


def test_who_needs_a_learning_rate_names_the_optimizer_without_one() -> None:
    model = mlp()
    for make in (Compression.hessian_aided, Compression.dist_ef_sgd, Compression.pef):
        with pytest.raises(CompressionError, match="WithoutRate"):
            DistributedOptimizer(WithoutRate(model.parameters()), model.named_parameters(), make())
        with pytest.raises(CompressionError, match="param group 0 of WithoutRate has none"):
            make().bind(model).attach(WithoutRate(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.topk_sgd(10))
    train(model, optimizer, 0, range(2))
    x = flat(model.parameters())
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(CompressionError, match="param group 0 of SGD has lr=None"):
        train(model, optimizer, 0, [2])
    assert torch.equal(x, flat(model.parameters()))
