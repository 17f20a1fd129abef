"""What happens between steps in real scripts: freezing, clipping, wrapping again, writing to shifted parameters, loss scales, warm-up from zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.compressors import TopK
from hvd_ecsgd.exchange import TwoPass
from hvd_ecsgd.protocols import StepContext
from hvd_ecsgd.segments import Key
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, mlp, train, weights


def wrapped(compression: Any, lr: float = 0.1, momentum: float = 0.9, model: torch.nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return model, DistributedOptimizer(optimizer, model.named_parameters(), compression, **options)


def backward(model: torch.nn.Module, t: int = 0) -> None:
    x, y = batch(0, t)
    torch.nn.functional.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("compression", [Compression.random_block(8), Compression.double_squeeze(), Compression.detached(8)])
def test_a_parameter_frozen_in_mid_training_stands_still(compression: Compression) -> None:
    model, optimizer = wrapped(compression)
    train(model, optimizer, 0, range(4))
    frozen, other = next(iter(model.parameters())), list(model.parameters())[-1]
    frozen.requires_grad_(False)
    with optimizer.compression.at("averaged"):
        before, moving = frozen.detach().clone(), other.detach().clone()
    train(model, optimizer, 0, range(4, 7))
    with optimizer.compression.at("averaged"):
        assert torch.equal(frozen, before)
        assert not torch.equal(other, moving), "the control: the rest is trained"


def test_clipping_after_the_exchange_has_started_is_an_error_and_after_synchronize_it_works() -> None:
    model, optimizer = wrapped(Compression.random_block(8), lr=1.0, momentum=0.0)
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(CompressionError, match="changed after its exchange"):
        optimizer.step()

    model, optimizer = wrapped(Compression.random_block(8), lr=1.0, momentum=0.0)
    before = weights(model)
    backward(model)
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert 0 < (weights(model) - before).norm() < 0.011


def test_a_new_optimizer_takes_the_parameters_over() -> None:
    model, optimizer = wrapped(Compression.random_block(8))
    train(model, optimizer, 0, range(2))
    _, second = wrapped(Compression.random_block(8), model=model)
    train(model, second, 0, range(3))
    assert second.compression.aggregator.state.step == 3
    assert optimizer.compression.aggregator.state.step == 2


def test_uncompressed_training_is_torchs_own_with_learning_rate_zero_too() -> None:
    runs = []
    for wrap in (False, True):
        model = mlp()
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
        if wrap:
            optimizer = DistributedOptimizer(optimizer, model.named_parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 3))
        for t in range(6):
            optimizer.zero_grad()
            backward(model, t)
            optimizer.step()
            schedule.step()
        runs.append(weights(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("growth", [1.0, 2.0, 0.5])
def test_the_residual_follows_the_loss_scale(growth: float) -> None:
    """x − η·e is what uncompressed SGD would have, whatever the scale does; without attach(…, scaler) it is not (the control)."""

    class Scaler:
        scale = 8.0

        def get_scale(self) -> float:
            return self.scale

    def run(attached: bool) -> torch.Tensor:
        x = torch.nn.Parameter(torch.zeros(2))
        scaler: Any = Scaler()
        compression = Compression(TopK(k=1), dense_below=0, dense_1d=False).bind([("x", x)])
        optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=1.0), [("x", x)], compression)
        if attached:
            compression.attach(optimizer, scaler)
        for t in range(4):
            optimizer.zero_grad()
            (x @ torch.tensor([1.0, 0.4]) * scaler.scale).backward()
            optimizer.synchronize()
            x.grad = x.grad / scaler.scale if x.grad is not None else None
            with optimizer.skip_synchronize():
                optimizer.step()
            if t == 1:
                scaler.scale *= growth
        residual = compression.state_dict()["parameters"]["x"]["residual"]
        return x.detach() - residual

    torch.testing.assert_close(run(attached=True), torch.tensor([-4.0, -1.6]))
    assert not torch.allclose(run(attached=False), torch.tensor([-4.0, -1.6]), atol=0.05)


def test_writing_to_shifted_parameters_is_an_error_and_inside_at_it_is_kept() -> None:
    model, optimizer = wrapped(Compression.detached(8))
    train(model, optimizer, 0, range(3))
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    with pytest.raises(CompressionError, match=r"0\.weight.*averaged"):
        train(model, optimizer, 0, range(3, 4))

    model, optimizer = wrapped(Compression.detached(8))
    train(model, optimizer, 0, range(3))
    with optimizer.compression.at("averaged"), torch.no_grad():
        model[0].weight.fill_(3.0)
    with optimizer.compression.at("averaged"):
        assert (model[0].weight == 3.0).all()
    assert not (model[0].weight == 3.0).all(), "shifted by what is in the residual"
    train(model, optimizer, 0, range(3, 4))
    with optimizer.compression.at("averaged"):
        assert (model[0].weight - 3.0).abs().max() < 1.0


def test_points_are_not_nested_and_hold_no_training_step() -> None:
    model, optimizer = wrapped(Compression.detached(8))
    train(model, optimizer, 0, range(3))
    with optimizer.compression.at("virtual"):
        with pytest.raises(CompressionError, match="leave that block"), optimizer.compression.at("averaged"):
            pass
        with pytest.raises(CompressionError, match="inside"):
            train(model, optimizer, 0, range(3, 4))


@pytest.mark.parametrize("what", ["lr", "momentum", "class", "sum"])
def test_ranks_with_other_hyper_parameters_are_told(what: str) -> None:
    def worker(transport: Transport) -> str:
        odd = transport.rank == 1
        model = mlp()
        cls: Any = torch.optim.Adam if what == "class" and odd else torch.optim.SGD
        options = {} if cls is torch.optim.Adam else {"momentum": 0.5 if what == "momentum" and odd else 0.9}
        inner = cls(model.parameters(), lr=0.01, **options)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), transport=transport, sum_gradients=what == "sum" and odd)
        train(model, optimizer, transport.rank, range(1)) if what == "lr" else None
        if what == "lr" and odd:
            optimizer.param_groups[0]["lr"] = 0.0  # this rank would send nothing
        with pytest.raises(DisagreementError) as told:
            train(model, optimizer, transport.rank, range(1, 2))
        return str(told.value)

    named = {"lr": "lr=0.01", "momentum": "momentum=0.5", "class": "Adam", "sum": "summed"}[what]
    assert all(named in message for message in run_simulated(2, worker))


def test_half_precision_with_feedback_saturates_and_loses_nothing() -> None:
    x = torch.nn.Parameter(torch.zeros(1))
    compression = Compression.fp16(error_feedback=True, dense_below=0, dense_1d=False).bind([("x", x)])
    optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=1.0), [("x", x)], compression)
    for gradient in (1e6, *[0.0] * 20):
        optimizer.zero_grad()
        (x * gradient).sum().backward()
        optimizer.step()
    assert compression.undone_steps == 0
    torch.testing.assert_close(x.detach(), torch.tensor([-1e6]))


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("n", [2, 3])
def test_a_sum_of_saturated_workers_stays_in_range(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sends 1/n of half precision's range at most, the rest later. As if each were alone (control) the sum overflows, and the step is undone."""

    def run() -> list[Any]:
        def worker(transport: Transport) -> Any:
            x = torch.nn.Parameter(torch.zeros(4))
            method = Compression.fp16(error_feedback=True, dense_below=0, dense_1d=False)
            optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=1.0), [("x", x)], method, transport=transport)
            for gradient in (1e5, *[0.0] * 12):
                x.grad = torch.full((4,), gradient)
                optimizer.step()
            return x.detach(), optimizer.compression.undone_steps

        return run_simulated(n, worker)

    for x, undone in run():
        assert undone == 0
        torch.testing.assert_close(x, torch.full((4,), -1e5), rtol=1e-3, atol=0)  # the sum is rounded to half precision
    monkeypatch.setattr(StepContext, "key", lambda self, compressor, stage, rank=None: Key(self.seed, self.step, None, stage, 1))
    for x, undone in run():
        assert undone > 0
        assert not x.any()


