"""What is measured in steps: it changes nothing, it is true, and what a method does not have is absent (docs/telemetry.md)."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer, GradientExchange
from hvd_ecsgd.asynchronous import CutoffWorker, plan_of
from hvd_ecsgd.asynchronous.simulated import SimulatedJob
from hvd_ecsgd.compressors import QSGD, RandomBlock, Sign, TopK
from hvd_ecsgd.core import meter, step
from hvd_ecsgd.exchange import AllGather, CompSkip, Every
from hvd_ecsgd.feedback import ErrorFeedback
from hvd_ecsgd.optimizer.distributed import driver_of
from hvd_ecsgd.telemetry import FIELDS, Logger
from hvd_ecsgd.telemetry.health import Health
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import ALL, Case, by_name, ids
from tests.problems import batch, mlp, train, weights
from tests.unit.test_asynchronous import Gradients, seeded, sgd
from tests.unit.test_cutoff import METHODS, Ranks
from tests.unit.test_horovod_slot import OneSlot

STEPS = 7


class Kept:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.closed = False

    def write(self, record: Any) -> None:
        self.lines.append(json.loads(json.dumps(record, allow_nan=False)))

    def close(self) -> None:
        self.closed = True

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.of("step")


def wrapped(transport: Transport, compression: Any, momentum: float = 0.0, lr: float = 0.1) -> tuple[torch.nn.Sequential, Any]:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=1e-4)
    return model, DistributedOptimizer(sgd, model.named_parameters(), compression, transport=transport)


def trained(case: Case, measured: bool, lr: float = 0.1, n: int = 2) -> list[tuple[torch.Tensor, Kept, Any]]:
    """By rank: the weights after some steps, with an inf on rank 1 in the last but one, what was recorded, and the compression."""

    def worker(transport: Transport) -> tuple[torch.Tensor, Kept, Any]:
        model, optimizer = wrapped(transport, case.make(), case.momentum, lr)
        kept = Kept()
        if measured:
            Logger(optimizer.compression, kept, norms_every=1, ranks="all")
        train(model, optimizer, transport.rank, range(STEPS - 2))
        x, y = batch(transport.rank, STEPS - 2)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        (loss * float("inf") if transport.rank == n - 1 else loss).backward()
        optimizer.step()
        train(model, optimizer, transport.rank, [STEPS - 1])
        return weights(model, optimizer.compression), kept, optimizer.compression

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a gradient or a payload held an inf")
        return run_simulated(n, worker)


SOME = ("none", "fp16-feedback", "random_block", "top_k-k", "double_squeeze", "comp_skip-norm", "comp_skip-all_reduce", "cser-everything",
        "power_sgd", "qsgd", "hessian_aided-squares-double_squeeze", "detached", "detached-local_steps-average_errors")  # fmt: skip


@pytest.mark.parametrize("case", [by_name(name) for name in SOME], ids=ids)
def test_results_are_the_same_to_the_bit(case: Case) -> None:
    """And records are whole: one for each step, bytes that add up to those that are counted anyway, names that are explained."""
    with_it, without, other = (trained(case, *how) for how in ((True,), (False,), (False, 0.09)))
    for (a, kept, compression), (b, nothing, plain), (c, _, _) in zip(with_it, without, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c), "the control: another learning rate"
        assert plain.traffic == compression.traffic and not nothing.lines
        records, names = kept.steps, {f.name for f in FIELDS}
        assert [r["step"] for r in records] == list(range(STEPS)) and sum(r["steps"] for r in records) == STEPS
        for field in ("payload", "sent", "dense", "skipped"):
            counted = sum(r.get(f"{field}_bytes", 0) for r in records)
            assert counted == getattr(compression.traffic, field)
        for r in records:
            assert set(r) | {name for g in r["groups"] for name in g} <= names | {"kind", "rank", "groups"}
            assert r["kernel_seconds"] > 0 and r["wire_seconds"] >= 0 <= r["wait_seconds"]
            if r["outcome"] in ("local", "silent"):
                assert "relative_error" not in r and r["groups"][0]["staleness_steps"] > 0
            assert ("gradient_norm" in r) is (r["outcome"] not in ("local", "undone"))
    local = bool(getattr(compression.method.feedback, "period", 1) > 1)
    outcomes = [[r["outcome"] for r in kept.steps] for _, kept, _ in with_it]
    assert local or all(o[STEPS - 2] == "undone" for o in outcomes)
    assert ("local" in outcomes[0]) is local and ("silent" in outcomes[0]) is (case.name == "comp_skip-all_reduce")


def test_what_rank_0_sends_the_others_receive() -> None:
    """Three workers: an all-gather of payloads that differ in length, counted at the sender and at the receivers."""
    records = [kept.steps[0] for _, kept, _ in trained(by_name("threshold"), True, n=3)]
    dense = [2 * 2 * (4 * (64 + 64 * 5 + 5)) // 3 for _ in records]  # what is not compressed rides all-reduces
    sent = [r["sent_bytes"] - d for r, d in zip(records, dense)]
    for i, r in enumerate(records):
        others = sum(s // 2 for j, s in enumerate(sent) if j != i)
        assert abs(r["received_bytes"] - dense[i] - others) <= 8  # of divisions
    assert len({r["payload_bytes"] for r in records}) > 1, "the control: they do differ"


def exchange(compression: Any, kept: Kept, numel: int = 4000, transport: Any = None, **options: Any) -> tuple[GradientExchange, Logger]:
    model = torch.nn.Linear(numel, 1, bias=False)
    made = GradientExchange(model.named_parameters(), compression, transport, **options)
    return made, Logger(made.compression, kept, norms_every=1)


def test_norms_are_those_of_the_state() -> None:
    """Step by step: u = e + g, what top-k leaves of it by its own `delta`, and the residual that is saved."""
    kept = Kept()
    made, _ = exchange(Compression.top_k(20, **ALL), kept)
    e = torch.zeros(4000, dtype=torch.float32)
    for i in range(4):
        g = torch.randn(1, 4000, generator=torch.Generator().manual_seed(i))
        made.reduce([g])
        u, before = g.flatten() + e, float(torch.linalg.vector_norm(g))
        e = made.compression.state_dict()["parameters"]["weight"]["residual"].flatten()
        r = kept.steps[-1]
        assert r["gradient_norm"] == pytest.approx(before, rel=1e-5)
        assert r["residual_norm"] == pytest.approx(float(e.norm()), rel=1e-5)
        assert r["residual_to_gradient"] == pytest.approx(float(e.norm()) / before, rel=1e-5)
        assert 1 - r["relative_error"] ** 2 == pytest.approx(TopK(20).delta(u), rel=1e-4)
    assert kept.steps[0]["residual_norm"] != pytest.approx(kept.steps[3]["residual_norm"], rel=1e-2)


def test_residuals_in_updates_are_weighed_by_the_learning_rate() -> None:
    """So the ratio to the gradient is the same in either unit, at any learning rate."""
    found = []
    for compression, options in ((Compression.random_block(4, **ALL), {}), *((Compression.pef(4, **ALL), {"lr": lr}) for lr in (0.1, 0.001))):
        kept = Kept()
        made, _ = exchange(compression, kept, **options)
        for i in range(3):
            made.reduce([torch.randn(1, 4000, generator=torch.Generator().manual_seed(i))])
        found.append([r["residual_to_gradient"] for r in kept.steps])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[1] == pytest.approx(found[2], rel=1e-4)


ABSENT = {
    "none": {"relative_error", "residual_norm", "residual_to_gradient", "server_residual_norm", "staleness_steps", "skips", "skipped_bytes"},
    "qsgd": {"residual_norm", "residual_to_gradient", "server_residual_norm", "staleness_steps", "skips", "skipped_bytes"},
    "top_k": {"server_residual_norm", "staleness_steps", "skips", "skipped_bytes"},
    "double_squeeze": {"staleness_steps", "skips", "skipped_bytes"},
    "comp_skip": set(),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_a_method_does_not_have_is_absent(name: str) -> None:
    kept = trained(by_name(name), True)[0][1]
    seen = {field for r in kept.steps for part in (r, *r["groups"]) for field in part}
    assert {f.name for f in FIELDS} - seen == ABSENT[name] | {"staleness_updates"}
    undone = kept.steps[STEPS - 2]
    assert undone["outcome"] == "undone" and undone["undone_steps"] == 1 and "gradient_norm" not in undone


def test_one_worker_has_no_ratio() -> None:
    kept = Kept()
    made, logger = exchange(Compression.top_k(10, **ALL), kept)
    made.reduce([torch.ones(1, 4000)])
    assert "ratio" not in kept.steps[0] and kept.steps[0]["sent_bytes"] == 0 and "total_ratio" not in made.compression.metrics()
    assert "step_seconds" not in kept.steps[0]
    logger.close()
    made.reduce([torch.ones(1, 4000)])
    assert len(kept.steps) == 1 and kept.closed


@pytest.mark.parametrize("offset", [0, 1])
def test_silence_is_counted(offset: int) -> None:
    """`Every(2)`: the worker sends in every other step; norms are taken of one in which it does, whichever those of `norms_every=2` are."""
    kept = Kept()
    method = Compression(TopK(10), ErrorFeedback(), CompSkip(Every(2, offset=offset), Every(1)))

    def worker(transport: Transport) -> None:
        model, optimizer = wrapped(transport, method)
        if transport.rank == 0:
            Logger(optimizer.compression, kept, norms_every=2)
        train(model, optimizer, transport.rank, range(8))

    run_simulated(2, worker)
    groups = [r["groups"][0] for r in kept.steps]
    silent = [bool(g.get("staleness_steps")) for g in groups]
    assert silent in ([False, True] * 4, [True, False] * 4)
    expected, skips = [], 0
    for s in silent:
        skips += s
        expected.append((int(s), skips) if skips else (None, None))
    assert [(g.get("staleness_steps"), g.get("skips")) for g in groups] == expected
    assert any("relative_error" in g for g in groups) and all("relative_error" not in g for g, s in zip(groups, silent) if s)


def test_param_groups_are_told_apart() -> None:
    """Of an own optimizer, whose driver knows them; and where they are those of the optimizer that is attached."""
    kept = Kept()

    def worker(transport: Transport) -> None:
        model = mlp()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
        optimizer = DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model.named_parameters(), Compression.top_k(10), transport=transport)
        Logger(optimizer.compression, *[kept] * (transport.rank == 0))
        train(model, optimizer, transport.rank, range(2))

    run_simulated(2, worker)
    for r in kept.steps:
        assert [g["group"] for g in r["groups"]] == [0, 1] and [g["ratio"] > 1 for g in r["groups"]] == [True, False]
        assert sum(g["sent_bytes"] for g in r["groups"]) == r["sent_bytes"] and sum(g["dense_bytes"] for g in r["groups"]) == r["dense_bytes"]
    model = mlp()
    compression = Compression.top_k(10).bind(model)
    buckets = compression.layout().buckets
    assert {compression.attached.group_of(b) for b in buckets} == {0}
    compression.attach(torch.optim.SGD([{"params": model[2].parameters()}, {"params": model[0].parameters()}], lr=0.1))
    assert {b.name: compression.attached.group_of(b) for b in buckets} == {"0.weight": 1, "0.bias": 1, "2.weight": 0, "2.bias": 0}


class Slot(OneSlot):
    def rename(self, prefix: str) -> None:
        """Names match nothing here."""


@pytest.mark.filterwarnings("ignore:the learning rate is taken to be constant")
def test_waiting_is_absent_where_horovod_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload in its own all-reduce; and it is there for what travels beside it."""
    found = []
    for compression in (Compression.random_block(4, **ALL), Compression.top_k(4, **ALL)):
        kept, model = Kept(), torch.nn.Linear(50, 50, bias=False)
        bound = compression.bind(model)
        Logger(bound, kept)
        monkeypatch.setattr("hvd_ecsgd.horovod.driver.SlotTransport", lambda process_set: Slot())
        for _ in range(2):
            model.weight.grad = torch.ones(50, 50)
            model.weight.grad.set_(bound.decompress(*bound.compress(model.weight.grad)))
            bound._horovod.slot().before_step(scaled=False)
        found.append(["wait_seconds" in r for r in kept.steps])
        assert all(r["wire_seconds"] > 0 for r in kept.steps)
    assert found == [[False] * 2, [True] * 2]


