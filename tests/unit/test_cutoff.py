"""The straggler cutoff: who is late is answered for, and nothing of its gradients is lost. Who is late when is written down, so bits are given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer, SequenceError, TransportError
from hvd_ecsgd.asynchronous.attendance import Attendance, Cutoff, Met, Over, Row, Stand, Together, best_cutoff
from hvd_ecsgd.asynchronous.cutoff import CutoffWorker
from hvd_ecsgd.asynchronous.partial import PartialSteps
from hvd_ecsgd.compressors import Sign, TopK
from hvd_ecsgd.transport import Transport, run_simulated

ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: Compression.none(),
    "top_k": lambda: Compression.top_k(4, **ALL),
    "random_block": lambda: Compression.random_block(4, **ALL),
    "qsgd": lambda: Compression.qsgd(15, 16, **ALL),
    "double_squeeze": lambda: Compression.double_squeeze(TopK(3), Sign(), **ALL),
    "double_squeeze, some dense": lambda: Compression.double_squeeze(dense_below=5),
    "central": lambda: Compression.double_squeeze(central=True, **ALL),
}


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).double()


def draw(model: torch.nn.Module, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


class Ranks:
    """`late[t]`: ranks whose gradient is not there in step t; it is begun again after the step in which it took part. One thread for each rank: what
    the script does, and what is done for it, in turns."""

    def __init__(self, transport: Transport, method: Any, late: Sequence[Sequence[int]], lr: float = 0.1, **options: Any) -> None:
        self.late, self.rank = late, transport.rank
        self.model = model_of()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, **options)
        least = min(transport.size - len(set(absent)) for absent in late)
        cutoff = Cutoff(least=least, slack=0.0)
        self.worker = CutoffWorker(
            method.method, list(self.model.named_parameters()), self.optimizer, transport, cutoff, self.optimizer.step, clock=lambda: 0.0
        )
        self.put_in = 0
        """Gradients that this rank has put in."""

    def offer(self, step: int, before: Callable[[torch.nn.Module], object] = lambda model: None) -> bool:
        """Whether this rank is in time."""
        if self.rank in self.late[step]:
            return False
        self.worker.apply_all()
        draw(self.model, self.rank, self.put_in)
        before(self.model)
        self.worker.offer()
        self.put_in += 1
        return True

    def x(self) -> torch.Tensor:
        self.worker.apply_all()
        return flat(self.model)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def held(worker: CutoffWorker, slot: str, n: int) -> torch.Tensor:
    """A slot of all parameters in the model's order, whole: a server's piece at its place in zeros."""
    whole = []
    places = {name: p.shape.numel() for name, p in worker.state.named}
    found = {}
    for bucket in worker.state.buckets:
        assert bucket.state is not None and bucket.exchange_state is not None
        state = {**bucket.state, **bucket.exchange_state}
        table = bucket.segments if slot in bucket.state else bucket.method.exchange.state_segments(bucket.segments, worker.transport.rank, n)
        for segment, full in zip(table, bucket.segments, strict=True):
            out = torch.zeros(full.numel, dtype=torch.float64)
            if slot in state:
                first = segment.offset - full.offset
                out[first : first + segment.numel] = state[slot][segment.start : segment.stop]
            found[segment.name] = out
    for name in places:
        whole.append(found[name])
    return torch.cat(whole)


LATE = [[], [1], [1], [], [0, 1], [0], [], [1], []]
RATES = [0.1, 0.1, 0.05, 0.05, 0.01, 0.01, 0.2, 0.2, 0.2]


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("method", ["top_k", "random_block", "double_squeeze", "central", "none"])
def test_nothing_is_lost_at_any_step(method: str, n: int) -> None:
    """y = x − η_{t−1}(E + mean e) obeys y⁺ = y − η_t Σ g_i / n, over those that are there, at every step, as η changes; every g is put in once."""

    def script(transport: Transport) -> list[tuple[torch.Tensor, ...]]:
        ranks = Ranks(transport, METHODS[method](), LATE)
        seen = []
        for step, lr in enumerate(RATES):
            ranks.optimizer.param_groups[0]["lr"] = lr
            put = torch.zeros_like(flat(ranks.model))

            def keep(model: torch.nn.Module, put: torch.Tensor = put) -> None:
                put.copy_(gradient(model))

            ranks.offer(step, keep)
            ranks.worker.take_part()
            seen.append((ranks.x().clone(), held(ranks.worker, "residual", n), held(ranks.worker, "server_residual", n), put))
        assert ranks.put_in == sum(transport.rank not in late for late in LATE) and ranks.worker.state.step == len(LATE)
        return seen

    by_rank = run_simulated(n, script)
    y, before = flat(model_of()), None
    for t, lr in enumerate(RATES):
        now = [seen[t] for seen in by_rank]
        assert all(torch.equal(x, now[0][0]) for x, *_ in now), "x is the same bits on all ranks that have applied the step"
        waits = sum(e for _, e, _, _ in now) / n + sum(server for _, _, server, _ in now)
        y = y - lr * sum(g for *_, g in now) / n
        assert torch.allclose(now[0][0] - lr * waits, y, atol=1e-12), f"step {t}"
        for r in LATE[t]:
            e, waited = now[r][1], by_rank[r][t - 1][1]
            assert torch.allclose(e, RATES[t - 1] / lr * waited, atol=1e-12), f"step {t}: who is late sends nothing, and its residual waits"
        before = waits
    assert method == "none" or float(before.abs().max()) > 1e-3


def test_what_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: a late worker's residual that is forgotten, or kept in the units of another learning rate; each breaks what is tested above."""
    for break_it in ("forget", "unit"):

        def dropped(self: PartialSteps, bucket: Any, present: Any, offered: Any, own: Any = PartialSteps._begin, how: str = break_it) -> Any:
            if not present[self.transport.rank] and bucket.residual is not None:
                bucket.residual.mul_(0.0 if how == "forget" else self._groups[0]["lr"] / (bucket.unit or 1.0))
            return own(self, bucket, present, offered)

        with monkeypatch.context() as patch:
            patch.setattr(PartialSteps, "_begin", dropped)
            with pytest.raises(AssertionError, match="step"):
                test_nothing_is_lost_at_any_step("top_k", 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_with_all_in_time_it_is_synchronous_training(method: str, n: int) -> None:
    """The same bits as `DistributedOptimizer`, with momentum and decay; and other bits with somebody late: the control."""
    options = {"momentum": 0.9, "weight_decay": 1e-2}

    def synchronous(transport: Transport) -> torch.Tensor:
        model = model_of()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), METHODS[method]().bind(model), transport=transport)
        for step in range(6):
            optimizer.zero_grad()
            drawn = model_of()
            draw(drawn, transport.rank, step)
            (sum((p * q.grad).sum() for p, q in zip(model.parameters(), drawn.parameters(), strict=True))).backward()
            optimizer.step()
        return flat(model).clone()

    def partial(transport: Transport, late: Sequence[Sequence[int]]) -> torch.Tensor:
        ranks = Ranks(transport, METHODS[method](), late, **options)
        for step in range(6):
            ranks.offer(step)
            ranks.worker.take_part()
        return ranks.x().clone()

    expected = run_simulated(n, synchronous)
    got = run_simulated(n, lambda transport: partial(transport, [[]] * 6))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    if n > 1:
        other = run_simulated(n, lambda transport: partial(transport, [[], [1], [], [], [], []]))
        assert all(torch.equal(x, other[0]) for x in other) and not torch.equal(other[0], expected[0])


