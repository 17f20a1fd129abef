"""DEF with local steps, batch-norm statistics that are averaged, and error averaging (docs/algorithms.md §3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.feedback import LocalMomentum
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import batch, flat, mlp, same_bits, simulate, slot, train, weights
from tests.unit.test_invariants import LRS, largest_violation_of_z, trajectory, vary
from tests.versions import cpu_scaler

N = 3


def test_nothing_is_sent_in_local_steps_and_the_model_moves() -> None:
    """p moves in every step as plain momentum SGD; x, and the bytes sent, only in each third. The ranks part and meet again (λ = 0)."""

    def worker(transport: Transport) -> list[Any]:
        model, plain = mlp(), mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.detached(8, 0.0, period=3), transport=transport)
        alone = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        seen = []
        for t in range(6):
            for m, o in ((model, optimizer), (plain, alone)):
                o.zero_grad()
                x, y = batch(transport.rank, t)
                torch.nn.functional.cross_entropy(m(x), y).backward()
                o.step()
            if t < 2:
                torch.testing.assert_close(flat(model.parameters()), flat(plain.parameters()), rtol=0, atol=1e-6)
            seen.append((weights(model, optimizer.compression), flat(model.parameters()), optimizer.compression.traffic.payload))
        return seen

    steps = list(zip(*run_simulated(N, worker), strict=True))
    start = flat(mlp().parameters())
    for t, ranks in enumerate(steps):
        assert same_bits(x for x, _, _ in ranks)
        assert same_bits(p for _, p, _ in ranks) == (t % 3 == 2)
        before = steps[t - 1][0] if t else (start, start, 0)
        assert torch.equal(ranks[0][0], before[0]) == (t % 3 != 2)
        assert not torch.equal(ranks[0][1], before[1])
        assert (ranks[0][2] > before[2]) == (t % 3 == 2)


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_a_bad_gradient_in_a_local_step_concerns_its_rank_alone() -> None:
    def worker(transport: Transport) -> Any:
        model = mlp(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.detached(8, period=4, **ALL), transport=transport)
        held = []
        for t in range(8):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, torch.float64)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss * float("nan") if t == 5 and transport.rank == 1 else loss).backward()
            optimizer.step()
            held.append(flat(model.parameters()))
        return weights(model, optimizer.compression), optimizer.compression.undone_steps, torch.equal(held[4], held[5])

    results = run_simulated(N, worker)
    assert same_bits(x for x, _, _ in results)
    assert results[0][0].isfinite().all()
    assert [(undone, stood_still) for _, undone, stood_still in results] == [(0, False), (1, True), (0, False)]


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("bad_step", [1, 5])
def test_an_overflow_in_a_local_step_lowers_the_scale_of_its_rank_alone(bad_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are in true units, so ranks with different loss scales go on, to the bits of the run without a scaler. Control: compared scales."""

    def run(scaled: bool) -> list[Any]:
        def worker(transport: Transport) -> Any:
            model = mlp()
            sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.detached(8, period=4, **ALL), transport=transport)
            scaler = cpu_scaler(init_scale=2.0**6, enabled=scaled)
            if scaled:
                optimizer.compression.attach(optimizer, scaler)
            for t in range(8):
                optimizer.zero_grad()
                x, y = batch(transport.rank, t)
                loss = torch.nn.functional.cross_entropy(model(x), y)
                scaler.scale(loss * float("inf") if t == bad_step and transport.rank == 1 else loss).backward()
                scaler.step(optimizer)
                scaler.update()
            return weights(model, optimizer.compression), scaler.get_scale(), optimizer.compression.undone_steps

        return run_simulated(N, worker)

    with_scaler, without = run(True), run(False)
    assert [(scale, undone) for _, scale, undone in with_scaler] == [(64.0, 0), (32.0, 1), (64.0, 0)]
    assert same_bits([x for x, *_ in with_scaler] + [x for x, *_ in without])
    monkeypatch.setattr("hvd_ecsgd.core.agreement.compared", lambda state, bucket: state.settings(bucket))
    with pytest.raises(DisagreementError, match="loss_scale"):
        run(True)


@pytest.mark.parametrize("shifted", [True, False])
def test_batch_norm_statistics_are_averaged_where_workers_evaluate_at_different_points(shifted: bool) -> None:
    """After an exchange they are the mean of the ranks' own; between exchanges, and for methods that do not shift (control), each rank's own."""

    def worker(transport: Transport) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
        compression = Compression.detached(4, 0.3 if shifted else 0.0, period=2 if shifted else 1, **ALL).bind(model)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), compression=compression, transport=transport)
        seen = []
        for t in range(4):
            optimizer.zero_grad()
            x, y = batch(transport.rank, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            own = flat([model[1].running_mean, model[1].running_var])  # type: ignore[list-item]
            optimizer.step()
            seen.append((own, flat([model[1].running_mean, model[1].running_var]), int(model[1].num_batches_tracked)))  # type: ignore
        return seen

    for t, ranks in enumerate(zip(*run_simulated(N, worker), strict=True)):
        expected = torch.stack([own for own, _, _ in ranks]).mean(0)
        if shifted and t % 2:
            assert same_bits(after for _, after, _ in ranks)
            torch.testing.assert_close(ranks[0][1], expected)
        else:
            assert all(torch.equal(own, after) for own, after, _ in ranks)
            assert not same_bits(after for _, after, _ in ranks)
        assert [n for *_, n in ranks] == [t + 1] * N


@pytest.mark.parametrize("shifted", [True, False])
def test_ranks_that_bind_other_batch_norm_statistics_are_told(shifted: bool) -> None:
    """Only some would start the collective that averages them. Methods that do not average any do not mind (control)."""

    def worker(transport: Transport) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 5))
        compression = Compression.detached(4, 0.3 if shifted else 0.0, **ALL)
        bound = compression.bind(model if transport.rank == 0 else model.named_parameters())
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=bound, transport=transport)
        x, y = batch(transport.rank, 0)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    if not shifted:
        run_simulated(2, worker)
        return
    with pytest.raises(DisagreementError, match="batch-norm statistics"):
        run_simulated(2, worker)


