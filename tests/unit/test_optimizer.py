"""hvd_ecsgd.DistributedOptimizer on simulated workers: training, buckets, gradients that are late or shared, schedules, lifetimes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.protocols import Traffic
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, by_name, ids, rows_that_cover
from tests.problems import batch, mlp, same_bits, simulate, train, weights

N = 3


def loss_at(model: torch.nn.Module, rank: int) -> float:
    return sum(torch.nn.functional.cross_entropy(model(batch(rank, s)[0]), batch(rank, s)[1]).item() for s in range(4))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_training_converges_with_the_same_bits_on_all_ranks(case: Case) -> None:
    def after(model: torch.nn.Module, optimizer: Any, transport: Transport) -> Any:
        with optimizer.compression.at("averaged"):
            return weights(model), loss_at(model, transport.rank), optimizer.compression.traffic

    results = simulate(2, case.make, range(40), lr=0.05, momentum=case.momentum, after=after)
    assert same_bits(w for w, *_ in results)
    start = sum(loss_at(mlp(), r) for r in range(2))
    assert sum(loss for _, loss, _ in results) < case.converges * start


def test_uncompressed_training_is_training_on_all_data() -> None:
    """`none` on three workers is torch.optim.SGD on the mean of their losses."""
    model = mlp(torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(12):
        sgd.zero_grad()
        losses = [torch.nn.functional.cross_entropy(model(x), y) for x, y in (batch(r, step, torch.float64) for r in range(N))]
        torch.stack(losses).mean().backward()
        sgd.step()
    assert (simulate(N, lambda: Compression.none, dtype=torch.float64)[0] - weights(model)).abs().max() < 1e-13
    assert (simulate(2, lambda: Compression.none, dtype=torch.float64)[0] - weights(model)).abs().max() > 1e-3, "control: other data"


def counted(make: Callable[[], Any], momentum: float = 0.9) -> list[Traffic]:
    return simulate(N, make, momentum=momentum, after=lambda model, optimizer, transport: optimizer.compression.traffic)


@pytest.fixture(scope="module")
def dense() -> Traffic:
    return counted(lambda: Compression.none)[0]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_traffic_is_counted(case: Case, dense: Traffic) -> None:
    """Bytes per worker: what the payloads of twelve steps hold; a compressing method sends less than a dense one."""
    traffic = counted(case.make, case.momentum)
    total = sum(p.numel() for p in mlp().parameters())
    assert dense.payload == 12 * 4 * total
    assert dense.ratio == pytest.approx(1.0)
    if case.saves and case.name not in ("none", "local_momentum-dense"):
        assert all(t.payload < dense.payload for t in traffic)
        assert all(t.ratio > 1.0 for t in traffic)
    assert all(t.dense == pytest.approx(dense.dense, rel=1e-3) for t in traffic)  # rounded down to bytes, bucket by bucket


# -- buckets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_results_do_not_depend_on_buckets(case: Case) -> None:
    """One bucket per parameter, several, and one for all: the same bits (segments, not buckets, are what compressors see)."""
    runs = [simulate(N, case.make, range(6), momentum=case.momentum, bucket_bytes=b)[0] for b in (0, 1000, 25 * 2**20)]
    assert same_bits(runs)


def test_buckets_group_what_may_travel_together() -> None:
    """One bucket for one param group, type and kind; with bucket_bytes=0 one for each parameter."""

    def count(**options: Any) -> int:
        model = torch.nn.Sequential(mlp(), mlp(torch.float64))
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.2}]
        optimizer = DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model.named_parameters(), Compression.top_k(), **options)
        return len(optimizer.compression.aggregator.state.buckets)

    assert count(bucket_bytes=0) == 8
    assert count() == 4  # two groups × (compressed, dense)


@pytest.mark.parametrize(
    ("shape", "dense_1d", "compressed"), [((4, 5), True, True), ((19, 1), True, False), ((20,), True, False), ((20,), False, True)]
)
def test_what_travels_uncompressed(shape: tuple[int, ...], dense_1d: bool, compressed: bool) -> None:
    """Fewer than `dense_below` elements, 20 here, or with `dense_1d` one dimension."""
    p = torch.nn.Parameter(torch.zeros(shape))
    method = Compression.top_k(k=1, error_feedback=False, dense_below=20, dense_1d=dense_1d)
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("p", p)], method)
    p.grad = torch.ones(shape)
    optimizer.step()
    assert int(p.detach().count_nonzero()) == (1 if compressed else p.numel())


# -- gradients that are late, shared, or do not come -----------------------------------------------------------------------------


class Branching(torch.nn.Module):
    """`tied` is used twice, `frozen` does not train, `sometimes` is used when told, `never` not at all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name in ("tied", "frozen", "sometimes", "never"):
            setattr(self, name, torch.nn.Parameter(torch.randn(40, 40, generator=generator) / 6))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = torch.tanh(x @ self.tied @ self.frozen)
        if branch:
            x = torch.tanh(x @ self.sometimes)
        return x @ self.tied


