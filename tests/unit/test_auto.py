"""`Compression.auto` on simulated workers with clocks of their own: what is chosen, when, that all ranks choose alike, and that nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer, GradientExchange, load_checkpoint, save_checkpoint
from hvd_ecsgd.compressors import Identity
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import ALL
from tests.problems import mlp, same_bits, slot, told, train, weights
from tests.unit.test_invariants import LRS, largest_violation, trajectory

SLOW = {"none": 1.0, "fp16": 0.6, "double_squeeze": 0.3}
"""Seconds of a step on a slow network."""
FAST = {"none": 1.0, "fp16": 0.95, "double_squeeze": 1.8}


def auto(trial: int = 5, every: int | None = None, **options: Any) -> Compression:
    """Among these three."""
    fp16, double_squeeze = Compression.fp16(error_feedback=True, **options), Compression.double_squeeze(**options)
    return Compression.auto({"none": Compression(Identity(), **options), "fp16": fp16, "double_squeeze": double_squeeze}, trial=trial, every=every)


class Clock:
    """Goes on by the time of a step of what is done now, between the end of one step and the end of the next."""

    def __init__(self, tuner: Any, seconds: Mapping[str, float]) -> None:
        self.tuner, self.seconds, self.now, self.at_end = tuner, seconds, 0.0, True
        tuner.times.clock = self

    def __call__(self) -> float:
        if self.at_end:
            self.now += self.seconds[self.tuner.current]
        self.at_end = not self.at_end
        return self.now


class Worker:
    """One that trains."""

    def __init__(self, transport: Transport, seconds: Mapping[str, float], **options: Any) -> None:
        self.model, self.rank = mlp(), transport.rank
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        bound = auto(**{**ALL, **options}).bind(self.model)
        self.optimizer: Any = DistributedOptimizer(sgd, self.model.named_parameters(), bound, transport=transport)
        self.compression, self.tuner = bound, bound.tuner
        self.clock = Clock(self.tuner, seconds)

    def train(self, *steps: int) -> None:
        train(self.model, self.optimizer, self.rank, range(*steps))

    @property
    def chosen(self) -> list[tuple[int, str]]:
        assert self.tuner is not None
        return [(d.step, d.chosen) for d in self.tuner.decisions]


def by_rank(seconds: Sequence[Mapping[str, float]], steps: int, **options: Any) -> list[tuple[list[tuple[int, str]], str, torch.Tensor]]:
    def run(transport: Transport) -> Any:
        worker = Worker(transport, seconds[transport.rank], **options)
        worker.train(steps)
        return worker.chosen, repr(worker.compression.method), weights(worker.model)

    return run_simulated(len(seconds), run)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([SLOW, SLOW, SLOW], "double_squeeze"),
        ([FAST, FAST], "none"),  # a twentieth is not worth it
        ([{**FAST, "fp16": 0.8}] * 2, "fp16"),
        ([SLOW, {**SLOW, "double_squeeze": 2.0}], "fp16"),  # the slowest rank counts
        ([{**SLOW, "none": 0.1}, SLOW], "double_squeeze"),
    ],
)
def test_all_ranks_go_on_with_the_fastest(seconds: Sequence[Mapping[str, float]], chosen: str) -> None:
    """After 15 steps and one more, since nothing was measured in the first. What it is, the method itself shows."""
    ranks = by_rank(seconds, 18)
    # The first step ends when the clock begins, so the first method takes one step more.
    assert all(decisions == [(16, chosen)] for decisions, _, _ in ranks)
    method = {"none": Compression(Identity(), **ALL), "fp16": Compression.fp16(error_feedback=True, **ALL)}.get(
        chosen, Compression.double_squeeze(**ALL)
    )
    assert all(text == repr(method.method) for _, text, _ in ranks)
    assert same_bits(x for _, _, x in ranks)


def test_the_figures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hvd_ecsgd")
    by_rank([SLOW, SLOW], 16)
    assert caplog.messages == [
        "Compression.auto after 16 steps (training began): double_squeeze; a step took none 1000.0 ms, fp16 600.0 ms, double_squeeze 300.0 ms."
    ]


def test_nothing_is_lost() -> None:
    """From one method to the next and to the one that was chosen, with learning rates that change."""
    lrs = [*LRS, *LRS, *LRS][:24]

    def make() -> Compression:  # a sum of 16 bit numbers is rounded, so fp16 loses a little by itself
        top_k, double_squeeze = Compression.top_k(5, **ALL), Compression.double_squeeze(**ALL)
        return Compression.auto({"none": Compression(Identity(), **ALL), "top_k": top_k, "double_squeeze": double_squeeze}, trial=2)

    def slowly(optimizer: Any, t: int) -> None:
        if t == 0:
            Clock(optimizer.compression.tuner, {**SLOW, "top_k": 0.5})
        assert t < 8 or optimizer.compression.tuner.current == "double_squeeze"

    records = trajectory(make, lrs, change=slowly)
    assert all(same_bits(r.x for r in ranks) for ranks in records)
    assert largest_violation(records, lrs) < 1e-13
    assert records[-1][0].e.any()


def test_all_is_tried_again_when_steps_become_slower_or_at_a_given_distance() -> None:
    def run(transport: Transport) -> Any:
        drifting, regular = (Worker(transport, SLOW, trial=2, every=every) for every in (None, 40))
        drifting.train(120)
        drifting.clock.seconds = FAST
        drifting.train(120, 330)
        regular.train(100)
        return drifting.chosen, [d.why for d in drifting.tuner.decisions], regular.chosen

    for drifting, why, regular in run_simulated(2, run):
        assert [name for _, name in drifting] == ["double_squeeze", "none"]
        assert why[1] == "a step took 1800.0 ms and 300.0 ms before"
        assert [name for _, name in regular] == ["double_squeeze"] * 3
        assert regular[1][0] - regular[0][0] == 40 + 2 * len(SLOW)


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN")
def test_a_step_that_was_undone_counts_as_one() -> None:

    def run(transport: Transport) -> Any:
        worker = Worker(transport, SLOW)

        def before(step: int) -> None:
            if step in (3, 9) and transport.rank == 1:
                with torch.no_grad():
                    worker.model[0].bias[0] = float("nan")  # of one step, which is undone
            elif step in (4, 10):
                with torch.no_grad():
                    worker.model[0].bias[0] = 0.0

        train(worker.model, worker.optimizer, transport.rank, range(18), before)
        assert worker.compression.undone_steps == 2
        return worker.chosen

    assert run_simulated(2, run) == [[(16, "double_squeeze")]] * 2


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_resumed_run_goes_on_as_what_was_saved_and_tries_anew(trained_before: bool, tmp_path: Path) -> None:
    """Residuals, on workers and servers, bit for bit; by state_dict, also before there is an optimizer, and by a checkpoint."""

    def run(transport: Transport) -> None:
        through = Worker(transport, SLOW)
        through.train(20)
        saved = through.compression.state_dict()
        save_checkpoint(tmp_path / "a", through.model, through.optimizer, through.compression)

        resumed = Worker(transport, FAST)
        if trained_before:
            resumed.train(3)
        load_checkpoint(tmp_path / "a", resumed.model, resumed.optimizer, resumed.compression)
        assert resumed.tuner.current == "double_squeeze" and resumed.tuner.trying
        assert resumed.compression.method == through.compression.method
        for name in ("residual", "server_residual"):
            assert torch.equal(slot_of(resumed.compression, name), slot_of(through.compression, name)) and slot_of(through.compression, name).any()
        resumed.train(20, 40)
        assert resumed.chosen == [(36, "none")]

        early = auto(**ALL).bind(mlp())
        early.load_state_dict(saved)
        assert early.method == through.compression.method and early.tuner is not None and early.tuner.current == "double_squeeze"
        other = auto(seed=3, **ALL).bind(mlp())
        with pytest.raises(CompressionError, match="saved by another method"):
            other.load_state_dict(saved)

    def slot_of(compression: Any, name: str) -> torch.Tensor:
        entries = compression.state_dict()["parameters"].values()
        return torch.cat([entry[name].flatten() for entry in entries])

    run_simulated(2, run)


def test_a_run_that_goes_back_to_an_earlier_step_tries_anew() -> None:
    """With what it does now: none of the figures is of a step that was taken before."""

    def run(transport: Transport) -> Any:
        worker = Worker(transport, SLOW)
        worker.train(20)
        saved = copy.deepcopy(worker.compression.state_dict())
        worker.train(20, 50)
        worker.compression.load_state_dict(saved)
        worker.clock.seconds = FAST
        worker.train(20, 40)
        return worker.chosen, [{n: round(t, 6) for n, t in d.seconds.items()} for d in worker.tuner.decisions], worker.tuner.decisions[-1].why

    for chosen, seconds, why in run_simulated(2, run):
        assert chosen == [(16, "double_squeeze"), (36, "none")]
        assert seconds == [SLOW, FAST] and why == "state was loaded"


def test_without_an_optimizer() -> None:
    def run(transport: Transport) -> list[str]:
        model = mlp()
        exchange = GradientExchange(model.named_parameters(), auto(trial=2, **ALL), transport, lr=0.1)
        tuner = exchange.compression.tuner
        assert tuner is not None
        Clock(tuner, SLOW)
        for step in range(8):
            exchange.reduce({name: torch.full_like(p, float(step)) for name, p in model.named_parameters()})
        return [d.chosen for d in tuner.decisions]

    assert run_simulated(2, run) == [["double_squeeze"]] * 2


def test_methods_of_ones_own() -> None:
    mine = {"none": Compression(Identity(), **ALL), "top_k(10)": Compression.top_k(10, **ALL), "one_bit": Compression.one_bit(**ALL)}

    def run(transport: Transport) -> Any:
        worker = Worker.__new__(Worker)
        worker.model, worker.rank = mlp(), transport.rank
        sgd = torch.optim.SGD(worker.model.parameters(), lr=0.1)
        worker.compression = Compression.auto(mine, trial=3).bind(worker.model)
        worker.tuner = worker.compression.tuner
        worker.optimizer = DistributedOptimizer(sgd, worker.model.named_parameters(), worker.compression, transport=transport)
        Clock(worker.tuner, {"none": 1.0, "top_k(10)": 0.4, "one_bit": 0.5})
        worker.train(12)
        assert slot(worker.compression, "residual").any()
        return worker.chosen

    assert run_simulated(2, run) == [[(10, "top_k(10)")]] * 2


def test_ranks_that_would_choose_among_others_are_told() -> None:
    def run(transport: Transport) -> None:
        worker = Worker(transport, SLOW, trial=2 + transport.rank)
        with pytest.raises(DisagreementError, match="auto"):
            worker.train(2)

    run_simulated(2, run)


def test_what_is_tried_by_default() -> None:
    """With options of its own."""
    tuner = Compression.auto(seed=3, **ALL).bind(mlp()).tuner
    assert tuner is not None
    methods = [Compression(Identity(), seed=3, **ALL), Compression.fp16(error_feedback=True, seed=3, **ALL), Compression.power_sgd(seed=3, **ALL)]
    assert {name: c.method for name, c in tuner.candidates.items()} == dict(
        zip(("none", "fp16", "power_sgd"), (m.method for m in methods), strict=True)
    )


def test_wrong_use_is_named() -> None:
    dense, detached = Compression(Identity()), Compression.detached(8)
    told(CompressionError, lambda: Compression.auto(["none", "fp16"]), "auto(): candidates must be {name: ", "got ['none', 'fp16']")  # type: ignore[arg-type]
    told(CompressionError, lambda: Compression.auto({"fp16": Compression.fp16()}), "expected candidates for 'none'", "['fp16']")
    told(CompressionError, lambda: Compression.auto({"none": dense, "detached": detached}), "candidate 'detached'", "feedback rule", "ErrorFeedback")
    told(CompressionError, lambda: Compression.auto({"none": dense, "x": dense.bind(mlp())}), "candidate 'x'", "not bound")  # type: ignore[dict-item]
    told(CompressionError, lambda: Compression.auto({"none": dense, "fp16": dense}, seed=1), "seed belongs to the default candidates")
    told(CompressionError, lambda: Compression.auto(trial=1), "trial", "≥ 2")
    told(CompressionError, lambda: Compression.auto(every=15), "every=15", "more steps than a trial of all takes, 15")
    assert "auto(none: " in repr(Compression.auto())


def test_steps_are_counted_where_something_is_compiled() -> None:
    """torch 2.2 takes step hooks off its optimizers then, and what listens for steps of others' optimizers would hear of none."""
    worker = Worker(SelfTransport(), SLOW)
    torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1))
    worker.train(16)
    assert len(worker.chosen) == 1


def test_one_worker_stays_as_it_is() -> None:
    """It is timed like others; nothing is sent."""
    worker = Worker(SelfTransport(), FAST)
    worker.train(20)
    assert worker.chosen == [(16, "none")]