@pytest.mark.parametrize("exact", [True, False])
def test_a_step_with_an_inf_is_undone_on_all_ranks(exact: bool) -> None:
    """One rank is late, one holds an inf: residuals, also of servers, are as before (with exact=True bit for bit), x too; and training goes on."""

    def script(transport: Transport) -> None:
        compression = Compression.double_squeeze(TopK(3), Sign(), exact=exact, **ALL)
        ranks = Ranks(transport, compression, [[], [], [2], []])
        for step in range(4):
            ranks.optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            before = [] if step == 0 else [held(ranks.worker, slot, 3) for slot in ("residual", "server_residual")] + [ranks.x().clone()]

            def spoil(model: torch.nn.Module, step: int = step) -> None:
                if step == 2 and transport.rank == 0:
                    next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]

            ranks.offer(step, spoil)
            ranks.worker.take_part()
            if step == 2:
                with pytest.warns(RuntimeWarning, match="undone on all ranks"):
                    ranks.worker.apply_all()
            now = [held(ranks.worker, slot, 3) for slot in ("residual", "server_residual")] + [ranks.x()]
            same = all(torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-12) for a, b in zip(before, now))
            assert same == (step in (0, 2)), f"step {step}"
        assert ranks.worker.state.undone == 1 and ranks.worker.applied == 4

    run_simulated(3, script)


