"""A model that is saved where DEF holds it at a shifted point is saved with a warning, and only then."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL


def trained(compression: Compression) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=compression.bind(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 40)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_saving_outside_at_warns_and_inside_does_not() -> None:
    model, optimizer = trained(Compression.detached(8))
    with pytest.warns(UserWarning, match="at\\('averaged'\\)"):
        shifted = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.compression.at("averaged"):
            averaged = model.state_dict()
            assert not torch.equal(averaged["weight"], shifted["weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(Compression.local_momentum(8))[0].state_dict()  # the control: nothing is shifted


def test_the_module_can_still_be_copied_and_pickled() -> None:
    model, _ = trained(Compression.detached(8))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.load(file, weights_only=False).state_dict()
        copy.deepcopy(model).state_dict()


@pytest.mark.parametrize("right", [True, False])
def test_an_average_of_weights_is_equal_on_all_ranks_when_it_is_made_at_averaged(right: bool) -> None:
    """`AveragedModel` made and updated inside the block; the control averages other weights on each rank."""

    def worker(transport: Transport) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 40)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.detached(8, **ALL), transport=transport)
        mean: torch.optim.swa_utils.AveragedModel | None = None
        for t in range(4):
            optimizer.zero_grad()
            x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * t + transport.rank))
            model(x).square().mean().backward()
            optimizer.step()
            with optimizer.compression.at("averaged" if right else "local"):
                mean = torch.optim.swa_utils.AveragedModel(model) if mean is None else mean
                mean.update_parameters(model)
        assert mean is not None
        return torch.cat([p.detach().reshape(-1) for p in mean.module.parameters()])

    first, second = run_simulated(2, worker)
    assert torch.equal(first, second) is right