def averaged(h2: int | None) -> Callable[[], Compression]:
    return lambda: Compression.detached(8, 1.0, average_errors=h2, **ALL)


def test_error_averaging_keeps_the_virtual_iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step all ranks hold the same residual, and z moves as before. With a sum in place of the mean (control) it does not."""
    records = trajectory(averaged(2), LRS, momentum=0.9, change=vary)
    assert largest_violation_of_z(records, LRS) < 1e-12
    for t, ranks in enumerate(records):
        assert same_bits(r.e for r in ranks) == (t % 2 == 1)
        assert ranks[0].e.abs().max() > 1e-4
    assert not torch.equal(records[-1][0].x, trajectory(averaged(None), LRS, momentum=0.9, change=vary)[-1][0].x), "control: it does something"

    def add_up(self: LocalMomentum, parts: Any, key: Any, right: Any = LocalMomentum.between_steps) -> Any:
        for tensors in right(self, parts, key):
            yield tensors
            for t in tensors:
                t.mul_(N)

    monkeypatch.setattr(LocalMomentum, "between_steps", add_up)
    assert largest_violation_of_z(trajectory(averaged(2), LRS, momentum=0.9, change=vary), LRS) > 1e-3


def test_what_rests_is_not_averaged() -> None:
    """A param group with η = 0 in the step that averages: its residuals and parameters stay. The other group (control) is averaged, and moves."""

    def worker(transport: Transport) -> Any:
        model = mlp(torch.float64)
        groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]
        optimizer = DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model.named_parameters(), averaged(3)(), transport=transport)
        compression, before = optimizer.compression, []
        for t in range(4):
            optimizer.param_groups[1]["lr"] = 0.1 if t != 2 else 0.0
            before = [(flat(m.parameters()), e(compression, i)) for i, m in ((0, model[0]), (2, model[2]))]
            train(model, optimizer, transport.rank, [t])
            after = [(flat(m.parameters()), e(compression, i)) for i, m in ((0, model[0]), (2, model[2]))]
            with compression.at("averaged"):
                x = [flat(m.parameters()) for m in (model[0], model[2])]
            for (held, residual), averaged_point in zip(after, x, strict=True):
                torch.testing.assert_close(held, averaged_point - residual, rtol=0, atol=1e-14)
            if t == 2:
                kept = [(torch.equal(p, q), torch.equal(r, s)) for (p, r), (q, s) in zip(before, after, strict=True)]
                residuals = [r for _, r in after]
        return kept, residuals

    def e(compression: Any, layer: int) -> torch.Tensor:
        saved = compression.state_dict()["parameters"]
        return flat(saved[f"{layer}.{p}"]["residual"] if f"{layer}.{p}" in saved else torch.zeros(1) for p in ("weight", "bias"))

    results = run_simulated(N, worker)
    assert all(kept == [(False, False), (True, True)] for kept, _ in results)
    assert same_bits(r[0] for _, r in results)
    assert not same_bits(r[1] for _, r in results)


def test_what_averaging_sends_is_counted() -> None:
    """Four exchanges of one eighth, and one dense average of all residuals."""

    def sent(make: Callable[[], Compression]) -> int:
        return int(simulate(2, make, range(4), after=lambda m, o, t: (o.compression.traffic.payload, slot(o.compression, "residual")))[0][0])

    d = flat(mlp().parameters()).numel()
    assert sent(averaged(4)) - sent(averaged(None)) == 4 * d
    plain, with_dense = (lambda h2=h2: Compression.detached(8, 1.0, average_errors=h2) for h2 in (None, 4))  # type: ignore[misc]
    assert sent(with_dense) - sent(plain) == 4 * mlp()[0].weight.numel(), "what travels uncompressed has no errors"
    assert sent(averaged(None)) == 4 * sum(4 * max(1, p.numel() // 8) for p in mlp().parameters())


def test_statistics_that_are_averaged_are_counted() -> None:
    """Mean and variance of 16 channels in each of 4 exchanges; where the module is not bound (control) there are none."""

    def worker(transport: Transport) -> int:
        sent = []
        for module in (True, False):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 5))
            compression = Compression.detached(4, 0.3, **ALL).bind(model if module else model.named_parameters())
            optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=compression, transport=transport)
            for t in range(4):
                optimizer.zero_grad()
                x, y = batch(transport.rank, t)
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            sent.append(compression.traffic.payload)
        return sent[0] - sent[1]

    assert run_simulated(2, worker) == [4 * 2 * 16 * 4] * 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None])
def test_a_period_that_is_none(wrong: Any) -> None:
    with pytest.raises(CompressionError, match="period"):
        Compression.detached(8, period=wrong)


@pytest.mark.parametrize("wrong", [0, -4, 1.5, True, "2", 3])
def test_error_averaging_that_does_not_fit(wrong: Any) -> None:
    with pytest.raises(CompressionError, match="average_errors"):
        LocalMomentum(1.0, period=2, average_errors=wrong)
