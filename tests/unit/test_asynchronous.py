"""Asynchronous training: what holds at every event, whatever order messages arrive in; Hypothesis chooses it. Each claim has a control."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_ecsgd import CheckpointError, Compression, CompressionError, SequenceError, TransportError
from hvd_ecsgd.asynchronous import Kind, Message, Plan, Server, Worker, alpha_of, delay_limit, plan_of, saving, shards_of, suggested_step_size
from hvd_ecsgd.asynchronous.simulated import Event, SimulatedJob
from hvd_ecsgd.compressors import QSGD, Cast, GlobalRandomBlock, Identity, RandomBlock, RandomK, Sign, Ternary, Threshold, TopK
from hvd_ecsgd.feedback import NoFeedback
from hvd_ecsgd.protocols import Compressor
from hvd_ecsgd.reproduce.stale import mean_square_limit
from hvd_ecsgd.transport import run_simulated

WAYS: list[tuple[Compressor, Compressor]] = [
    (Sign(), Sign()),
    (TopK(4), Ternary("l1")),
    (RandomBlock(4), TopK(4)),
    (GlobalRandomBlock(2, 4), RandomK(4)),
    (Threshold(4.0, 1.0), Identity()),
    (Identity(), QSGD(127, 16)),
]


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).to(dtype)


def sgd(lr: float = 0.1, dtype: torch.dtype = torch.float64, **options: Any) -> Callable[[], tuple[torch.nn.Module, torch.optim.Optimizer]]:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = net(dtype=dtype)
        return model, torch.optim.SGD(model.parameters(), lr=lr, **options)

    return make


def plan(up: Compressor, down: Compressor, workers: int, tau_max: int | None = None, **options: Any) -> Plan:
    return plan_of(Compression(up, dense_below=0, dense_1d=False, **options).method, workers, tau_max, down)


class Gradients:
    """Draws a gradient for each compute event, and sums up, by worker, what was put in."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.put_in: dict[str, torch.Tensor] = {}

    def __call__(self, worker: int, model: torch.nn.Module) -> None:
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
            self.put_in[name] = self.put_in.get(name, 0) + p.grad.clone()


def run(job: SimulatedJob, choose: Callable[[list[Event]], Event], events: int, look: Callable[[SimulatedJob], None]) -> Gradients:
    gradients = Gradients()
    for _ in range(events):
        job.happen(choose(job.possible()), gradients)
        look(job)
    return gradients


def seeded(seed: int) -> Callable[[list[Event]], Event]:
    generator = np.random.default_rng(seed)
    return lambda possible: possible[generator.integers(len(possible))]


def slow_first(possible: list[Event]) -> Event:
    """Worker 0 computes only where nothing else can happen."""
    return next((e for e in possible if e != Event("compute", 0)), possible[0])


