"""hvd_ecsgd.DistributedOptimizer on simulated workers: hooks, buckets, schedules, and ranks that disagree."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock, Sign, TopK
from hvd_ecsgd.exchange import AllGather, TwoPass
from hvd_ecsgd.feedback import NoFeedback
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids
from tests.problems import batch, flat, mlp, same_bits, simulate, train, weights

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


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_traffic_is_counted(case: Case) -> None:
    """Bytes per worker: what the payloads of twelve steps hold; a compressing method sends less than a dense one."""
    traffic = simulate(N, case.make, momentum=case.momentum, after=lambda m, o, t: o.compression.traffic)
    dense = simulate(N, lambda: Compression.none, after=lambda m, o, t: o.compression.traffic)[0]
    total = sum(p.numel() for p in mlp().parameters())
    assert dense.payload == 12 * 4 * total
    assert dense.ratio == pytest.approx(1.0)
    if case.saves and case.name not in ("none", "local_momentum-dense"):
        assert all(t.payload < dense.payload for t in traffic)
        assert all(t.ratio > 1.0 for t in traffic)
    assert all(t.dense == pytest.approx(dense.dense, rel=1e-3) for t in traffic)  # rounded down to bytes, bucket by bucket


# -- buckets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_results_do_not_depend_on_buckets(case: Case) -> None:
    """One bucket per parameter, several, and one for all: the same bits (segments, not buckets, are what compressors see)."""
    runs = [simulate(N, case.make, momentum=case.momentum, bucket_bytes=b)[0] for b in (0, 1000, 25 * 2**20)]
    assert same_bits(runs)


def test_buckets_group_what_may_travel_together() -> None:
    """One bucket for one param group, type and kind; with bucket_bytes=0 one for each parameter."""

    def count(**options: Any) -> int:
        model = torch.nn.Sequential(mlp(), mlp(torch.float64))
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.2}]
        optimizer = DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model.named_parameters(), Compression.top_k(), **options)
        return len(optimizer.compression.aggregator.buckets)

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


@pytest.mark.parametrize("case", CASES, ids=ids)
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


def test_a_rank_without_a_gradient_counts_as_zero() -> None:
    """The mean divides by all workers: with `none`, one rank's use of a parameter is a third of its gradient."""
    used_by_one = run_branching(lambda: Compression.none, lambda rank, step: rank == 0, steps=1)[0]["sometimes"]
    alone = Branching()
    alone(torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), True).square().mean().backward()
    assert alone.sometimes.grad is not None
    torch.testing.assert_close(used_by_one, (alone.sometimes - 0.1 * alone.sometimes.grad / N).detach())


@pytest.mark.parametrize("case", CASES, ids=ids)
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


# -- synchronize and step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "top_k", "double_squeeze", "random_block"])
def test_clipping_between_synchronize_and_step(name: str) -> None:
    """The mean is what is clipped: the update has the clipped norm on every rank, and is not exchanged again."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), by_name(name).make(), transport=transport
        )
        norms = []
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(transport.rank, step)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            before = weights(model)
            with optimizer.skip_synchronize():
                optimizer.step()
            norms.append((weights(model) - before).norm().item())
        return weights(model), norms, optimizer.compression.state_dict()["step"]

    results = run_simulated(N, worker)
    assert same_bits(w for w, *_ in results)
    for _, norms, steps in results:
        assert norms == pytest.approx([0.01] * 3, rel=1e-3)
        assert steps == 3


def test_the_order_of_calls_is_checked() -> None:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.top_k())
    with pytest.raises(CompressionError, match="synchronize"), optimizer.skip_synchronize():
        optimizer.step()
    model(batch(0, 0)[0]).sum().backward()
    with pytest.raises(AssertionError, match="zero_grad"):  # as Horovod raises
        optimizer.zero_grad()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()


def test_what_is_exchanged_is_not_exchanged_again() -> None:
    """`synchronize()` twice, or before a plain `step()`, warns, as Horovod does of the latter, and is the ordinary step."""
    weights_of = []
    for calls in ("step", "synchronize step", "synchronize synchronize step"):
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.random_block(8, **ALL))
        for t in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch(0, t)[0]), batch(0, t)[1]).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for call in calls.split():
                    getattr(optimizer, call)()
            assert ["not exchanged again" in str(w.message) for w in caught] == [True] * (len(calls.split()) - 1)
        weights_of.append(flat(model.parameters()))
    assert same_bits(weights_of)


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_of_a_step_that_has_begun_are_not_dropped(overlap: bool) -> None:
    """In the middle of an accumulation, say. After the step they are (control)."""
    model = mlp()
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), backward_passes_per_step=2, overlap=overlap
    )
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            model(batch(0, 0)[0]).sum().backward()
            with pytest.raises(AssertionError, match="zero_grad"):
                optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_zero_grad_either_way(case: Case, set_to_none: bool) -> None:
    """Gradients that are kept and zeroed give the run of gradients that are dropped."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), case.make(), transport=transport)
        for step in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            x, y = batch(transport.rank, step)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return weights(model, optimizer.compression)

    assert torch.equal(run_simulated(2, worker)[0], simulate(2, case.make, range(4), momentum=0, weight_decay=0)[0])


