"""The exchange without an optimizer does what our optimizer does: the third driver over the same step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_ecsgd.torch_backend
from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer, GradientExchange, load_checkpoint, save_checkpoint
from hvd_ecsgd.optimizer.step import Outcome
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import batch, flat, mlp, same_bits, weights

RATES = (0.1, 0.1, 0.05, 0.0, 0.05, 0.1, 0.1, 0.1)
INF_AT = 5


def gradients(model: torch.nn.Module, rank: int, step: int) -> list[torch.Tensor]:
    x, y = batch(rank, step)
    return list(torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), list(model.parameters())))


def options(case: Case) -> dict[str, float]:
    applies = bound_method(case).feedback.takes.update
    return {"momentum": case.momentum, "weight_decay": 1e-4} if applies else {}


def by_exchange(case: Case, transport: Transport) -> Any:
    """A loop of one's own: SGD with momentum by hand, where the method leaves the update to the loop."""
    model, rank = mlp(), transport.rank
    exchange = GradientExchange(model.named_parameters(), case.make(), transport, lr=RATES[0], **options(case))
    sgd = torch.optim.SGD(model.parameters(), lr=RATES[0], momentum=0 if "momentum=0" in repr(bound_method(case)) else case.momentum)
    for step, lr in enumerate(RATES):
        exchange.param_groups[0]["lr"] = sgd.param_groups[0]["lr"] = lr
        mine = gradients(model, rank, step)
        if step == INF_AT and rank == 1:
            mine[0][0, 0] = float("inf")
        means = exchange.reduce(dict(zip([n for n, _ in model.named_parameters()], mine)) if step % 2 else mine)
        assert not (means and exchange.outcome is not Outcome.STANDS)
        for name, p in model.named_parameters():
            p.grad = means.get(name)
        if means:
            sgd.step()
    return weights(model, exchange.compression), exchange.compression.state_dict()


def by_optimizer(case: Case, transport: Transport) -> Any:
    model, rank = mlp(), transport.rank
    own = options(case) or {"momentum": 0 if "momentum=0" in repr(bound_method(case)) else case.momentum}
    sgd = torch.optim.SGD(model.parameters(), lr=RATES[0], **own)  # type: ignore[arg-type]
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport, overlap=False)
    for step, lr in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        for p, g in zip(model.parameters(), gradients(model, rank, step)):
            p.grad = g
        if step == INF_AT and rank == 1:
            next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
        optimizer.step()
    return weights(model, optimizer.compression), optimizer.compression.state_dict()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf")
def test_the_bits_are_those_of_our_optimizer(case: Case) -> None:
    """Weights and all state, with a schedule, a rate of zero, and an inf on one rank, on two workers."""
    mine, theirs = (run_simulated(2, lambda transport, run=run: run(case, transport)) for run in (by_exchange, by_optimizer))
    for (w, state), (expected, expected_state) in zip(mine, theirs, strict=True):
        assert torch.equal(w, expected) and w.isfinite().all()
        assert equal(state, expected_state)
    assert same_bits(w for w, _ in mine)
    assert not torch.equal(mine[0][0], flat(mlp().parameters()))


def test_what_is_undone_is_told_and_leaves_nothing_to_apply() -> None:
    exchange = GradientExchange((model := mlp()).named_parameters(), Compression.top_k(10))
    bad = [torch.full_like(p, float("nan")) for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="undone"):
        assert exchange.reduce(bad) == {} and exchange.outcome is Outcome.UNDONE
    assert exchange.compression.undone_steps == 1
    assert set(exchange.reduce(gradients(model, 0, 0))) == {n for n, _ in model.named_parameters()}


def test_what_is_not_given_counts_as_zero() -> None:
    def worker(transport: Transport) -> dict[str, torch.Tensor]:
        exchange = GradientExchange(mlp().named_parameters(), Compression.none, transport)
        return exchange.reduce({"0.bias": torch.full((64,), 4.0)} if transport.rank else {"0.bias": None})

    for means in run_simulated(2, worker):
        assert torch.equal(means["0.bias"], torch.full((64,), 2.0)) and not means["0.weight"].any()


