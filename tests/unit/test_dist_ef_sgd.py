"""dist-EF-SGD with momentum: the auxiliary iterate is momentum SGD on the mean gradients, and momentum is in one place (docs/algorithms.md §5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import Identity, TopK
from hvd_ecsgd.protocols import StepContext
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, flat, mlp, same_bits, weights
from tests.recursions import ALL, CONSTANT, LRS, N, trajectory, vary, violation

INSIDE: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}


@pytest.mark.parametrize("lrs", [CONSTANT, LRS], ids=["constant", "changing"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("compressor", [None, TopK(7)], ids=["sign", "top_k"])
@pytest.mark.parametrize("given", [False, True], ids=["read from SGD", "given"])
def test_the_auxiliary_iterate_is_momentum_sgd(lrs: Sequence[float], nesterov: bool, compressor: Any, given: bool) -> None:
    inside = {**INSIDE, "nesterov": nesterov}
    records = trajectory(lambda: Compression.dist_ef_sgd(compressor, **(inside if given else {}), **ALL), lrs, **({} if given else inside))
    assert all(same_bits(r[0] for r in ranks) for ranks in records)
    assert violation(records, lrs, nesterov, wd=1e-2) < 1e-12
    assert violation(records, lrs, not nesterov, wd=1e-2) > 1e-3, "control: the other momentum is something else"
    assert max(r[2].abs().max().item() for r in records[-2]) > 1e-3, "control: there is an error to feed back"


@pytest.mark.parametrize("nesterov", [False, True])
def test_settings_are_read_live(nesterov: bool) -> None:
    """Momentum and weight decay change at every step; small parameters travel dense, beside compressed ones."""
    records = trajectory(lambda: Compression.dist_ef_sgd(), LRS, vary, momentum=0.9, nesterov=nesterov)
    assert violation(records, LRS, nesterov, (0.9, 0.5, 0.95), (1e-3, 0.0, 1e-2)) < 1e-12
    assert violation(records, LRS, nesterov, (0.9, 0.9, 0.9), (1e-3, 0.0, 1e-2)) > 1e-4, "control"


def test_without_the_ratio_of_learning_rates_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: on both sides, and only when η changes."""
    monkeypatch.setattr(StepContext, "carry", property(lambda self: 1.0))
    for lrs, holds in ((CONSTANT, True), (LRS, False)):
        v = violation(trajectory(lambda: Compression.dist_ef_sgd(**INSIDE, **ALL), lrs), lrs, wd=1e-2)
        assert v < 1e-12 if holds else v > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_compression_it_is_torch_sgd(nesterov: bool) -> None:
    """Identity both ways: the weights of torch's own SGD under a dense mean, to rounding; given and read settings to the same bits."""
    sgd = {**INSIDE, "nesterov": nesterov}

    def final(make: Callable[[], Any], **options: Any) -> torch.Tensor:
        return trajectory(make, LRS, **options)[-1][0][0]

    dense = final(lambda: Compression.none, **sgd)
    read = final(lambda: Compression.dist_ef_sgd(Identity(), **ALL), **sgd)
    given = final(lambda: Compression.dist_ef_sgd(Identity(), **sgd, **ALL))
    torch.testing.assert_close(read, dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(given, read, rtol=0, atol=1e-15)
    other = final(lambda: Compression.dist_ef_sgd(Identity(), **ALL), **{**sgd, "weight_decay": 0.0})
    assert (other - dense).abs().max().item() > 1e-4, "control"


# -- momentum in one place --------------------------------------------------------------------------------------------------------


def wrap(make: Callable[[Any], torch.optim.Optimizer], compression: Any, **options: Any) -> Any:
    model = mlp()
    return DistributedOptimizer(make(model.parameters()), model.named_parameters(), compression, **options)


TWICE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "weight_decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4),
    "no dampening": lambda p: torch.optim.Adam(p),
}


@pytest.mark.parametrize("what", TWICE)
def test_momentum_in_both_places_is_refused(what: str) -> None:
    with pytest.raises(CompressionError, match=f"{what}.*at the same time is refused"):
        wrap(TWICE[what], Compression.dist_ef_sgd(momentum=0.9))
    wrap(lambda p: torch.optim.SGD(p, lr=0.1), Compression.dist_ef_sgd(momentum=0.9))  # controls: one place is enough
    if what != "no dampening":
        wrap(TWICE[what], Compression.dist_ef_sgd())
    wrap(TWICE[what], Compression.double_squeeze())