def test_closures() -> None:
    """Evaluated once, its value is returned, and the step is the ordinary one."""
    values = []

    def worker(transport: Transport) -> Any:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.top_k(10), transport=transport)
        for step in range(12):
            calls = []

            def closure(step: int = step, calls: list[int] = calls) -> torch.Tensor:
                calls.append(step)
                optimizer.zero_grad()
                x, y = batch(transport.rank, step)
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            values.append(optimizer.step(closure).item())
            assert calls == [step]
        return weights(model)

    assert torch.equal(run_simulated(2, worker)[0], simulate(2, by_name("top_k").make)[0])
    assert values


@pytest.mark.parametrize("case", [c for c in CASES if not bound_method(c).feedback.takes.update], ids=ids)
def test_sums_are_n_times_means(case: Case) -> None:
    """With a learning rate divided by n (a power of two: exact) the run with sums is the run with means."""
    means = simulate(2, case.make, lr=0.125, weight_decay=0)
    sums = simulate(2, case.make, lr=0.0625, weight_decay=0, sum_gradients=True)
    assert torch.equal(means[0], sums[0])
    assert not torch.equal(means[0], simulate(2, case.make, lr=0.0625, weight_decay=0)[0]), "control: half the step"


# -- sparse gradients ------------------------------------------------------------------------------------------------------------


class Words(torch.nn.Module):
    """A table, of which the last worker uses nothing in even steps, and a layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = torch.nn.Embedding(90, 16, sparse=sparse)
        self.out = torch.nn.Linear(16, 5)

    def forward(self, rank: int, step: int) -> torch.Tensor:
        if rank == N - 1 and step % 2 == 0:
            return self.out(torch.ones(3, 16, dtype=self.out.weight.dtype))
        return self.out(self.table(torch.arange(7 * rank, 7 * rank + 12) % (20 + 30 * (step % 3))))


def run_words(
    sparse: bool, make: Callable[[], Any], sgd: Callable[[Words], torch.optim.Optimizer], scaled: bool = False, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Weights, the layouts of the table's gradients that the optimizer was given, and whether all could be saved and joined, by rank."""

    def worker(transport: Transport) -> Any:
        model = Words(sparse).to(dtype)
        optimizer = DistributedOptimizer(sgd(model), model.named_parameters(), make(), transport=transport)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=scaled)
        optimizer.compression.attach(optimizer, scaler)
        layouts = []
        for step in range(7):
            optimizer.param_groups[0]["lr"] = 0.0 if step == 4 else 0.1
            optimizer.zero_grad(set_to_none=step % 3 > 0)
            loss = model(transport.rank, step).square().mean()
            if loss.requires_grad:
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            grad = model.table.weight.grad
            layouts.append(None if grad is None else grad.is_sparse)
        optimizer.zero_grad()
        if transport.rank:  # rank 0 has no more batches
            model(1, 7).square().mean().backward()
            optimizer.step()
        optimizer.join()
        assert not any(t.is_sparse for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)), "can be saved"
        return weights(model, optimizer.compression), layouts

    return run_simulated(N, worker)


SGDS: dict[str, Callable[[Words], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, eps=1e-3),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["none", "fp16", "top_k", "double_squeeze", "random_block", "detached"])
def test_sparse_gradients_are_those_of_a_dense_table(name: str, scaled: bool) -> None:
    sparse, dense = (run_words(s, by_name(name).make, SGDS["momentum"], scaled) for s in (True, False))
    assert same_bits(w for w, _ in sparse)
    torch.testing.assert_close(sparse[0][0], dense[0][0], rtol=0, atol=1e-6)  # repeated words are added in another order
    assert (sparse[0][0] - weights(Words(True))).abs().max() > 1e-2, "control: it moved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", SGDS)
def test_replicas_stay_equal_under_any_optimizer(inner: str, dtype: torch.dtype) -> None:
    """Also where a worker does not use the table in the first step; optimizers round sparse and dense steps differently."""
    results = run_words(True, lambda: Compression.none, SGDS[inner], dtype == torch.float16, dtype)
    assert same_bits(w for w, _ in results)
    assert not any(layout for _, layouts in results for layout in layouts)