def run_branching(
    make: Callable[[], Any], branch: Callable[[int, int], bool], steps: int = 6, weight_decay: float = 0.0
) -> list[dict[str, torch.Tensor]]:
    def worker(transport: Transport) -> Any:
        model = Branching()
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=weight_decay)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
        for step in range(steps):
            optimizer.zero_grad()
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + transport.rank))
            model(x, branch(transport.rank, step)).square().mean().backward()
            optimizer.step()
        with optimizer.compression.at("averaged"):
            return {n: p.detach().clone() for n, p in model.named_parameters()}

    return run_simulated(N, worker)


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_frozen_tied_and_unused_parameters(case: Case) -> None:
    """Used by one rank only, by all, or by none: no hang, the same bits, frozen and never used ones stay."""
    results = run_branching(case.make, lambda rank, step: (rank + step) % N == 0)
    start = dict(Branching().named_parameters())
    for name in start:
        assert same_bits(r[name] for r in results), name
    for name in ("frozen", "never"):
        assert torch.equal(results[0][name], start[name])
    for name in ("tied", "sometimes"):
        assert not torch.equal(results[0][name], start[name])


def test_what_no_rank_uses_is_decayed_and_what_is_frozen_is_not() -> None:
    """As docs/reliability.md has it: who used a parameter is not sent. In one process without us (the control) it rests."""
    start = dict(Branching().named_parameters())
    for decay in (0.1, 0.0):
        for ends in run_branching(lambda: Compression.random_block(4), lambda rank, step: False, steps=3, weight_decay=decay):
            for name in ("sometimes", "never"):
                torch.testing.assert_close(ends[name], start[name].detach() * (1 - 0.1 * decay) ** 3)
            assert torch.equal(ends["frozen"], start["frozen"])
    model = Branching()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.ones(8, 40), False).square().mean().backward()
    sgd.step()
    assert torch.equal(model.never, start["never"])


def test_a_rank_without_a_gradient_counts_as_zero() -> None:
    """The mean divides by all workers: with `none`, one rank's use of a parameter is a third of its gradient."""
    used_by_one = run_branching(lambda: Compression.none, lambda rank, step: rank == 0, steps=1)[0]["sometimes"]
    alone = Branching()
    alone(torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), True).square().mean().backward()
    assert alone.sometimes.grad is not None
    torch.testing.assert_close(used_by_one, (alone.sometimes - 0.1 * alone.sometimes.grad / N).detach())


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_two_backward_passes_per_step(case: Case) -> None:
    """The sum of two passes is what is exchanged: the run of one pass over the sum of both losses, to rounding."""

    def run(passes: int) -> Any:
        def worker(transport: Transport) -> Any:
            model = mlp(torch.float64)
            sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=case.momentum)
            optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport, backward_passes_per_step=passes)
            for step in range(6):
                optimizer.zero_grad()
                losses = [
                    torch.nn.functional.cross_entropy(model(x), y) for x, y in (batch(transport.rank, 2 * step + i, torch.float64) for i in (0, 1))
                ]
                for loss in losses if passes == 2 else [losses[0] + losses[1]]:
                    loss.backward()
                optimizer.step()
            return weights(model, optimizer.compression)

        return run_simulated(2, worker)

    two, one = run(2), run(1)
    assert same_bits(two)
    assert (two[0] - one[0]).abs().max() < (1e-12 if case.exact else 1e-3)