def test_momentum_that_comes_later_is_refused() -> None:
    optimizer = wrap(lambda p: torch.optim.SGD(p, lr=0.1), Compression.dist_ef_sgd(momentum=0.9))
    for p in optimizer.param_groups[0]["params"]:
        p.sum().backward()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(CompressionError, match="at the same time is refused"):
        optimizer.step()


def test_attach_refuses_momentum_twice_and_an_optimizer_that_is_not_horovods() -> None:
    """Given momentum, it is refused in the optimizer; given none, the rule applies the update, for which it needs Horovod's optimizer."""
    model = mlp()
    plain, heavy = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inside = Compression.dist_ef_sgd(momentum=0.9).bind(model)
    with pytest.raises(CompressionError, match="at the same time is refused"):
        inside.attach(heavy)
    assert inside.attach(plain) is inside
    with pytest.raises(CompressionError, match="applies the update itself"):
        Compression.dist_ef_sgd().bind(model).attach(plain)


def test_it_never_vanishes() -> None:
    """With one process Horovod does not compress at all: a step without the momentum is an error."""
    model = mlp()
    bound = Compression.dist_ef_sgd(momentum=0.9).bind(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound.attach(optimizer)
    model(torch.ones(2, 20)).sum().backward()
    with pytest.raises(CompressionError, match="one process"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": "0.9"}, "momentum"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"nesterov": 1, "momentum": 0.9}, "nesterov"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        Compression.dist_ef_sgd(**arguments)


def test_options_it_does_not_have() -> None:
    with pytest.raises(CompressionError, match="dampening"):
        wrap(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), Compression.dist_ef_sgd())
    with pytest.raises(CompressionError, match="sum"):
        wrap(lambda p: torch.optim.SGD(p, lr=0.1), Compression.dist_ef_sgd(), sum_gradients=True)


# -- undoing and saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("sgd", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}], ids=["plain", "nesterov"])
@pytest.mark.parametrize("given", [False, True])
def test_a_bad_step_is_undone_and_a_resumed_run_is_the_run(sgd: dict[str, Any], given: bool) -> None:
    """NaN on one rank: everything is back to rounding on all. Then save, load, go on: the bits of the run that went on."""

    def worker(transport: Transport) -> Any:
        def make(model: torch.nn.Module) -> Any:
            compression = Compression.dist_ef_sgd(**(sgd if given else {}), **ALL)
            inner = torch.optim.SGD(model.parameters(), lr=0.1, **({} if given else sgd))
            return DistributedOptimizer(inner, model.named_parameters(), compression, transport=transport)

        def steps(model: Any, optimizer: Any, which: Any) -> None:
            for t in which:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
                optimizer.zero_grad()
                x, y = batch(transport.rank, t, torch.float64)
                (torch.nn.functional.cross_entropy(model(x), y) * (float("nan") if t == 4 and transport.rank == 1 else 1.0)).backward()
                optimizer.step()

        model = mlp(torch.float64)
        optimizer = make(model)
        steps(model, optimizer, range(4))
        before = optimizer.compression.state_dict()
        x = flat(model.parameters())
        steps(model, optimizer, [4])
        after = optimizer.compression.state_dict()
        assert torch.equal(x, flat(model.parameters()))
        for name, entry in before["parameters"].items():
            for slot in ("residual", "momentum", "server_residual"):
                torch.testing.assert_close(after["parameters"][name][slot], entry[slot], rtol=1e-13, atol=1e-13)
        other = mlp(torch.float64)
        other.load_state_dict(model.state_dict())
        resumed = make(other)
        resumed.compression.load_state_dict(after)
        steps(model, optimizer, range(5, 8))
        steps(other, resumed, range(5, 8))
        return weights(model), weights(other), x, optimizer.compression.undone_steps

    results = run_simulated(N, worker)
    assert same_bits(r[0] for r in results)
    for went_on, resumed, x, undone in results:
        assert torch.equal(went_on, resumed)
        assert not torch.equal(went_on, x), "control: training went on"
        assert undone == 1