def test_records_of_several_steps_add_up() -> None:
    kept, other = Kept(), Kept()
    for sink, every in ((kept, 3), (other, 1)):
        model, optimizer = wrapped(SelfTransport(), Compression.top_k(10))
        with Logger(optimizer.compression, sink, every=every, norms_every=4):
            train(model, optimizer, 0, range(8))
    assert [(r["step"], r["steps"]) for r in kept.steps] == [(2, 3), (5, 3), (7, 2)], "the rest is written when it is closed"
    for r, begin in zip(kept.steps, (0, 3, 6)):
        assert r["payload_bytes"] == sum(o["payload_bytes"] for o in other.steps[begin : begin + r["steps"]])
    assert ["gradient_norm" in r for r in kept.steps] == [True, True, False]


def test_passes_over_gradients_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three over what is compressed and one over the rest, now and then; none, nor any other measuring, while nobody looks."""
    sizes: list[int] = []
    norm = meter._square

    def square(t: torch.Tensor) -> float:
        sizes.append(t.numel())
        return norm(t)

    monkeypatch.setattr(meter, "_square", square)
    for norms_every, times in ((5, 4), (0, 0), (100, 1)):
        sizes.clear()
        model, optimizer = wrapped(SelfTransport(), Compression.top_k(10))
        with Logger(optimizer.compression, norms_every=norms_every):
            train(model, optimizer, 0, range(16))
        compressed, dense = 1280, 64 + 320 + 5
        assert sum(sizes) == times * (3 * compressed + dense), (norms_every, sizes)
    monkeypatch.setattr(meter, "time", None)
    monkeypatch.setattr(step, "time", None)
    train(model, optimizer, 0, range(2))
    with pytest.raises(AttributeError), Logger(optimizer.compression):
        train(model, optimizer, 0, range(2))


def test_only_the_first_rank_is_measured_unless_asked() -> None:
    def worker(transport: Transport) -> tuple[int, bool]:
        model, optimizer = wrapped(transport, Compression.top_k(10))
        kept = Kept()
        Logger(optimizer.compression, kept)
        train(model, optimizer, transport.rank, range(2))
        return len(kept.steps), "last" in optimizer.compression.metrics()

    assert run_simulated(2, worker) == [(2, True), (0, False)]


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf")
@pytest.mark.parametrize("name", ["none", "double_squeeze, some dense"])
def test_steps_without_a_late_worker_are_told(name: str) -> None:
    """Of a straggler cutoff: in which steps this worker was late, what was sent, and x is the same bits as when nobody looks."""
    late = [[], [1], [1], [], [0, 1], [0], [], [1], []]

    def script(transport: Transport, measured: bool) -> tuple[torch.Tensor, Kept, CutoffWorker]:
        ranks, kept = Ranks(transport, METHODS[name](), late), Kept()
        logger = Logger(ranks.worker, *[kept] * measured, norms_every=1, ranks="all") if measured else None
        for t in range(len(late)):
            ranks.offer(t, lambda model, t=t: model[0].bias.grad.fill_(math.inf) if t == 6 else None)  # type: ignore[misc]
            ranks.worker.take_part()
        with warnings.catch_warnings(record=True):
            x = ranks.x().clone()
        if logger is not None:
            with pytest.raises(CompressionError, match="measured already"):
                Logger(ranks.worker)
            logger.close()
        return x, kept, ranks.worker

    measured, plain = (run_simulated(3, lambda transport, how=how: script(transport, how)) for how in (True, False))
    for rank, ((x, kept, worker), (same, _, _)) in enumerate(zip(measured, plain, strict=True)):
        assert torch.equal(x, same) and worker.meter is None
        assert [r["outcome"] for r in kept.steps] == ["undone" if t == 6 else "stands" for t in range(len(late))]
        row, skips, expected = 0, 0, []
        for t, absent in enumerate(late):
            if t != 6:
                row, skips = (row + 1, skips + 1) if rank in absent else (0, skips)
            expected.append((row if t != 6 else None, skips) if skips else (None, None))
            assert ("gradient_norm" in kept.steps[t]) is (rank not in absent and t != 6)
        told = [(r["groups"][0].get("staleness_steps"), r["groups"][0].get("skips")) for r in kept.steps]
        assert [t for i, t in enumerate(told) if i != 6] == [e for i, e in enumerate(expected) if i != 6]
        assert worker.state.traffic.dense > 0 and kept.steps[-1]["undone_steps"] == 1
        for field in ("sent", "dense", "payload"):
            assert sum(r[f"{field}_bytes"] for r in kept.steps) == getattr(worker.state.traffic, field)
        assert ("relative_error" in kept.steps[3]) is (name != "none")


@pytest.mark.filterwarnings("ignore:a gradient of worker")
@pytest.mark.parametrize("servers", [1, 2])
def test_asynchronous_workers_are_measured(servers: int) -> None:
    """Each of three in any order: a record for each gradient, with the staleness that the servers applied it with; x is as when nobody looks."""

    def trained(measured: bool) -> tuple[SimulatedJob, list[Kept], list[Logger]]:
        job, kept = SimulatedJob(plan_of(Compression.double_squeeze(TopK(4), TopK(3), **ALL).method, 3), sgd(), servers), [Kept() for _ in range(3)]
        loggers = [Logger(worker, k, norms_every=1, ranks="all") for worker, k in zip(job.workers, kept) if measured]

        def gradients(worker: int, model: torch.nn.Module, draw: Gradients = Gradients()) -> None:  # noqa: B008
            draw(worker, model)
            if worker == 1 and job.workers[1].whole.step == 3:
                next(model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]

        choose = seeded(1)
        for _ in range(120):
            job.happen(choose(job.possible()), gradients)
        return job, kept, loggers

    (job, kept, loggers), (plain, _, _) = trained(True), trained(False)
    assert all(torch.equal(a, b) for m, n in zip(job.models, plain.models) for a, b in zip(m.state_dict().values(), n.state_dict().values()))
    with pytest.raises(CompressionError, match="measured already"):
        Logger(job.workers[0])
    stale: Counter[int] = Counter()
    for w, (worker, k) in enumerate(zip(job.workers, kept)):
        steps = k.steps
        assert [r["step"] for r in steps] == list(range(len(steps))) and len(steps) in (worker.whole.step, worker.whole.step - 1)
        assert [r["outcome"] for r in steps] == ["undone" if (w, i) == (1, 3) else "stands" for i in range(len(steps))]
        assert steps[-1]["undone_steps"] == worker.refused == (w == 1)
        whole = len(steps) == worker.whole.step
        assert not whole or sum(r["sent_bytes"] for r in steps) == worker.sent == worker.whole.traffic.sent
        assert sum(r["received_bytes"] for r in steps) <= worker.received
        for r in steps:
            if r["outcome"] == "undone":
                assert r["sent_bytes"] == 0 and "gradient_norm" not in r and "staleness_updates" not in r
            else:
                assert 0 < r["relative_error"] < 1 and r["residual_norm"] > 0 and r["ratio"] > 1 and r["received_bytes"] > 0
                assert r["kernel_seconds"] > 0 and r["wire_seconds"] >= r["wait_seconds"] * 0.999 > 0
                stale[r["staleness_updates"]] += 1
        loggers[w].close()
        assert worker.meter is None
    assert max(stale) == max(s for server in job.servers for s in server.staleness) > 0
    if servers == 1:  # but for gradients whose answers have not come
        assert sum((Counter(job.servers[0].staleness) - stale).values()) <= 3 and not stale - Counter(job.servers[0].staleness)


# -- metrics() ---------------------------------------------------------------------------------------------------------------------


def test_metrics_of_what_is_not_bound() -> None:
    for unbound in (Compression.top_k(10), Compression.none):
        with pytest.raises(AttributeError, match=r"'metrics' is for a bound compression: .*\.bind\(model\)"):
            unbound.metrics()  # type: ignore[attr-defined]


def test_metrics_through_a_life() -> None:
    """Before the first step, after it, between backward and step, undone, discarded, after a switch, saved and loaded."""
    model, optimizer = wrapped(SelfTransport(), Compression.top_k(10))
    compression = optimizer.compression
    fresh = {"steps": 0, "undone_steps": 0, "total_payload_bytes": 0, "total_sent_bytes": 0, "total_dense_bytes": 0}
    assert Compression.top_k(10).bind(mlp()).metrics() == fresh == compression.metrics()
    kept = Kept()
    logger = Logger(compression, kept, norms_every=1)
    assert compression.metrics() == fresh, "no step is over"
    train(model, optimizer, 0, range(2))
    after = compression.metrics()
    assert (after["steps"], after["last"]["step"], after["last"]["outcome"]) == (2, 1, "stands") and after["total_payload_bytes"] > 0
    x, y = batch(0, 2)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert compression.metrics()["last"] == after["last"], "this step is not over"
    optimizer.synchronize()
    assert compression.metrics()["last"]["step"] == 1
    optimizer.discard()
    assert compression.metrics()["last"]["outcome"] == "discarded" and compression.metrics()["undone_steps"] == 1
    optimizer.zero_grad()
    (torch.nn.functional.cross_entropy(model(x), y) * float("nan")).backward()
    with pytest.warns(RuntimeWarning, match="was undone"):
        optimizer.step()
    last = compression.metrics()
    assert (last["steps"], last["undone_steps"], last["last"]["outcome"]) == (4, 2, "undone") and "gradient_norm" not in last["last"]
    compression.switch(Compression.random_block(8))
    assert compression.metrics() == last
    train(model, optimizer, 0, range(1))
    told = kept.lines[-2:]
    assert [line["kind"] for line in told] == ["method", "step"] and "RandomBlock" in told[0]["compressor"] and told[0]["step"] == 4
    assert [line["kind"] for line in kept.lines].count("run") == 1
    logger.close()
    assert "last" not in compression.metrics(), "nobody looks any more"

    saved = compression.state_dict()
    model = mlp()
    again = Compression.random_block(8).bind(model)
    again.load_state_dict(saved)
    assert again.metrics() == {**fresh, "steps": 5, "undone_steps": 2}, "bytes are those of this object"
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), again)
    assert optimizer.compression.metrics() == {**fresh, "steps": 5, "undone_steps": 2}
    train(model, optimizer, 0, range(1))
    assert optimizer.compression.metrics()["steps"] == 6


def test_a_step_that_is_never_applied_is_over_with_the_next_gradient() -> None:
    """As one that a GradScaler leaves out: the method would apply the update, and nobody lets it."""
    kept = Kept()
    model, optimizer = wrapped(SelfTransport(), Compression.detached(4))
    Logger(optimizer.compression, kept)
    x, y = batch(0, 0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.synchronize()
    assert not kept.steps
    driver_of(optimizer).step.forget()
    assert not kept.steps
    train(model, optimizer, 0, range(2))
    assert [r["step"] for r in kept.steps] == [0, 1, 2]


def test_a_logger_made_before_the_optimizer_goes_with_the_compression() -> None:
    kept, model = Kept(), mlp()
    compression = Compression.double_squeeze().bind(model)
    Logger(compression, kept)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression)
    train(model, optimizer, 0, range(2))
    assert [r["step"] for r in kept.steps] == [0, 1]


def test_a_logger_made_in_mid_step_begins_with_what_it_sees() -> None:
    kept = Kept()
    model, optimizer = wrapped(SelfTransport(), Compression.top_k(10))
    x, y = batch(0, 0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    Logger(optimizer.compression, kept)
    optimizer.step()
    train(model, optimizer, 0, range(1))
    assert [r["step"] for r in kept.steps] == [0, 1] and kept.steps[1]["kernel_seconds"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Logger(Compression.top_k(10)), r"expected a bound compression, Compression\.….bind\(model\)"),  # type: ignore[arg-type]
        (lambda: Logger(bound(), every=0), "every"),
        (lambda: Logger(bound(), norms_every=-1), "norms_every"),
        (lambda: Logger(bound(), ranks="some"), "ranks must be 'first' or 'all'"),  # type: ignore[arg-type]
        (lambda: twice(), "measured already: close the Logger"),
    ],
)
def test_wrong_use(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        make()


def bound() -> Any:
    return Compression.top_k(10).bind(mlp())


def twice() -> None:
    compression = bound()
    Logger(compression)
    Logger(compression)


# -- warnings ----------------------------------------------------------------------------------------------------------------------


def told(compression: Any, gradients: Callable[[int], torch.Tensor], steps: int = 30, **options: Any) -> list[str]:
    """What is warned of in a training on one worker, as the file has it and as Python does."""
    kept = Kept()
    made, _ = exchange(compression, kept, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(steps):
            made.reduce([gradients(i)])
    texts = [w["text"] for w in kept.of("warning")]
    assert texts == [re.sub(r"^step \d+: ", "", str(w.message)) for w in caught]
    return texts


def noise(i: int) -> torch.Tensor:
    return torch.randn(1, 4000, generator=torch.Generator().manual_seed(i))


def spikes(i: int) -> torch.Tensor:
    """A few entries hold nearly all of the norm."""
    g = 1e-3 * noise(i)
    g[0, :4] += 1.0
    return g


@pytest.mark.filterwarnings("ignore:Sign.*with error feedback")
def test_what_grows_without_bound_is_warned_of() -> None:
    """`Sign("l2")` expands spiky gradients; with "l1" it contracts, and nothing is said."""
    first, *others = told(Compression.one_bit("l2", **ALL), spikes)
    assert "more than was there" in first and "top_k" in first and "param group 0" in first
    assert not others or "the residual of param group 0 has grown" in others[0]
    assert told(Compression.one_bit("l1", **ALL), noise) == []


def test_methods_that_are_used_as_they_are_meant_are_not_warned_of() -> None:
    for compression in (Compression.random_block(16, **ALL), Compression.top_k(16, **ALL), Compression.qsgd(**ALL), Compression.power_sgd(1, **ALL)):
        assert told(compression, noise) == [], compression
    assert told(Compression.local_momentum(16, **ALL), noise, lr=0.1, momentum=0.9) == []


def test_noise_is_warned_of() -> None:
    """QSGD with one level over 4000 entries: ω is about √4000."""
    (text,) = told(Compression.qsgd(1, 4000, **ALL), noise)
    assert "more than twice the gradient" in text and "levels=" in text


def record(i: int, **numbers: Any) -> dict[str, Any]:
    bytes_ = {"payload_bytes": 100, "dense_bytes": 3200}
    return {"step": i, "groups": [{"group": 0, "gradient_norm": 1.0, **bytes_, **{name: f(i) for name, f in numbers.items()}}]}


def heard(method: Any, **numbers: Any) -> list[str]:
    health = Health()
    return [text for i in range(8) for text in health.look(method, 2, record(i, **numbers))]


def test_verdicts() -> None:
    """A residual that grows, at what δ is measured; a choice that is worse than chance; each once; and what is well is not spoken of."""
    top_k, blind = Compression(TopK(32), ErrorFeedback(), AllGather()).method, Compression(RandomBlock(32), ErrorFeedback(), AllGather()).method
    error = {"relative_error": lambda i: math.sqrt(0.5)}
    grows: dict[str, Any] = {"residual_norm": lambda i: 1.5**i, "residual_to_gradient": lambda i: 10.0 + i, **error}
    (text,) = heard(top_k, **grows)
    assert "has grown in each of the last 5 samples, from 1 to 5.06" in text and "should stay below 10" in text and "warmup_steps=" in text
    assert heard(top_k, **{**grows, "residual_norm": lambda i: 1.05**i}) == [], "hardly"
    assert heard(top_k, **{**grows, "residual_norm": lambda i: 1.5**i - 3 * (i % 2)}) == [], "not each time"
    assert heard(top_k, **{**grows, "residual_to_gradient": lambda i: 5.0}) == [], "with the gradient"
    assert heard(top_k, **{**grows, "relative_error": lambda i: math.sqrt(0.95)}) == [], "where δ is small more may wait"
    assert heard(Compression.dist_ef_sgd().method, **grows) == [], "momentum makes more of each gradient"
    poor: dict[str, Any] = {"residual_norm": lambda i: 1.0, "residual_to_gradient": lambda i: 90.0, "relative_error": lambda i: math.sqrt(0.99)}
    (text,) = heard(top_k, **poor)
    assert "Compression.random_block(32)" in text and "(δ = 0.01)" in text and "would leave 0.969" in text
    assert heard(top_k, **{**poor, "residual_to_gradient": lambda i: 20.0}) == [], "no more waits than would behind a random block"
    assert heard(top_k, **{**poor, **error}) == [], "it chooses well, whatever waits"
    assert heard(blind, **poor) == [], "it does not choose"
    assert heard(Compression.unbiased(QSGD()).method, relative_error=lambda i: 1.5) == [], "unbiased, and less than twice the gradient"
    assert heard(Compression(Sign(), ErrorFeedback(), AllGather()).method, relative_error=lambda i: 0.6) == []