def test_one_pass_too_many_is_an_error() -> None:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    model(batch(0, 0)[0]).sum().backward()
    with pytest.raises(AssertionError, match="backward_passes_per_step=1"):  # as Horovod raises
        model(batch(0, 0)[0]).sum().backward()
    assert optimizer is not None


# -- schedules -------------------------------------------------------------------------------------------------------------------


def scheduled(make: Callable[[], Any], before_wrapping: bool | None, reload_at: int | None = None) -> list[Any]:
    """Ten steps with StepLR made for the inner optimizer before or after wrapping, for the wrapped one (None)."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule: Any = torch.optim.lr_scheduler.StepLR(inner, 3, 0.5) if before_wrapping else None
        optimizer = DistributedOptimizer(inner, model.named_parameters(), make(), transport=transport)
        schedule = schedule or torch.optim.lr_scheduler.StepLR(optimizer if before_wrapping is None else inner, 3, 0.5)
        for step in range(10):
            if step == reload_at:
                optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer, transport.rank, [step])
            schedule.step()
        return weights(model, optimizer.compression), optimizer.param_groups[0]["lr"]

    return run_simulated(2, worker)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("name", ["none", "top_k", "double_squeeze", "detached"])
def test_schedules_are_followed(name: str) -> None:
    """Made for the wrapped optimizer or for the one inside, before or after wrapping, and after load_state_dict: one and the same run."""
    make = by_name(name).make
    (reference, rate), other = scheduled(make, None)
    assert rate == pytest.approx(0.1 * 0.5**3)
    assert torch.equal(reference, other[0])
    for before_wrapping in (None, False, True):
        for reload_at in (None, 4):
            results = scheduled(make, before_wrapping, reload_at)
            assert same_bits(w for w, _ in results), (before_wrapping, reload_at)
            assert torch.equal(results[0][0], reference), (before_wrapping, reload_at)


def test_the_wrapped_optimizer_is_of_the_optimizers_class() -> None:
    """isinstance, state and param groups are shared with the optimizer that was wrapped; other classes of optimizers work in gradient units."""
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        model = mlp()
        inner = cls(model.parameters(), lr=0.01)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), Compression.top_k(10))
        assert isinstance(optimizer, cls)
        assert optimizer.param_groups is inner.param_groups
        assert all(p.grad is None for p in model.parameters()), "zeros on Horovod"
        before = weights(model)
        train(model, optimizer, 0, range(3))
        assert not torch.equal(weights(model), before)


def test_an_optimizer_is_let_go_and_its_model_with_it() -> None:
    """The hooks of its parameters, which the garbage collector does not see into, must not keep it."""

    def made(**options: Any) -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k(4))
        train(model, optimizer, 0, range(2))
        if options.get("kept"):  # the control: what such a hook refers to stays
            next(model.parameters()).register_post_accumulate_grad_hook(lambda p: optimizer)
        return weakref.ref(model), weakref.ref(optimizer)

    gone, kept = made(), made(kept=True)
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
    assert kept[1]() is not None


def test_an_optimizer_that_is_let_go_takes_its_hooks_along() -> None:
    model = mlp()
    for _ in range(3):
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
        del optimizer
        gc.collect()
    assert [len(p._post_accumulate_grad_hooks) for p in model.parameters()] == [0] * 4


def test_param_groups_have_learning_rates_of_their_own() -> None:
    """A group with learning rate 0 stands still while the other trains, and its residual keeps."""
    model = mlp()
    groups = [{"params": [model[0].weight, model[0].bias], "lr": 0.1}, {"params": [model[2].weight, model[2].bias], "lr": 0.0}]
    optimizer = DistributedOptimizer(torch.optim.SGD(groups), model.named_parameters(), Compression.top_k(10, **ALL))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 0, range(3))
    assert not torch.equal(model[0].weight, start["0.weight"])
    assert torch.equal(model[2].weight, start["2.weight"])
    saved = optimizer.compression.state_dict()["parameters"]
    assert saved["0.weight"]["residual"].any()
    assert "2.weight" not in saved or not saved["2.weight"]["residual"].any()