def test_sparse_adam_is_given_sparse_means() -> None:
    """On a worker that does not use the table, too. The run is that of one process with the mean of all gradients."""

    def adam(model: Words) -> torch.optim.Optimizer:
        model.out.requires_grad_(False)
        return torch.optim.SparseAdam([model.table.weight], lr=0.1)

    found = run_words(True, lambda: Compression.none, adam)
    assert all(all(layouts) for _, layouts in found)
    model = Words(True)
    alone = adam(model)
    for step in range(8):
        alone.param_groups[0]["lr"] = 0.0 if step == 4 else 0.1
        alone.zero_grad()
        losses = [model(r, step).square().mean() for r in range(N) if r < N - 1 or step % 2] if step < 7 else [model(1, 7).square().mean()] * (N - 1)
        (torch.stack(losses).sum() / N).backward()
        alone.step()
    assert same_bits(w for w, _ in found)
    torch.testing.assert_close(found[0][0], weights(model), rtol=0, atol=1e-6)
    assert not torch.allclose(weights(model), weights(Words(True)), atol=1e-2), "control: it moved"


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


# -- ranks that disagree ---------------------------------------------------------------------------------------------------------

DISAGREEMENTS: dict[str, tuple[Callable[[bool], Any], str]] = {
    "ratio": (lambda odd: Compression.random_block(8 if odd else 4), "compressor.*ratio=4.*ratio=8"),
    "compressor": (lambda odd: Compression(Sign() if odd else TopK(), exchange=AllGather()), "compressor"),
    "scale": (lambda odd: Compression.one_bit("l2" if odd else "l1"), "compressor.*l1.*l2"),
    "feedback": (lambda odd: Compression.top_k(error_feedback=not odd), "feedback"),
    "lambda": (lambda odd: Compression.detached(8, 0.5 if odd else 0.3), "feedback"),
    "exchange": (lambda odd: Compression(Sign(), exchange=TwoPass() if odd else AllGather()), "exchange"),
    "server": (lambda odd: Compression.double_squeeze(Sign(), RandomBlock(4) if odd else None), "exchange"),
    "seed": (lambda odd: Compression.random_block(8, seed=int(odd)), "seed.*0.*1"),
    "dense_below": (lambda odd: Compression.one_bit(dense_below=10 if odd else 20), "dense_below"),
    "dense_1d": (lambda odd: Compression.one_bit(dense_1d=odd), "dense_1d"),
    "no compression": (lambda odd: Compression.none if odd else Compression(TopK(), NoFeedback()), "compressor"),
}


def disagreement(make: Callable[[bool], Any], model_of: Callable[[bool], torch.nn.Module]) -> list[Any]:
    def worker(transport: Transport) -> Any:
        odd = transport.rank == N - 1
        model = model_of(odd)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), make(odd), transport=transport)
        before = weights(model)
        try:
            train(model, optimizer, transport.rank, range(1))
        except DisagreementError as error:
            return str(error), torch.equal(weights(model), before)
        return "nothing was raised", False

    return run_simulated(N, worker, timeout=20)


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_every_rank_names_the_setting_that_differs(what: str) -> None:
    make, message = DISAGREEMENTS[what]
    results = disagreement(make, lambda odd: mlp())
    for said, unchanged in results:
        assert re.search(message, said), said
        assert "rank 0" in said
        assert f"rank {N - 1}" in said
        assert unchanged


def wider(odd: bool) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(20, 128 if odd else 64), torch.nn.Linear(128 if odd else 64, 5))


def test_every_rank_names_the_parameter_that_differs() -> None:
    for said, unchanged in disagreement(lambda odd: Compression.top_k(), wider):
        assert re.search(r"'0\.weight'.*\(64, 20\).*\(128, 20\)", said), said
        assert unchanged


def test_ranks_that_agree_are_left_alone() -> None:
    """Control: the same check on equal settings."""
    assert all(said == "nothing was raised" for said, _ in disagreement(lambda odd: Compression.top_k(), lambda odd: mlp()))


@pytest.mark.parametrize("other", [1600, 1200])
def test_ranks_with_other_buckets_are_told(other: int) -> None:
    """Also where there are as many: [300], [100, 200] elements are not [300, 100], [200]. With equal ones (control) nothing is raised."""

    def worker(transport: Transport) -> None:
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(size)) for name, size in (("a", 200), ("b", 100), ("c", 300))})
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model.named_parameters(),
            Compression.random_block(4, **ALL),
            transport=transport,
            bucket_bytes=other if transport.rank else 1200,
        )
        torch.stack([p.sum() for p in model.values()]).sum().backward()
        optimizer.step()

    if other == 1200:
        run_simulated(2, worker)
        return
    with pytest.raises(DisagreementError, match="parameters per bucket"):
        run_simulated(2, worker)