def test_other_classes_and_types_are_refused() -> None:
    class Lars(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            """Something else."""

    model = mlp()
    with pytest.raises(CompressionError, match="Lars"):
        DistributedOptimizer(Lars(model.parameters(), lr=0.1), model.named_parameters(), Compression.detached())
    for wrong in (lambda: TwoPass("x"), lambda: TwoPass(TopK), lambda: TwoPass(server_feedback="no")):  # type: ignore[arg-type]
        with pytest.raises(CompressionError):
            wrong()
    with pytest.raises(CompressionError, match="dense_1d"):
        Compression.top_k(dense_1d="no")
    with pytest.raises(CompressionError, match="expected a module"):
        Compression.top_k().bind(None)  # type: ignore[arg-type]
    for state in (None, {}, {"format": 1}):
        with pytest.raises(CompressionError):
            Compression.top_k().bind(model).load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize(("compression", "replicas"), [(Compression.random_block(8), "equal"), (Compression.detached(8), "equal_at_x")])
def test_what_a_method_says_of_its_replicas_is_so(compression: Compression, replicas: str) -> None:
    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression, transport=transport)
        train(model, optimizer, transport.rank, range(4))
        between = weights(model)
        with optimizer.compression.at("averaged"):
            return optimizer.compression.replicas, between, weights(model)

    (said, between, x), (_, other_between, other_x) = run_simulated(2, worker)
    assert said == replicas
    assert torch.equal(x, other_x)
    assert torch.equal(between, other_between) == (replicas == "equal")
