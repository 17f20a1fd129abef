"""Saving and loading, and how much memory a method takes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import BoundCompression, Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.compressors import TopK
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids
from tests.problems import mlp, same_bits, train, weights

N = 3


class Setup:
    """Model, optimizer, schedule: what a training script holds."""

    def __init__(self, case: Case, transport: Transport) -> None:
        self.case = case
        self.model = mlp()
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=case.momentum, weight_decay=1e-4)
        self.optimizer = DistributedOptimizer(sgd, self.model.named_parameters(), case.make(), transport=transport)
        self.compression: BoundCompression = self.optimizer.compression
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.3)
        self.rank = transport.rank

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            train(self.model, self.optimizer, self.rank, [step])
            self.schedule.step()

    def save(self) -> dict[str, Any]:
        with self.compression.at("averaged"):
            model = copy.deepcopy(self.model.state_dict())
        parts = {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "compression": self.compression.state_dict(),
        }
        file = io.BytesIO()
        torch.save(parts, file)
        file.seek(0)
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]

    def load(self, saved: dict[str, Any], order: str = "model optimizer schedule compression") -> None:
        for part in order.split():
            getattr(self, part).load_state_dict(saved[part])


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


def test_nothing_is_saved_or_loaded_between_the_backward_passes_of_a_step() -> None:
    """What has been accumulated is no part of any state. Before and after it is allowed (control)."""
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), backward_passes_per_step=2)
    state, everything = optimizer.compression.state_dict(), copy.deepcopy(optimizer.state_dict())
    for act in (
        optimizer.compression.state_dict,
        lambda: optimizer.compression.load_state_dict(state),
        lambda: optimizer.compression.switch(Compression.none),
        lambda: optimizer.load_state_dict(everything),
    ):
        act()
        for _ in range(2):
            model(torch.ones(1, 20)).sum().backward()
            with pytest.raises(CompressionError, match="between a backward pass and its optimizer"):
                act()
        optimizer.step()
        optimizer.zero_grad()


def test_residuals_of_several_param_groups_are_loaded_into_one() -> None:
    """Each is in units of its own learning rate; one bucket has one: what they are worth is kept."""

    def wrap(groups: Any) -> Any:
        return DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model.named_parameters(), Compression.top_k(8, **ALL))

    model = mlp()
    optimizer = wrap([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}])
    train(model, optimizer, 0, range(3))
    saved = optimizer.compression.state_dict()
    assert {entry["previous_lr"] for entry in saved["parameters"].values()} == {0.1, 0.01}
    optimizer = wrap(model.parameters())
    optimizer.compression.load_state_dict(saved)
    for name, entry in optimizer.compression.state_dict()["parameters"].items():
        before = saved["parameters"][name]
        torch.testing.assert_close(entry["residual"] * entry["previous_lr"], before["residual"] * before["previous_lr"])


LAST, FIRST = "model optimizer schedule compression", "compression schedule optimizer model"
ORDERS = [*((case, LAST) for case in CASES), *((by_name(name), FIRST) for name in ("top_k", "double_squeeze", "local_momentum"))]


@pytest.mark.parametrize(("case", "order"), ORDERS, ids=lambda v: v.split()[0] + " first" if isinstance(v, str) else v.name)
def test_a_resumed_run_is_the_run(case: Case, order: str) -> None:
    """6 steps, save, new objects, load, 3 steps: bit for bit 9 steps, and the same state; through torch.save with weights_only.

    The learning rate changes just there, so the units of the residual must have been saved too.

    The order of loading does not matter, except for methods that shift the model (detached): the model first, then the compression.
    """

    def worker(transport: Transport) -> Any:
        through = Setup(case, transport)
        through.train(0, 9)
        first = Setup(case, transport)
        first.train(0, 6)
        saved = first.save()
        second = Setup(case, transport)
        second.load(saved, order)
        second.train(6, 9)
        return through.save(), second.save()

    results = run_simulated(N, worker)
    for through, resumed in results:
        assert equal(through["model"], resumed["model"])
        assert equal(through["compression"], resumed["compression"])
        assert equal(through["optimizer"], resumed["optimizer"])
    assert same_bits(resumed["model"]["0.weight"] for _, resumed in results)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_loaded_state_is_saved_again_as_it_was(case: Case) -> None:
    """Before any step is taken: an evaluation job that loads and saves does not damage the checkpoint."""

    def worker(transport: Transport) -> bool:
        first, second = Setup(case, transport), Setup(case, transport)
        first.train(0, 3)
        saved = first.save()
        second.load(saved)
        return equal(second.compression.state_dict(), saved["compression"])

    assert all(run_simulated(N, worker))


@pytest.mark.parametrize("name", ["top_k", "random_block", "double_squeeze", "local_momentum", "detached"])
def test_a_run_resumed_without_the_state_is_another(name: str) -> None:
    """Control: residuals, or the step that seeds the blocks, matter."""

    def worker(transport: Transport) -> Any:
        through, first = Setup(by_name(name), transport), Setup(by_name(name), transport)
        through.train(0, 9)
        first.train(0, 5)
        second = Setup(by_name(name), transport)
        second.load(first.save(), "model optimizer schedule")
        second.train(5, 9)
        return torch.equal(weights(through.model, through.compression), weights(second.model, second.compression))

    assert not any(run_simulated(N, worker))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_state_is_a_copy(case: Case) -> None:
    """What was saved does not change when training goes on."""

    def worker(transport: Transport) -> bool:
        setup = Setup(case, transport)
        setup.train(0, 2)
        saved = setup.compression.state_dict()
        kept = copy.deepcopy(saved)
        setup.train(2, 4)
        return equal(saved, kept)

    assert all(run_simulated(2, worker))


def test_state_before_the_first_step() -> None:
    """Nothing was sent yet: an empty state, which loads."""
    bound = Compression.top_k().bind(mlp())
    saved = bound.state_dict()
    assert saved["parameters"] == {}
    assert saved["step"] == 0
    bound.load_state_dict(saved)
    assert equal(bound.state_dict(), saved)


def test_state_loaded_before_the_optimizer_exists_is_taken_over() -> None:
    """bind, load, then wrap: as loading after wrapping."""

    def worker(transport: Transport) -> Any:
        first = Setup(by_name("top_k"), transport)
        first.train(0, 3)
        saved = first.save()
        finals = []
        for early in (True, False):
            model = mlp()
            model.load_state_dict(saved["model"])
            bound = Compression.top_k(10).bind(model)
            if early:
                bound.load_state_dict(saved["compression"])
                assert equal(bound.state_dict(), saved["compression"])
            optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=bound, transport=transport)
            if not early:
                bound.load_state_dict(saved["compression"])
            train(model, optimizer, transport.rank, range(3, 6))
            finals.append(weights(model))
        return finals

    for early, late in run_simulated(2, worker):
        assert torch.equal(early, late)


# -- states that do not fit ------------------------------------------------------------------------------------------------------


def without(saved: dict[str, Any], name: str, slot: str) -> dict[str, Any]:
    changed = copy.deepcopy(saved)
    del changed["parameters"][name][slot]
    return changed


def with_value(saved: dict[str, Any], name: str, slot: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(saved)
    changed["parameters"].setdefault(name, {})[slot] = value
    return changed


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "format": (lambda s: {**s, "format": 99}, "format"),
    "no format": (lambda s: {}, "format"),
    "method": (lambda s: {**s, "method": "another"}, "another method"),
    "rank": (lambda s: {**s, "rank": (s["rank"] + 1) % N}, "rank"),
    "size": (lambda s: {**s, "size": N + 1}, f"of {N + 1}"),
    "unknown parameter": (lambda s: with_value(s, "no.such", "residual", torch.zeros(3)), "no.such"),
    "too few elements": (lambda s: with_value(s, "0.weight", "residual", torch.zeros(3)), "0.weight"),
    "slot missing": (lambda s: without(s, "2.bias", "residual"), "2.bias"),
    "server's part missing": (lambda s: without(s, "0.weight", "server_residual"), "0.weight"),
    "not a tensor": (lambda s: with_value(s, "0.weight", "residual", 1.0), "0.weight"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_state_that_does_not_fit_changes_nothing(what: str) -> None:
    """The error names what does not fit; state and parameters are as before, and training goes on as if nothing had been tried."""
    change, message = WRONG[what]

    def worker(transport: Transport) -> Any:
        finals = []
        for attempt in (True, False):
            setup = Setup(by_name("double_squeeze-everything"), transport)
            setup.train(0, 3)
            saved, held = setup.compression.state_dict(), weights(setup.model)
            if attempt:
                with pytest.raises(CompressionError, match=message):
                    setup.compression.load_state_dict(change(saved))
            assert equal(setup.compression.state_dict(), saved)
            assert torch.equal(weights(setup.model), held)
            setup.train(3, 5)
            finals.append(weights(setup.model))
        return finals

    for a, b in run_simulated(N, worker):
        assert torch.equal(a, b)


def test_state_of_another_step_on_one_rank_is_found() -> None:
    """One rank that loads an older state is noticed by every rank at the next step, before anything is sent."""

    def worker(transport: Transport) -> Any:
        setup = Setup(by_name("random_block"), transport)
        setup.train(0, 2)
        older = setup.compression.state_dict()
        setup.train(2, 4)
        newer = setup.compression.state_dict()
        resumed = Setup(by_name("random_block"), transport)
        resumed.compression.load_state_dict(older if transport.rank == 1 else newer)
        held = weights(resumed.model)
        with pytest.raises(DisagreementError, match="step"):
            resumed.train(4, 5)
        return torch.equal(held, weights(resumed.model))

    assert all(run_simulated(N, worker))


# -- memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_memory_is_what_the_table_says(case: Case, n: int) -> None:
    """State elements over elements of compressed parameters: `slots`, and 1/n of `server_slots` (a piece is up to 7 elements longer)."""

    def worker(transport: Transport) -> Any:
        setup = Setup(case, transport)
        setup.train(0, 2)
        method = bound_method(case)
        compressed = dense = elements = dense_elements = server = 0
        saved = setup.compression.state_dict()["parameters"]
        for name, p in setup.compression.named:
            slots = {k: v.numel() for k, v in saved[name].items() if isinstance(v, torch.Tensor) and k not in ("skips", "movement", "q")}
            if method.is_dense(p):
                dense, dense_elements = dense + sum(slots.values()), dense_elements + p.numel()
            else:
                compressed, elements = compressed + p.numel(), elements + sum(v for k, v in slots.items() if k != "server_residual")
                server += slots.get("server_residual", 0)
        return compressed, elements, server, dense, dense_elements

    results = run_simulated(n, worker)
    for compressed, elements, server, dense, dense_elements in results:
        assert elements == case.slots * compressed
        assert server <= case.server_slots * (compressed if case.central else compressed / n + 8 * 4)
        most = 2 if bound_method(case).feedback.exchanges(0) else case.slots  # with local steps, dense parameters move in between too
        assert dense <= min(case.slots, most) * dense_elements, "dense parameters keep no more than the others, and no x"
    assert sum(r[2] for r in results) == case.server_slots * results[0][0], "the servers' parts are the whole"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_of_16_bit_parameters_is_float32(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.5), [("p", p)], Compression(TopK(8), **ALL))
    for _ in range(3):
        optimizer.zero_grad()
        (p * torch.arange(64, dtype=dtype)).sum().backward()
        optimizer.step()
    residual = optimizer.compression.state_dict()["parameters"]["p"]["residual"]
    assert residual.dtype == torch.float32
    assert residual.any()
    assert p.dtype == p.grad.dtype == dtype  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["top_k", "double_squeeze", "power_sgd", "cser", "detached", "detached-local_steps"])
def test_going_back_to_the_very_beginning(name: str) -> None:
    """State saved before the first step holds nothing; loading it leaves nothing of the steps since. Control: it is not loaded."""

    def worker(transport: Transport) -> list[torch.Tensor]:
        setup = Setup(by_name(name), transport)
        start = setup.save()
        found = []
        setup.train(0, 4)
        found.append(weights(setup.model, setup.compression))
        setup.load(start)
        setup.train(0, 4)
        found.append(weights(setup.model, setup.compression))
        with setup.compression.at("averaged"):
            setup.load(start, "model optimizer schedule")
        setup.train(0, 4)
        return [*found, weights(setup.model, setup.compression)]

    for first, again, control in run_simulated(N, worker):
        assert torch.equal(first, again)
        assert not torch.equal(first, control)


def test_no_state_is_loaded_while_parameters_are_held_at_a_point() -> None:
    """On leaving, the shifted parameters would be taken for x. Afterwards (control) the state can be loaded, and x is as before."""
    setup = Setup(by_name("detached"), SelfTransport())
    setup.train(0, 3)
    before, state = weights(setup.model, setup.compression), setup.compression.state_dict()
    with setup.compression.at("averaged"), pytest.raises(CompressionError, match="leave `with compression"):
        setup.compression.load_state_dict(state)
    setup.compression.load_state_dict(state)
    assert torch.equal(weights(setup.model, setup.compression), before)


# -- state on trust ---------------------------------------------------------------------------------------------------------------


def changed(entry: str, slot: str, value: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        state["parameters"][entry][slot] = value if not callable(value) else value(state["parameters"][entry][slot])

    return change


def put(slot: str, value: Any) -> Callable[[Any], None]:
    return lambda state: state.update({slot: value})


def poisoned(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = float("nan")
    return t


BAD: dict[str, tuple[Callable[[Any], object], str]] = {
    "step a word": (put("step", "three"), r"'step' of the state: expected an integer ≥ 0, the state holds 'three'"),
    "step True": (put("step", True), r"'step' of the state"),
    "layout of no names": (put("layout", [["0.weight"], [1]]), r"'layout' of the state: expected lists of parameters' names, the state holds \[\["),
    "step negative": (put("step", -1), r"'step' of the state: expected an integer ≥ 0, the state holds -1"),
    "undone None": (put("undone", None), r"'undone' of the state: expected an integer ≥ 0, the state holds None"),
    "rank a float": (put("rank", 0.0), r"'rank' of the state"),
    "parameters a list": (put("parameters", []), r"'parameters' of the state: expected a dictionary"),
    "an entry None": (lambda s: s["parameters"].update({"2.bias": None}), r"parameter '2\.bias' of the state: expected a dictionary"),
    "a parameter lost": (lambda s: s["parameters"].pop("2.weight"), r"parameter '2\.weight' is missing: it had state when"),
    "a slot lost": (lambda s: s["parameters"]["2.weight"].pop("residual"), r"'residual' of parameter '2\.weight': expected \d+ elements.*None"),
    "an unknown slot": (changed("2.weight", "momentom", torch.zeros(3)), r"'momentom' of parameter '2\.weight' is no slot of this method"),
    "NaN": (changed("2.weight", "residual", poisoned), r"'residual' of parameter '2\.weight' holds an inf or NaN"),
    "NaN on a server": (changed("0.weight", "server_residual", poisoned), r"'server_residual' of parameter '0\.weight' holds an inf or NaN"),
    "another type": (changed("0.bias", "residual", torch.Tensor.double), r"'residual' of parameter '0\.bias'.*float32.*holds torch\.float64"),
    "sparse": (changed("0.bias", "residual", torch.Tensor.to_sparse), r"'residual' of parameter '0\.bias'.*layout torch\.sparse_coo"),
    "without values": (changed("0.bias", "residual", lambda t: t.to("meta")), r"'residual' of parameter '0\.bias'.* on meta"),
    "a list": (changed("0.bias", "residual", torch.Tensor.tolist), r"'residual' of parameter '0\.bias': expected 64 elements"),
    "lr a word": (changed("0.bias", "previous_lr", "0.1"), r"'previous_lr' of parameter '0\.bias': expected a positive number or None.*'0\.1'"),
    "lr NaN": (changed("0.bias", "previous_lr", float("nan")), r"'previous_lr' of parameter '0\.bias'.*holds nan"),
    "lr negative": (changed("0.bias", "previous_lr", -0.1), r"'previous_lr' of parameter '0\.bias'.*holds -0\.1"),
    "lr infinite": (changed("0.bias", "previous_lr", float("inf")), r"'previous_lr' of parameter '0\.bias'.*holds inf"),
}


@pytest.fixture(scope="module")
def saved_state() -> Any:
    setup = Setup(by_name("double_squeeze-everything"), SelfTransport())
    setup.train(0, 2)
    return setup.save()["compression"]


@pytest.mark.parametrize("bound_only", [False, True], ids=["optimizer", "bound"])
@pytest.mark.parametrize("what", BAD)
def test_a_state_is_not_taken_on_trust(what: str, bound_only: bool, saved_state: Any) -> None:
    """Each is an error that names parameter and slot, before an optimizer is there, too; nothing is changed. As it was saved it loads (control)."""
    change, message = BAD[what]
    state = copy.deepcopy(saved_state)
    change(state)
    case = by_name("double_squeeze-everything")
    compression = case.make().bind(mlp()) if bound_only else Setup(case, SelfTransport()).compression
    before = compression.state_dict()
    with pytest.raises(CompressionError, match=message):
        compression.load_state_dict(state)
    assert equal(compression.state_dict(), before)
    compression.load_state_dict(saved_state)
    assert equal(compression.state_dict(), saved_state)


def test_a_parameter_that_was_not_there_yet_starts_without_state(saved_state: Any) -> None:
    """Control: bound since, it is missing from the state and was never in it. A state of before this was noted is taken as it is."""
    case = by_name("double_squeeze-everything")
    part = case.make().bind([(n, p) for n, p in mlp().named_parameters() if n.startswith("0.")])
    older = {**copy.deepcopy(saved_state), "with_state": ["0.weight", "0.bias"]}
    older["parameters"] = {name: older["parameters"][name] for name in older["with_state"]}
    without_note = {k: v for k, v in older.items() if k != "with_state"}
    for state in (older, without_note):
        part.load_state_dict(state)
        setup = Setup(case, SelfTransport())
        setup.compression.load_state_dict(state)
        assert setup.compression.state_dict()["step"] == 2


def test_a_name_that_is_no_text_is_refused_when_bound() -> None:
    model = torch.nn.Module()
    model.register_parameter("\ud800", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CompressionError, match=r"the parameter name '\\ud800' holds half of a surrogate pair"):
        Compression.top_k().bind(model)
