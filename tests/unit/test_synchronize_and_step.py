"""What scripts do between the backward pass and the optimizer's step, and the order of calls."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import batch, flat, mlp, same_bits, simulate, weights

N = 3


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
    step, again = "optimizer.step() called without optimizer.skip_synchronize()", "optimizer.synchronize() called again"
    for calls, told in {"step": [], "synchronize step": [step], "synchronize synchronize step": [again, step]}.items():
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
            assert [str(w.message).partition(" after optimizer.synchronize(): ")[0] for w in caught] == told
            assert all("not exchanged again" in str(w.message) and w.filename == __file__ for w in caught)
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
@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
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


@pytest.mark.parametrize("case", rows_that_cover([c for c in CASES if not bound_method(c).feedback.takes.update]), ids=ids)
def test_sums_are_n_times_means(case: Case) -> None:
    """With a learning rate divided by n (a power of two: exact) the run with sums is the run with means."""
    means = simulate(2, case.make, lr=0.125, weight_decay=0)
    sums = simulate(2, case.make, lr=0.0625, weight_decay=0, sum_gradients=True)
    assert torch.equal(means[0], sums[0])
    assert not torch.equal(means[0], simulate(2, case.make, lr=0.0625, weight_decay=0)[0]), "control: half the step"