def test_a_late_worker_applies_steps_with_the_rates_they_were_taken_with() -> None:
    """Worker 2 misses three steps while others' rates fall; its own rate stays the script's, and x is that of the others. Adam, uncompressed."""

    def script(transport: Transport) -> torch.Tensor:
        ranks = Ranks(transport, Compression.none(), [[], [2], [2], [2], []])
        ranks.optimizer = torch.optim.Adam(ranks.model.parameters(), lr=0.1)
        named = list(ranks.model.named_parameters())
        cutoff = Cutoff(least=2, slack=0.0)
        adam = ranks.optimizer
        ranks.worker = CutoffWorker(Compression.none().method, named, adam, transport, cutoff, adam.step, lambda: 0.0)
        for step in range(5):
            if transport.rank != 2:
                adam.param_groups[0]["lr"] = 0.1 / (1 + step)
            ranks.offer(step)
            ranks.worker.take_part()
            if transport.rank != 2:
                ranks.worker.apply_all()
        x = ranks.x().clone()
        assert adam.param_groups[0]["lr"] == (0.1 if transport.rank == 2 else 0.1 / 5)
        assert ranks.worker.attendance.late == [0, 0, 3] and ranks.worker.applied == 5
        return x

    first, *others = run_simulated(3, script)
    assert all(torch.equal(first, x) for x in others)


def test_state_goes_on() -> None:
    """A checkpoint while x is held, with another worker late: what follows is the same bits as without it; without the residuals it is not."""

    def script(transport: Transport, how: str) -> torch.Tensor:
        late: list[list[int]] = [[], [1], [], [0], [], []]
        ranks = Ranks(transport, Compression.double_squeeze(TopK(3), Sign(), **ALL), late, momentum=0.9)
        for step in range(6):
            if step == 3:
                ranks.x()
                ranks.worker._say(Stand.MEETING)
                ranks.worker.take_part()
                saved = ranks.worker.state_dict()
                if how != "through":
                    again = Ranks(transport, Compression.double_squeeze(TopK(3), Sign(), **ALL), late, momentum=0.9)
                    again.put_in = ranks.put_in
                    again.worker._say(Stand.MEETING)
                    again.worker.take_part()
                    again.model.load_state_dict(ranks.model.state_dict())
                    again.optimizer.load_state_dict(ranks.optimizer.state_dict())
                    again.worker.use(again.optimizer)
                    if how == "saved":
                        again.worker.load_state_dict(saved)
                    ranks = again
                ranks.worker._say(Stand.COMPUTING)
            ranks.offer(step)
            ranks.worker.take_part()
        return ranks.x().clone()

    through, saved, forgotten = (run_simulated(3, lambda transport, how=how: script(transport, how)) for how in ("through", "saved", "forgotten"))
    assert all(torch.equal(a, b) for a, b in zip(through, saved, strict=True))
    assert not torch.equal(through[0], forgotten[0])


# -- who is waited for ------------------------------------------------------------------------------------------------------------


def rows(*stands: Stand | tuple[Stand, float], clock: float = 0.0) -> list[Row]:
    """Of workers whose stand, and seconds if they matter, are these."""
    pairs = [stand if isinstance(stand, tuple) else (stand, 1.0) for stand in stands]
    return [Row(stand, clock if r == 0 else 1e6, seconds, r, (0.1,)) for r, (stand, seconds) in enumerate(pairs)]