def test_means_that_are_kept_are_not_overwritten() -> None:
    exchange = GradientExchange((model := mlp()).named_parameters())
    kept = [exchange.reduce([torch.full_like(p, value) for p in model.parameters()]) for value in (1.0, 2.0, 3.0)]
    assert [means["0.weight"][0, 0].item() for means in kept] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("method", ["top_k-k", "detached", "double_squeeze"])
def test_checkpoints_take_the_exchange_in_the_optimizers_place(method: str, tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, GradientExchange]:
        model = mlp()
        return model, GradientExchange(model.named_parameters(), by_name(method).make(), lr=0.1)

    def go(model: torch.nn.Module, exchange: GradientExchange, steps: range) -> torch.Tensor:
        for step in steps:
            exchange.param_groups[0]["lr"] *= 0.9
            for name, mean in exchange.reduce(gradients(model, 0, step)).items():
                with torch.no_grad():
                    model.get_parameter(name).sub_(mean, alpha=exchange.param_groups[0]["lr"])
        return weights(model, exchange.compression)

    model, exchange = made()
    go(model, exchange, range(3))
    save_checkpoint(tmp_path, model, exchange, exchange.compression)
    expected = go(model, exchange, range(3, 6))
    resumed, again = made()
    load_checkpoint(tmp_path, resumed, again, again.compression)
    assert torch.equal(go(resumed, again, range(3, 6)), expected)
    assert not torch.equal(go(*made(), range(3, 6)), expected), "control"


def test_ranks_that_differ_are_told() -> None:
    def worker(transport: Transport) -> None:
        model = mlp()
        exchange = GradientExchange(model.named_parameters(), Compression.top_k(10 + transport.rank), transport)
        exchange.reduce(gradients(model, 0, 0))

    with pytest.raises(DisagreementError, match="compressor"):
        run_simulated(2, worker)


def wrapped(model: torch.nn.Module, transport: Any) -> Any:
    return DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(4), transport=transport)


def test_wrong_use_says_what_to_do() -> None:
    model = mlp()
    with pytest.raises(CompressionError, match="needs the learning rate itself, and GradientExchange\\(\\) has none"):
        GradientExchange(model.named_parameters(), Compression.detached(4))
    with pytest.raises(CompressionError, match="betas="):
        GradientExchange(model.named_parameters(), Compression.detached(4), lr=0.1, betas=(0.9, 0.99))
    for wrong in ("mpi", hvd_ecsgd.torch_backend, SelfTransport):  # a backend's module has functions that are named as a transport's members
        for make in (lambda wrong: GradientExchange(model.named_parameters(), Compression.top_k(4), wrong), lambda wrong: wrapped(model, wrong)):
            with pytest.raises(CompressionError, match=r"transport must be .*MPITransport\(\), .*None for one process, got "):
                make(wrong)
    wrapped(model, SelfTransport())
    exchange = GradientExchange(model.named_parameters(), Compression.top_k(4))
    with pytest.raises(CompressionError, match="expected 4 gradients"):
        exchange.reduce([torch.zeros(64, 20)])
    with pytest.raises(CompressionError, match=r"'nobody' is no bound parameter"):
        exchange.reduce({"nobody": torch.zeros(1)})
    with pytest.raises(CompressionError, match=r"'0\.weight' has shape \(3,\), expected \(64, 20\)"):
        exchange.reduce({"0.weight": torch.zeros(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchange.reduce(gradients(model, 0, 0))


LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "HOROVOD_SIZE", "WORLD_SIZE")


@pytest.mark.parametrize("variable", LAUNCHED)
def test_one_of_several_processes_without_a_transport_is_told(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train by itself, which no loss shows. Of one process, or where that is said to be meant, nothing is told (control)."""
    model = mlp()

    def said(**options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            GradientExchange(model.named_parameters(), Compression.none, **options)
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.none, **options)
        assert all(w.filename == __file__ for w in caught), "it is the caller's line"
        return [str(w.message) for w in caught]

    for other in LAUNCHED:  # which these tests may have been started with themselves
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, "4")
    exchange, optimizer = said()
    assert exchange.startswith("GradientExchange() was given no transport") and optimizer.startswith("DistributedOptimizer() was given no transport")
    assert f"it is one of 4 ({variable})" in exchange
    assert not said(transport=SelfTransport())
    for alone in ("1", "", "four"):
        monkeypatch.setenv(variable, alone)
        assert not said()
