"""Parameters that are frozen while training goes on: they and what is kept for them wait, in units of the learning rate of the day."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import mlp, same_bits, train
from tests.unit.test_state import Setup, equal

N, NAME = 3, "0.weight"  # above `dense_below`


def kept(setup: Setup) -> dict[str, torch.Tensor]:
    """What is kept for the parameter, in update units; and where it is."""
    entry = setup.compression.state_dict()["parameters"][NAME]
    unit = (entry["previous_lr"] or 1.0) if bound_method(setup.case).feedback.unit == "gradient" else 1.0
    found = {slot: t * unit if slot.endswith("residual") else t for slot, t in entry.items() if isinstance(t, torch.Tensor)}
    with setup.compression.at("averaged"):
        found["parameter"] = setup.model.get_parameter(NAME).detach().clone()
    return {slot: t.double() for slot, t in found.items() if slot in ("residual", "server_residual", "momentum", "parameter")}


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_what_is_kept_for_a_frozen_parameter_waits(case: Case) -> None:
    """While η changes, and after a step that is undone. The control: it is another when the parameter is not frozen."""

    def worker(transport: Transport) -> Any:
        found = []
        for freezes in (True, False):
            setup = Setup(case, transport)
            setup.train(0, 2)
            before = kept(setup)
            setup.model.get_parameter(NAME).requires_grad_(not freezes)
            setup.train(2, 5)
            spoil = setup.model[2].bias.register_hook(lambda g: g * float("nan")) if transport.rank == 1 else None
            setup.train(5, 6)
            if spoil is not None:
                spoil.remove()
            setup.train(6, 8)
            found.append((before, kept(setup)))
            setup.model.get_parameter(NAME).requires_grad_(True)
            setup.train(8, 16)
            with setup.compression.at("averaged"):
                found[-1] = (*found[-1], setup.model.get_parameter(NAME).detach().clone(), setup.compression.undone_steps)
        return found

    results = run_simulated(N, worker)
    assert max(undone for (_, _, _, undone), _ in results) == 1
    for (before, waited, later, _), (_, moved, *_) in results:
        assert not torch.equal(later.double(), before["parameter"]), "it goes on afterwards"
        assert torch.equal(waited["parameter"], before["parameter"])
        for slot, t in before.items():
            assert (waited[slot] - t).abs().max() <= 1e-6 * t.abs().max() if t.numel() else True, slot
        assert not torch.equal(moved["parameter"], before["parameter"])
    assert same_bits(later for (_, _, later, _), _ in results)


@pytest.mark.parametrize("name", ["detached", "detached-local_steps", "detached-top_k", "cser", "local_momentum", "top_k", "double_squeeze"])
def test_a_run_resumed_while_a_parameter_is_frozen_is_the_run(name: str) -> None:
    """Frozen before the state is loaded, as it stands at x then."""

    def worker(transport: Transport) -> Any:
        through, first, second = (Setup(by_name(name), transport) for _ in range(3))
        for setup, last in ((through, 8), (first, 6)):
            setup.train(0, 4)
            setup.model.get_parameter(NAME).requires_grad_(False)
            setup.train(4, last)
        second.model.get_parameter(NAME).requires_grad_(True)
        second.model.get_parameter(NAME).requires_grad_(False)
        second.load(first.save())
        second.train(6, 8)
        for setup in (through, second):
            setup.model.get_parameter(NAME).requires_grad_(True)
            setup.train(8, 11)
        return through.save(), second.save()

    for through, resumed in run_simulated(N, worker):
        assert equal(through["model"], resumed["model"]) and equal(through["compression"], resumed["compression"])


@pytest.mark.parametrize("make", [lambda: Compression.detached(8), lambda: Compression.detached(8, 1.0, **ALL), lambda: Compression.cser(**ALL)])
def test_one_that_was_frozen_when_bound_is_bound_again_and_goes_on_from_where_it_is(make: Any) -> None:
    """With the old state loaded, which knows nothing of it, and nothing lost of what it knows of the others."""
    model = mlp()
    model[0].weight.requires_grad_(False)

    def wrap() -> Any:
        return DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model.named_parameters(), make())

    optimizer = wrap()
    train(model, optimizer, 0, range(3))
    state = optimizer.compression.state_dict()
    with optimizer.compression.at("averaged"):
        before = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    model[0].weight.requires_grad_(True)
    optimizer = wrap()
    optimizer.compression.load_state_dict(state)
    with optimizer.compression.at("averaged"):
        assert equal(dict(model.state_dict()), dict(before))
    train(model, optimizer, 0, range(3, 5))
    assert 0 < (model[0].weight - before["0.weight"]).norm() < before["0.weight"].norm(), "it trains, from there"