B, R, M, H, F = Stand.COMPUTING, Stand.READY, Stand.MEETING, Stand.HOLDING, Stand.FINISHED


@pytest.mark.parametrize(
    ("times", "c"),
    [
        ([[1.0], [1.0], [1.0], [5.0]], 3),
        ([[1.0], [1.0], [1.0], [1.2]], 4),
        ([[1.0], [1.0], [1.0], [4 / 3]], 4),  # as good with all: nobody is left behind for nothing
        ([[1.0], [3.0], [3.0], [3.0]], 4),
        ([[1.0], [5.0], [5.0], [9.0]], 1),
        ([[1.0, 1.0, 1.0, 9.0], [1.0, 9.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 9.0, 1.0]], 3),  # another one each time
        ([[2.0]], 1),
        ([[0.0], [0.0]], 2),
    ],
)
def test_the_cutoff_maximises_gradients_by_time(times: list[list[float]], c: int) -> None:
    assert best_cutoff(times) == c


def test_the_cutoff_is_chosen_from_measured_times_and_chosen_anew() -> None:
    """The first steps wait for all; one that is five times as slow is left out then, and waited for again once it is as fast as the others."""
    attendance = Attendance(Cutoff(window=4), 4)
    assert attendance.decide(rows(R, R, R, B)) is None, "nothing is known of worker 3"
    assert attendance.decide(rows(R, R, R, (R, 5.0))) == Together((True,) * 4, 3)
    assert attendance.c == 3
    assert attendance.decide(rows(R, R, B, (B, 1.0))) is None
    assert attendance.decide(rows(R, R, R, (B, 1.0))) == Together((True, True, True, False), 2)
    assert attendance.late == attendance.missed == [0, 0, 0, 1]
    for _ in range(4):
        assert attendance.decide(rows(R, R, R, (R, 1.0))) is not None
    assert attendance.c == 4 and attendance.missed == [0] * 4 and attendance.late == [0, 0, 0, 1]


def test_who_is_nearly_there_is_waited_for_and_nobody_for_ever() -> None:
    """By the clock of rank 0 alone: a slack of a tenth of a gradient's time. The controls: no slack, and one that is far from done."""
    for slack, seconds, first in ((0.1, 0.95, False), (0.0, 0.95, True), (0.1, 0.5, True), (0.1, 2.5, True)):
        attendance = Attendance(Cutoff(least=2, slack=slack), 3)
        assert attendance.decide(rows(R, R, R)) is not None
        assert (attendance.decide(rows(R, R, (B, seconds), clock=7.0)) is not None) == first
        if not first:
            assert attendance.decide(rows(R, R, (B, seconds), clock=7.09)) is None
            assert attendance.decide(rows(R, R, (B, seconds), clock=7.11)) == Together((True, True, False), 1)
    attendance = Attendance(Cutoff(least=1, slack=0.0, cap=2), 2)
    assert [attendance.decide(rows(R, B)) is not None for _ in range(4)] == [True, True, False, False], "a cap of two steps without a worker"
    assert attendance.waited_for == [1]
    assert attendance.decide(rows(R, R)) is not None and attendance.missed == [0, 0]


def test_rounds_are_few_while_nobody_is_expected() -> None:
    """Half of the time until the first is expected; often once somebody waits; and never seldomer than 50 times a second."""
    attendance = Attendance(Cutoff(), 2)
    assert attendance.pause(rows(B, B)) == 5e-4, "nothing is known yet"
    attendance.decide(rows((R, 0.04), (R, 0.2)))
    assert attendance.pause(rows((B, 0.01), (B, 0.0))) == pytest.approx(0.015)
    assert attendance.pause(rows((R, 0.04), (B, 0.04))) == pytest.approx(0.04 / 50)
    assert attendance.pause(rows(F, (B, 0.0))) == 2e-2