def worker_holds_the_view(job: SimulatedJob) -> None:
    """Of every worker that lives and server between which nothing is on its way down."""
    for s, server in enumerate(job.servers):
        for w, views in server.views.items():
            if not job.down[w, s] and (w, s) not in job.dead:
                for bucket, view in zip(job.workers[w].shards[s].buckets, views, strict=True):
                    assert all(torch.equal(p.detach(), v) for p, v in zip(bucket.parameters, view, strict=True)), "view_j == x_j"


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(WAYS), st.integers(1, 4), st.integers(1, 2), st.integers(0, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_server_knows_what_its_workers_hold_and_none_is_staler_than_allowed(
    data: st.DataObject, way: tuple[Compressor, Compressor], workers: int, servers: int, tau_max: int, dtype: torch.dtype
) -> None:
    """view_j == x_j bit for bit at every event; staleness ≤ τ_max; and there is always something that can happen."""
    job = SimulatedJob(plan(*way, workers, tau_max), sgd(dtype=dtype, momentum=0.9), servers)

    def look(job: SimulatedJob) -> None:
        worker_holds_the_view(job)
        assert all(max(server.staleness, default=0) <= tau_max for server in job.servers)
        assert job.possible(), "nobody waits for ever"

    run(job, lambda possible: data.draw(st.sampled_from(possible)), 60, look)


def test_that_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: a worker that moves by something else than the server thinks; a server that lets everybody go."""
    job = SimulatedJob(plan(Sign(), Sign(), 2), sgd())
    run(job, seeded(0), 40, worker_holds_the_view)
    with torch.no_grad():
        next(job.models[0].parameters())[0, 0] += 1e-12
    with pytest.raises(AssertionError, match="view_j == x_j"):
        worker_holds_the_view(job)

    def stalest() -> int:
        """After 100 events in which worker 0 computes only where nothing else can happen, and some in which it does."""
        job = SimulatedJob(plan(Sign(), Sign(), 3, 4), sgd())
        run(job, slow_first, 100, lambda job: None)
        run(job, lambda possible: Event("compute", 0) if Event("compute", 0) in possible else slow_first(possible), 20, lambda job: None)
        return max(job.servers[0].staleness)

    assert stalest() == 4
    monkeypatch.setattr(Server, "_may_go", lambda self, others: True)
    assert stalest() > 20


def test_a_worker_that_is_ahead_waits_and_is_told_for_whom() -> None:
    """Worker 0 never pushes: worker 1 gets as far as τ_max, and goes on when worker 0 leaves."""
    job = SimulatedJob(plan(Sign(), Sign(), 2, 3), sgd())
    gradients = Gradients()
    while not all(e == Event("compute", 0) for e in job.possible()):
        job.happen(slow_first(job.possible()), gradients)
    (server,) = job.servers
    assert server.version == 3 and server.held_back() == {1: [0]}
    job.up[0, 0].append(Message(Kind.LEAVE, 0))
    job.computing.discard(0)
    for _ in range(30):
        job.happen(slow_first(job.possible()), gradients)
    assert server.version > 6
    assert max(server.staleness) == 0, "nobody else computes"


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(WAYS), st.integers(1, 3), st.integers(1, 2))
def test_what_workers_put_in_is_what_moved_x_and_what_is_held_back(
    data: st.DataObject, way: tuple[Compressor, Compressor], workers: int, servers: int
) -> None:
    """Σ g = n·(x_0 − x)/η + Σ_j e_j + what is on its way, by parameter, at every event; and x_j = x + what the server has not sent to j."""
    job = SimulatedJob(plan(*way, workers), sgd(lr=0.1), servers)
    start = {name: p.detach().clone() for name, p in job.models[0].named_parameters()}
    gradients = Gradients()
    for _ in range(40):
        job.happen(data.draw(st.sampled_from(job.possible())), gradients)
        assert lost(job, start, gradients.put_in, 0.1) < 1e-9


def lost(job: SimulatedJob, start: dict[str, torch.Tensor], put_in: dict[str, torch.Tensor], lr: float) -> float:
    """The largest entry of what went in and is nowhere."""
    missing = {name: t.clone() for name, t in put_in.items()}
    for s, server in enumerate(job.servers):
        for name, p in server.state.named:
            if name in missing:
                missing[name] -= (start[name] - p.detach()) * job.plan.workers / lr
        for w, worker in enumerate(job.workers):
            for bucket in worker.shards[s].buckets:
                if bucket.residual is not None:
                    for name, e in zip(bucket.segments.names, bucket.segments.shaped_views(bucket.residual), strict=True):
                        missing[name] -= e
            for push in (m for m in job.up[w, s] if m.kind is Kind.PUSH):
                for bucket, gradient in zip(server.state.buckets, server._decoded(push), strict=True):
                    assert gradient is not None
                    for name, g in zip(bucket.segments.names, bucket.segments.shaped_views(gradient), strict=True):
                        missing[name] -= g
    return max((float(t.abs().max()) for t in missing.values()), default=0.0)


def test_what_is_lost_without_feedback_is_seen() -> None:
    """The control: without feedback what the compressor drops is nowhere."""
    job = SimulatedJob(plan(TopK(4), Identity(), 2, feedback=NoFeedback()), sgd())
    start = {name: p.detach().clone() for name, p in job.models[0].named_parameters()}
    gradients = run(job, seeded(0), 40, lambda job: None)
    assert lost(job, start, gradients.put_in, 0.1) > 0.1


class Sums:
    """Tensors by parameter's name."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}

    def add(self, name: str, t: torch.Tensor) -> None:
        self.by_name[name] = self.by_name.get(name, 0) + t

    def add_flat(self, bucket: Any, flat: torch.Tensor | None) -> None:
        if flat is not None:
            for name, t in zip(bucket.segments.names, bucket.segments.shaped_views(flat), strict=True):
                self.add(name, t.clone())

    def add_pushes(self, job: SimulatedJob, worker: int, server: int) -> None:
        """Those on their way."""
        for push in (m for m in job.up[worker, server] if m.kind is Kind.PUSH):
            master = job.servers[server]
            for bucket, flat in zip(master.state.buckets, master._decoded(push), strict=True):
                self.add_flat(bucket, flat)

    def add_residuals(self, job: SimulatedJob, worker: int) -> None:
        for shard in job.workers[worker].shards:
            for bucket in shard.buckets:
                self.add_flat(bucket, bucket.residual)


def look_at_deaths(job: SimulatedJob, choose: Callable[[list[Event]], Event], events: int) -> None:
    """At every event: view_j == x_j of those that live; no gradient is staler than allowed; somebody that lives can go on, once servers have heard
    who has died; and Σ of what workers put in = Σ of what x moved, by each push's part among those that live + what is held back and on its way +
    what died with workers, which is their residuals, and what a server had not received when it heard of it."""
    gradients, moved, died = Gradients(), Sums(), Sums()
    for _ in range(events):
        event = choose(job.possible())
        server = job.servers[event.server]
        before, living = {name: p.detach().clone() for name, p in server.state.named}, len(server.living)
        if event.what == "die":
            died.add_residuals(job, event.worker)
        if event.what == "lost":
            died.add_pushes(job, event.worker, event.server)
        job.happen(event, gradients)
        for name, p in server.state.named:
            moved.add(name, (before[name] - p.detach()) * living / 0.1)
        worker_holds_the_view(job)
        assert all(max(server.staleness, default=0) <= job.plan.tau_max for server in job.servers)
        dead = {w for w, _ in job.dead} | {w for server in job.servers for w in server.lost}
        alive = [w for w in range(job.plan.workers) if w not in dead]
        assert any(e.what == "lost" or e.worker in alive for e in job.possible()), "nobody waits for the dead"
        held = Sums()
        for w in range(job.plan.workers):
            if w in alive:
                held.add_residuals(job, w)
            for s in range(len(job.servers)):
                held.add_pushes(job, w, s)
        for name, t in gradients.put_in.items():
            found = [sums.by_name.get(name, torch.zeros_like(t)) for sums in (moved, held, died)]
            assert float((t - sum(found)).abs().max()) < 1e-9, f"some of {name} is nowhere after {event}"


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(WAYS), st.integers(2, 4), st.integers(1, 2), st.integers(0, 6))
def test_workers_that_die_are_let_go_and_what_goes_with_them_is_counted(
    data: st.DataObject, way: tuple[Compressor, Compressor], workers: int, servers: int, tau_max: int
) -> None:
    """Any but one, at any event; servers hear of it at another."""
    living = list(range(workers))

    def choose(possible: list[Event]) -> Event:
        event = data.draw(st.sampled_from([*possible, *(Event("die", w) for w in living if len(living) > 1)]))
        if event.what == "die":
            living.remove(event.worker)
        return event

    look_at_deaths(SimulatedJob(plan(*way, workers, tau_max), sgd(lr=0.1), servers), choose, 50)


