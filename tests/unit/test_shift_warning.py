"""A model that is saved where DEF holds it at a shifted point is saved with a warning, and only then."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer


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