def test_who_meets_or_is_done_is_not_waited_for() -> None:
    attendance = Attendance(Cutoff(least=3, slack=0.0), 4)
    assert attendance.decide(rows(M, M, B, F)) is None and attendance.waited_for == [2]
    assert attendance.decide(rows(M, M, R, F)) == Together((False, False, True, False), 2)
    assert attendance.late == [0] * 4, "they do not compute"
    assert isinstance(attendance.decide(rows(M, M, M, F)), Met)
    assert attendance.decide(rows(H, M, H, F)) is None
    assert isinstance(attendance.decide(rows(F, F, F, F)), Over)
    assert attendance.decide(rows(B, B, B, B)) is None and attendance.waited_for == []
    told = rows(R, (B, 0.25))[1].told()
    assert Row.of(told).told() == told and Row.of(told).stand is B and len(told) == 5


# -- wrong use ---------------------------------------------------------------------------------------------------------------------


def worker_of(method: Any, optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer] | None = None, cutoff: Cutoff | None = None) -> CutoffWorker:
    from hvd_ecsgd.transport import SelfTransport

    model = model_of()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer(model)
    return CutoffWorker(method.method, list(model.named_parameters()), sgd, SelfTransport(), cutoff or Cutoff(), sgd.step)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: Cutoff(least=0), "Cutoff: least must be None, or a number of workers ≥ 1"),
    (lambda: Cutoff(slack=-0.1), "Cutoff: slack must be a finite number ≥ 0"),
    (lambda: Cutoff(window=0), "Cutoff: window must be a number of gradients ≥ 1"),
    (lambda: Cutoff(cap=-1), "Cutoff: cap must be a number of steps ≥ 0"),
    (lambda: worker_of(Compression.none(), cutoff=Cutoff(least=2)), "a number of workers from 1 to the 1 that there are"),
    (lambda: worker_of(Compression.detached()), "a straggler cutoff: expected a method .* neither shift the model"),
    (lambda: worker_of(Compression.dist_ef_sgd()), "nor keep momentum"),
    (lambda: worker_of(Compression.comp_skip()), "a straggler cutoff: expected"),
    (lambda: worker_of(Compression.power_sgd()), "something that all workers do together"),
    (lambda: worker_of(Compression.none(), lambda model: torch.optim.LBFGS(model.parameters())), "evaluates its closure"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_cannot_be_done_is_refused(case: int) -> None:
    do, message = WRONG[case]
    with warnings.catch_warnings(), pytest.raises(CompressionError, match=message):
        warnings.simplefilter("ignore")
        do()


def test_what_a_script_must_not_do() -> None:
    """Everything is looked at before a gradient is given away; and nothing is done with x that is not held, or after the end."""
    worker = worker_of(Compression.top_k(4, **ALL))
    model_of_it = [p for _, p in worker.state.named]
    for p in model_of_it:
        p.grad = torch.ones_like(p)
    worker.optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(CompressionError, match="lr=nan, and no step can be taken with that"):
        worker.offer()
    worker.optimizer.param_groups[0]["lr"] = 0.1
    model_of_it[0].requires_grad_(False)
    with pytest.raises(CompressionError, match=r"parameter '0.weight' was frozen after the optimizer was made"):
        worker.offer()
    model_of_it[0].requires_grad_(True)
    assert all(p.grad is not None for p in model_of_it)
    for what in (worker.state_dict, lambda: worker.load_state_dict({})):
        with pytest.raises(SequenceError, match=r"is to be called inside of `with optimizer.consistent\(\)`"):
            what()
    worker._stand = Stand.HOLDING
    with pytest.raises(SequenceError, match=r"step\(\) inside of"):
        worker.offer()
    with pytest.raises(SequenceError, match=r"finish\(\) inside of"):
        worker.finish()
    worker.leave()
    with pytest.raises(SequenceError, match=r"step\(\) after finish\(\)"):
        worker.offer()
    with pytest.raises(SequenceError, match=r"consistent\(\) after finish\(\)"):
        worker.meet()
    worker._error = ValueError("the network")
    with pytest.raises(TransportError, match="the exchange has failed: ValueError"):
        worker._say(Stand.READY)