@pytest.mark.parametrize(("forgotten", "said"), [("", ""), ("in flight", "nobody waits for the dead"), ("its part", "is nowhere")])
def test_that_a_dead_worker_is_not_let_go_would_be_seen(forgotten: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls, in which worker 0 dies while it computes and worker 1 goes on: a server that still waits for its gradient, and one that takes the
    others' as one half of a mean."""
    let_go = Server._let_go

    def keeps_waiting(self: Server, worker: int) -> list[Message]:
        in_flight = dict(self.in_flight)
        answers = let_go(self, worker)
        self.in_flight |= in_flight
        return answers

    if forgotten == "in flight":
        monkeypatch.setattr(Server, "_let_go", keeps_waiting)
    elif forgotten:
        monkeypatch.setattr(Plan, "share_of", lambda self, living: self.share)
    job = SimulatedJob(plan(TopK(4), Identity(), 2, 2), sgd())
    plot = [Event("up", 0), Event("down", 0), Event("die", 0), Event("lost", 0)]

    def choose(possible: list[Event]) -> Event:
        return plot.pop(0) if plot else next(e for e in possible if e.worker == 1)

    with pytest.raises(AssertionError, match=said) if said else contextlib.nullcontext():
        look_at_deaths(job, choose, 40)


@pytest.mark.parametrize("reuse", [False, True])
def test_what_comes_of_a_dead_worker_is_too_late(reuse: bool) -> None:
    """It changes nothing, as the others may have agreed on an x without it; what others used of it goes, and a checkpoint is of those that live."""
    method = Compression.qsgd(7, 16, dense_below=0, dense_1d=False).method
    job = SimulatedJob(plan_of(method, 3, None, Identity(), reuse=reuse), sgd())
    run(job, seeded(2), 60, lambda job: None)
    (server,) = job.servers
    while not any(m.kind is Kind.PUSH for m in job.up[1, 0]):
        job.happen(next(e for e in job.possible() if e.worker == 1), Gradients())
    push = next(m for m in job.up[1, 0] if m.kind is Kind.PUSH)
    x, pushes, version = [p.detach().clone() for p in job.masters[0].parameters()], list(server.pushes), server.version
    server.on_lost(1)
    assert server.on(push) == [] and server.on(Message(Kind.PULL, 1)) == [] and server.on_lost(1) == []
    assert all(torch.equal(a, b) for a, b in zip(x, job.masters[0].parameters(), strict=True)) and server.version == version
    saved = server.state_dict()
    assert saved["pushes"] == [pushes[0], pushes[2]] and 1 not in server.views and 1 not in server.last and not server.finished
    if reuse:
        assert torch.equal(saved["last"]["1"][0], server.last[2][0])
    server.pushes, server.last = [0, 0, 0], {}
    server.load_state_dict(saved)
    assert [server.pushes[w] for w in (0, 2)] == saved["pushes"] and sorted(server.last) == ([0, 2] if reuse else [])
    server.on_done(0)
    server.on_lost(0)
    assert 0 not in server.lost and not server.finished, "one that was done has died later"
    server.on_lost(2)
    assert server.finished


def test_what_is_left_is_a_job_of_fewer_workers() -> None:
    """A worker dies before its first gradient: x of the others is, bit for bit, that of a job of two. With its part kept it is not: the control."""

    def job_of(workers: int) -> list[torch.Tensor]:
        job = SimulatedJob(plan(Sign(), TopK(4), workers, 3), sgd(momentum=0.9))
        if workers == 3:
            for what in ("die", "lost"):
                job.happen(Event(what, 2), Gradients())  # type: ignore[arg-type]
        run(job, lambda possible: possible[len(possible) // 2], 80, lambda job: None)
        return [p.detach() for p in job.masters[0].parameters()]

    left, two = job_of(3), job_of(2)
    assert all(torch.equal(a, b) for a, b in zip(left, two, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "share_of", lambda self, living: self.share)
        assert not all(torch.equal(a, b) for a, b in zip(job_of(3), two, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_silent_workers_last_gradient_is_used_again(workers: int, servers: int) -> None:
    """Q-IAG: at every push x ← x − η/n·Σ_j (the last that came of j), whatever the order; a worker that is done counts no more. Written out here."""
    method = Compression.qsgd(7, 16, dense_below=0, dense_1d=False).method
    job = SimulatedJob(plan_of(method, workers, None, Identity(), reuse=True), sgd(lr=0.1), servers)
    last: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(servers)]
    choose, gradients, pushes = seeded(workers), Gradients(), 0
    x = [{name: p.detach().clone() for name, p in server.state.named} for server in job.servers]
    for event_number in range(150):
        event = choose(job.possible())
        w, s = event.worker, event.server
        push = job.up[w, s][0] if event.what == "up" else None
        if push is not None and push.kind is Kind.PUSH:
            pushes += 1
            came = {}
            for bucket, gradient in zip(job.servers[s].state.buckets, job.servers[s]._decoded(push), strict=True):
                assert gradient is not None
                came |= dict(zip(bucket.segments.names, bucket.segments.shaped_views(gradient.clone()), strict=True))
            last[s][w] = came
            x[s] = {name: value - 0.1 / workers * sum(own[name] for own in last[s].values()) for name, value in x[s].items()}
        job.happen(event, gradients)
        for server, expected in zip(job.servers, x, strict=True):
            assert all(torch.allclose(p.detach(), expected[name], atol=1e-12) for name, p in server.state.named), f"event {event_number}"
    assert pushes > 15 * servers
    saved = job.servers[0].state_dict()
    job.servers[0].on_done(0)
    assert 0 not in job.servers[0].last
    job.servers[0].load_state_dict(saved)
    assert sorted(job.servers[0].last) == sorted(last[0])
    assert all(torch.equal(a, b) for a, b in zip(job.servers[0].last[0], saved["last"]["0"], strict=True))


def test_one_worker_uncompressed_is_the_optimizer_itself() -> None:
    """Adam with a schedule and weight decay: x takes the very steps that the optimizer takes alone, on one server and on two."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    alone, optimizer = make()
    jobs = [SimulatedJob(plan(Identity(), Identity(), 1), make, servers) for servers in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(6, 5, dtype=torch.float64)

    def backward(worker: int, model: torch.nn.Module) -> None:
        model(x).square().sum().backward()

    for step in range(12):
        x.normal_(generator=generator)
        rates = 0.1 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = rates
        optimizer.zero_grad()
        alone(x).square().sum().backward()
        optimizer.step()
        for job in jobs:
            for group in job.workers[0].optimizer.param_groups:
                group["lr"] = rates
            while any(e.what != "compute" for e in job.possible()):
                job.happen(job.possible()[-1], backward)
            job.happen(Event("compute", 0), backward)
            while any(e.what != "compute" for e in job.possible()):
                job.happen(job.possible()[-1], backward)
    for job in jobs:
        for p, q in zip(alone.parameters(), job.models[0].parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


def test_a_schedule_keeps_the_worth_of_what_is_held_back() -> None:
    """SGD, the rate falls tenfold and rises again: x_0 − x + η̃ Σ e / n = Σ η_t g_t / n. With the residual's unit forgotten it is not: the control."""

    def difference(break_it: bool) -> float:
        job = SimulatedJob(plan(TopK(4), Identity(), 1), sgd())
        worker, server = job.workers[0], job.servers[0]
        start = {n: p.detach().clone() for n, p in job.models[0].named_parameters()}
        total = {n: torch.zeros_like(p) for n, p in start.items()}
        gradients, lr = Gradients(), 0.1
        for step in range(60):
            event = job.possible()[-1]
            if event.what == "compute":
                lr = 0.01 if 5 < step < 30 else 0.1
                worker.optimizer.param_groups[0]["lr"] = lr
                if break_it:
                    for bucket in worker.shards[0].buckets:
                        bucket.unit = None
                before = {n: t.clone() for n, t in gradients.put_in.items()}
                job.happen(event, gradients)
                for n, t in gradients.put_in.items():
                    total[n] += lr * (t - before.get(n, 0))
            else:
                job.happen(event, gradients)
        while job.up[0, 0]:
            job.happen(Event("up", 0), gradients)
        for bucket in worker.shards[0].buckets:
            assert bucket.residual is not None
            for n, e in zip(bucket.segments.names, bucket.segments.shaped_views(bucket.residual), strict=True):
                total[n] -= lr * e
        moved = {n: start[n] - p.detach() for n, p in server.state.named}
        return max(float((total[n] - moved[n]).abs().max()) for n in total)

    assert difference(False) < 1e-12
    assert difference(True) > 1e-3


@pytest.mark.parametrize("servers", [1, 2])
def test_a_gradient_with_an_inf_is_refused(servers: int) -> None:
    """Its residual is as it was, bit for bit with exact=True; nothing is sent; it is counted and warned of; the worker goes on."""
    job = SimulatedJob(plan(TopK(4), Sign(), 2, exact=True), sgd(), servers)
    run(job, seeded(3), 60, lambda job: None)
    while 0 not in job.computing:
        job.happen(next(e for e in job.possible() if e.what != "compute"), Gradients())
    worker = job.workers[0]
    before = [bucket.residual.clone() for shard in worker.shards for bucket in shard.buckets if bucket.residual is not None]
    versions = [server.pushes[0] for server in job.servers]

    def overflow(w: int, model: torch.nn.Module) -> None:
        Gradients()(w, model)
        grad = list(model.parameters())[-1].grad
        assert grad is not None
        grad[0] = float("inf")

    with pytest.warns(RuntimeWarning, match="worker 0 held an inf or NaN: it was not pushed"):
        job.happen(Event("compute", 0), overflow)
    after = [bucket.residual for shard in worker.shards for bucket in shard.buckets]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if b is not None)
    assert worker.refused == 1
    for _ in range(8):
        job.happen(next(e for e in job.possible() if e.what != "compute"), Gradients())
        if 0 in job.computing:
            break
    assert 0 in job.computing and [server.pushes[0] for server in job.servers] == versions
    run(job, seeded(4), 30, worker_holds_the_view)


@pytest.mark.parametrize("wrong", ["lr", "shape"])
def test_what_no_step_can_be_taken_with_leaves_all_residuals(wrong: str) -> None:
    """Of a bucket that comes after others, which must not hold this gradient already when the next step brings it again."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)

    job = SimulatedJob(plan(TopK(4), Identity(), 1), make)
    while sum(job.servers[0].pushes) < 2 or not job.computing:
        job.happen(job.possible()[0], Gradients())
    worker = job.workers[0]
    buckets = [bucket for shard in worker.shards for bucket in shard.buckets]
    before = [bucket.residual.clone() for bucket in buckets if bucket.residual is not None]
    last = buckets[-1]

    def backward(w: int, model: torch.nn.Module) -> None:
        Gradients()(w, model)
        if wrong == "lr":
            worker.optimizer.param_groups[last.group]["lr"] = float("nan")
        else:
            (p,) = last.parameters
            p.data, p.grad = p.data[..., :1], torch.ones_like(p.data[..., :1])

    with pytest.raises(CompressionError, match="no step can be taken" if wrong == "lr" else last.segments.names[0]):
        job.happen(Event("compute", 0), backward)
    after = [bucket.residual for bucket in buckets if bucket.residual is not None]
    assert len(buckets) == len(before) == 4 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_optimizer_whose_defaults_name_no_learning_rate_keeps_its_own() -> None:
    """Each push takes one half of it, not of what the push before has left; and a schedule on the worker is followed."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__([{"params": list(params), "lr": 0.5}], {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad * group["lr"])

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, Plain(model.parameters())

    def ones(w: int, model: torch.nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    job = SimulatedJob(plan(Identity(), Identity(), 2), make)
    x, optimizer = next(job.masters[0].parameters()).detach().view(-1), job.workers[0].optimizer
    moved = []
    for lr in (0.5, 0.5, 0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        before = x.clone()
        while job.servers[0].pushes[0] == len(moved):
            job.happen(next(e for e in job.possible() if e.worker == 0), ones)
        moved.append(round(float((before - x)[0]), 9))
    assert moved == [0.25, 0.25, 0.25, 0.125]


def test_a_payload_that_overflows_is_refused_too() -> None:
    """Of a gradient that float16 cannot hold; what was extracted goes back."""
    job = SimulatedJob(plan(Cast(), Identity(), 1), sgd())
    run(job, seeded(0), 7, lambda job: None)
    while job.possible() != [Event("compute", 0)]:
        job.happen(job.possible()[-1], Gradients())
    (bucket,) = job.workers[0].shards[0].buckets
    assert bucket.residual is not None
    before = bucket.residual.clone()

    def large(w: int, model: torch.nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e6)

    with pytest.warns(RuntimeWarning, match="was not pushed"):
        job.happen(Event("compute", 0), large)
    assert torch.allclose(bucket.residual, before, atol=1e-9)


def test_frozen_and_unused_parameters_stay() -> None:
    """With momentum and weight decay, which would move them: one that has no gradient on a worker, and one that is not trained."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = net()
        model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    job = SimulatedJob(plan(Sign(), Sign(), 2), make)

    def backward(w: int, model: torch.nn.Module) -> None:
        Gradients()(w, model)
        for name, p in model.named_parameters():
            if name in ("0.weight", "2.bias"):
                p.grad = None

    choose = seeded(0)
    for _ in range(40):
        job.happen(choose(job.possible()), backward)
    first, master = net(), job.masters[0]
    for name, p in master.named_parameters():
        assert torch.equal(p, dict(first.named_parameters())[name]) == (name in ("0.weight", "2.bias")), name


def test_a_rate_of_zero_sends_nothing_and_keeps_the_residual() -> None:
    job = SimulatedJob(plan(Sign(), Identity(), 1), sgd())
    for lr in (0.1, 0.0):
        while job.possible() != [Event("compute", 0)]:
            job.happen(job.possible()[0], Gradients())
        bucket = job.workers[0].shards[0].buckets[0]
        before = None if bucket.residual is None else bucket.residual.clone()
        job.workers[0].optimizer.param_groups[0]["lr"] = lr
        job.happen(Event("compute", 0), Gradients())
    assert before is not None and bucket.residual is not None and torch.equal(before, bucket.residual)
    assert job.up[0, 0][0].nbytes == 0


def test_what_is_written_to_x_is_noticed() -> None:
    """x is the servers'. A broadcast of the same weights at the beginning is no such thing."""
    job = SimulatedJob(plan(Sign(), Sign(), 1), sgd())
    while job.possible() != [Event("compute", 0)]:
        job.happen(job.possible()[0], Gradients())
    with torch.no_grad():
        for p in job.models[0].parameters():
            p.copy_(p.clone())
    job.happen(Event("compute", 0), Gradients())
    while job.possible() != [Event("compute", 0)]:
        job.happen(job.possible()[0], Gradients())
    with torch.no_grad():
        next(job.models[0].parameters()).mul_(2)
    with pytest.raises(SequenceError, match=r"'0.weight' was written to since the servers' last answer"):
        job.happen(Event("compute", 0), Gradients())


def test_messages_that_cannot_be_are_refused() -> None:
    job = SimulatedJob(plan(Sign(), Sign(), 2), sgd())
    (server,) = job.servers
    with pytest.raises(SequenceError, match="without having pulled"):
        server.on(Message(Kind.PUSH, 0))
    with pytest.raises(TransportError, match="worker 5"):
        server.on(Message(Kind.PULL, 5))
    while 0 not in job.computing:
        job.happen(next(e for e in job.possible() if e.what != "compute"), Gradients())
    job.happen(Event("compute", 0), Gradients())
    push = job.up[0, 0][0]
    x = [p.detach().clone() for p in job.masters[0].parameters()]
    for wrong in (
        replace(push, number=7),
        replace(push, payloads=[]),
        replace(push, payloads=[push.payloads[0][:-8]]),
        replace(push, payloads=[torch.full_like(push.payloads[0], 255)]),
    ):
        with pytest.raises((SequenceError, TransportError)):
            server.on(wrong)
    assert all(torch.equal(a, b) for a, b in zip(x, job.masters[0].parameters(), strict=True)) and server.pushes == [0, 0]
    server.on(push)
    with pytest.raises(TransportError, match="expected answer"):
        job.workers[0].on_answer(0, Message(Kind.MOVE, 1))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120), st.integers(0, 60), st.booleans(), st.booleans())
def test_no_bytes_are_more_than_a_damaged_message(noise: bytes, at: int, begins_well: bool, sealed: bool) -> None:
    """Random bytes, and a good head with some replaced, cut off or added, also where their checksum is right: an error, or a message with no more
    payload than there can be."""
    good = Message(Kind.PUSH, 1, 2, (0.1, 0.9), (3,), [torch.zeros(5), torch.zeros(0, dtype=torch.uint8)]).head()
    head = good[:at] + noise + good[at + len(noise) :] if begins_well else noise
    head = head[:-4] + zlib.crc32(head[:-4]).to_bytes(4, "little") if sealed else head
    try:
        assert Message.of_head(head, most=64).nbytes <= 64
    except TransportError as error:
        assert "damaged" in str(error)


def test_a_message_survives_its_head() -> None:
    message = Message(Kind.PUSH, 3, 2**40, (0.1, float("inf")), (0, 7), [torch.zeros(5, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.uint8)])
    back = Message.of_head(message.head(), 12)
    assert (back.kind, back.worker, back.number, tuple(back.numbers), tuple(back.absent)) == (Kind.PUSH, 3, 2**40, (0.1, float("inf")), (0, 7))
    assert [(p.dtype, p.numel()) for p in back.payloads] == [(torch.bfloat16, 5), (torch.uint8, 2)]
    with pytest.raises(TransportError, match="payloads of 12 bytes, and there can be 11"):
        Message.of_head(message.head(), 11)


def test_shards_hold_everything_once_and_are_even() -> None:
    named = list(net().named_parameters())
    for servers in (1, 2, 3, 4):
        shards = shards_of(named, servers)
        assert sorted(n for shard in shards for n, _ in shard) == sorted(n for n, _ in named) and all(shards)
    assert max(sum(p.numel() for _, p in shard) for shard in shards_of(named, 2)) <= 20
    for servers in (0, 5):
        with pytest.raises(CompressionError, match=f"{servers} ranks serve, and there are 4 parameters"):
            shards_of(named, servers)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: plan_of(Compression.top_k().method, 0), "workers must be a number of workers ≥ 1"),
    (lambda: plan_of(Compression.top_k().method, 2, -1), "tau_max must be a number of updates ≥ 0"),
    (lambda: plan_of(Compression.detached().method, 2), "neither shift the model"),
    (lambda: plan_of(Compression.dist_ef_sgd().method, 2), "nor keep momentum"),
    (lambda: plan_of(Compression.cser(Sign(), Sign()).method, 2), "neither shift the model"),
    (lambda: plan_of(Compression.power_sgd().method, 2), "something that all workers do together"),
    (lambda: plan_of(Compression.comp_skip().method, 2), "asynchronous training: expected"),
    (lambda: plan_of(Compression.top_k().method, 2, None, RandomK(4, unbiased=True)), "with error feedback that diverges"),
    (lambda: plan_of(Compression(RandomK(4, unbiased=True)).method, 2), "with error feedback that diverges"),
    (lambda: plan_of(Compression.top_k().method, 2, reuse=True), "expected a method without feedback"),
    (lambda: plan_of(Compression.qsgd().method, 2, reuse=1), "reuse must be True or False"),  # type: ignore[arg-type]
    (lambda: plan_of(Compression.top_k().method, 2, None, "sign"), "server_compressor: expected an instance"),  # type: ignore[arg-type]
    (lambda: Server(plan(Sign(), Sign(), 2), list(net().named_parameters()), torch.optim.LBFGS(net().parameters())), "evaluates its closure"),
    (lambda: Worker(plan(Sign(), Sign(), 2), [list(net().named_parameters())], torch.optim.SparseAdam(net().parameters()), 0), "Use Adam"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_cannot_be_done_is_refused(case: int) -> None:
    do, message = WRONG[case]
    with warnings.catch_warnings(), pytest.raises(CompressionError, match=message):
        warnings.simplefilter("ignore")
        do()


def test_state_goes_on_after_a_checkpoint() -> None:
    """One worker, so that the order is given: twelve steps are the same bits as six, a save, and six of new objects."""

    def steps(job: SimulatedJob, n: int, backward: Gradients) -> None:
        for _ in range(n):
            while job.possible() != [Event("compute", 0)]:
                job.happen(job.possible()[-1], backward)
            job.happen(Event("compute", 0), backward)
        while job.up[0, 0] and job.up[0, 0][0].kind is Kind.PUSH:
            job.happen(Event("up", 0), backward)

    def fresh() -> SimulatedJob:
        return SimulatedJob(plan(TopK(4), Sign(), 1), sgd(momentum=0.9))

    through, first, second = fresh(), fresh(), fresh()
    backward = Gradients()
    steps(through, 6, backward)
    # What the save does: the worker is given x exactly, so what the server had not sent yet is there.
    for job in (through,):
        job.up[0, 0].clear()
        job.up[0, 0].append(Message(Kind.PULL_EXACT, 0))
    steps(through, 6, backward)
    backward = Gradients()
    steps(first, 6, backward)
    model, server, worker = first.masters[0].state_dict(), first.servers[0].state_dict(), first.workers[0].state_dict()
    moments = first.servers[0].optimizer.state_dict()
    second.masters[0].load_state_dict(model)
    second.servers[0].optimizer.load_state_dict(moments)
    second.servers[0].load_state_dict(server)
    second.workers[0].load_state_dict(worker)
    second.up[0, 0].clear()
    second.up[0, 0].append(Message(Kind.PULL_EXACT, 0))
    steps(second, 6, backward)
    for p, q in zip(through.masters[0].parameters(), second.masters[0].parameters(), strict=True):
        assert torch.equal(p, q)


def of_rank(transport: Any, servers: int, frozen: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, Worker | Server, Plan]:
    """A worker, or one of the last ranks, which serve."""
    model, workers = net(), transport.size - servers
    dict(model.named_parameters())[frozen].requires_grad_(False) if frozen else None
    optimizer, made = torch.optim.SGD(model.parameters(), lr=0.1), plan(TopK(4), Identity(), workers)
    shards = shards_of([(n, p) for n, p in model.named_parameters() if p.requires_grad], servers)
    serves = transport.rank >= workers
    side = Server(made, shards[transport.rank - workers], optimizer) if serves else Worker(made, shards, optimizer, transport.rank)
    return model, optimizer, side, made


def test_a_checkpoint_that_a_server_refuses_changes_no_worker(tmp_path: Path) -> None:
    """The parameter was frozen when it was saved, so a worker, which has all of the model, finds nothing wrong, and the server lacks it."""

    def saves(transport: Any) -> None:
        model, _, side, made = of_rank(transport, 1, "0.weight")
        if isinstance(side, Server):
            everything = saving.saved_by_server(side)
        else:
            everything = saving.saved_by_worker(side, model, None, transport, 1)
        saving.save(tmp_path, transport, made, 1, "SGD", everything, 0, set(), False)

    def loads(transport: Any) -> str:
        model, optimizer, side, made = of_rank(transport, 1, "")
        worker = side if isinstance(side, Worker) else None
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        if worker is not None:
            worker.answers = [5]
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(CheckpointError) as error:
            saving.load(tmp_path, transport, made, 1, optimizer, side, model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert worker is None or worker.answers == [5]
        return str(error.value)

    run_simulated(3, saves)
    for said in run_simulated(2, loads):
        assert "the trained parameter '0.weight' does not fit" in said, said


def moment_radius(step: float, alpha: float, tau: int) -> float:
    """Of E[A ⊗ A], A the step of (x_k, …, x_{k−τ}) on a quadratic with L = 1 whose gradient at x_{k−τ} is compressed with E C(v)² = α v²."""
    move = np.eye(tau + 1, k=-1)
    move[0, 0] = 1.0
    gradient = np.zeros_like(move)
    gradient[0, tau] = -step
    mean = move + gradient
    return float(np.abs(np.linalg.eigvals(np.kron(mean, mean) + (alpha - 1) * np.kron(gradient, gradient))).max())


@pytest.mark.parametrize("tau", [0, 1, 3, 7])
def test_the_suggested_step_is_stable(tau: int) -> None:
    """In the mean square; without delay it is the limit itself, and with it three times as much is too much: the controls."""
    for alpha in (1.0, 4.0, 64.0, 1024.0):
        step = suggested_step_size(alpha, tau, 1.0)
        assert moment_radius(0.999 * step, alpha, tau) < 1
        assert moment_radius((1.001 if tau == 0 else 3.0) * step, alpha, tau) > 1
        assert suggested_step_size(alpha, tau, 4.0) == step / 4


def test_the_mean_square_limit_is_the_moment_matrix() -> None:
    """What `hvd-ecsgd reproduce stale` compares the rule with, by another way; and the limits that are known in closed form."""
    for alpha, tau in ((2.0, 0), (4.0, 1), (16.0, 3)):
        limit = mean_square_limit(alpha, tau)
        assert moment_radius(0.99 * limit, alpha, tau) < 1 < moment_radius(1.01 * limit, alpha, tau)
    assert mean_square_limit(16.0, 0) == pytest.approx(2 / 16, rel=1e-3)
    measured = {0: 2.0, 1: 1.0, 3: 0.4450, 7: 0.2091, 15: 0.1013}
    for tau, limit in measured.items():
        assert delay_limit(tau, 1.0) == pytest.approx(limit, abs=5e-5) and delay_limit(tau, 2.0) == delay_limit(tau, 1.0) / 2
        assert suggested_step_size(1.0, tau, 1.0) <= min(delay_limit(tau, 1.0), delay_limit(tau, 1.0, varying=True))
        assert moment_radius(0.999 * limit, 1.0, tau) < 1 < moment_radius(1.001 * limit, 1.0, tau)
    assert delay_limit(3, 1.0, varying=True) < 0.4226, "unstable there with the pattern 0, 1, 2, 3, 3, 3"
    for tau, smooth in ((-1, 1.0), (1, 0.0)):
        with pytest.raises(CompressionError):
            delay_limit(tau, smooth)


def test_alpha_is_the_compressors() -> None:
    assert alpha_of(RandomK(8, unbiased=True), 64) == 8.0
    assert alpha_of(QSGD(1, 512), 100) == 11.0
    assert alpha_of(Identity(), 5) == 1.0
    with pytest.raises(CompressionError, match="unbiased"):
        alpha_of(Sign(), 5)  # type: ignore[arg-type]
    for alpha, tau, smooth in ((0.5, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0)):
        with pytest.raises(CompressionError):
            suggested_step_size(alpha, tau, smooth)
