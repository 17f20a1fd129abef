"""A model that is saved, copied or averaged where DEF holds it at a shifted point is so with a warning, and only then."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

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


def test_a_module_that_is_copied_or_pickled_leaves_the_warning_behind() -> None:
    model, optimizer = trained(Compression.detached(8))
    file = io.BytesIO()
    with pytest.warns(UserWarning, match="copy and evaluate inside"):
        torch.save(model, file)
    with pytest.warns(UserWarning, match="copy and evaluate inside"):
        copied = copy.deepcopy(model)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.load(file, weights_only=False).state_dict()
        copied.state_dict()
        with optimizer.compression.at("averaged"):
            copy.deepcopy(model)
        copy.deepcopy(trained(Compression.top_k(8))[0])


@pytest.mark.parametrize("right", [True, False])
def test_an_average_of_weights_is_equal_on_all_ranks_when_it_is_made_at_averaged(right: bool) -> None:
    """`AveragedModel` made and updated inside the block; the control averages other weights on each rank, and is told so, once."""

    def worker(transport: Transport) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 40)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, compression=Compression.detached(8, **ALL).bind(model), transport=transport)
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

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = run_simulated(2, worker)
    assert torch.equal(first, second) is right
    assert ["averages other weights on each rank" in str(w.message) for w in caught] == [True] * (0 if right else 2)


@pytest.mark.parametrize("method", ["detached", "cser", "local_momentum", "top_k"])
@pytest.mark.parametrize("use", ["outside", "before training", "at averaged", "made outside", "loaded"])
def test_an_averaged_model_is_told_of_where_it_is_updated_at_a_shifted_point(method: str, use: str) -> None:
    """Of one that is made before the optimizer, too, whether training goes on by a step or by `at`; not of a state that is loaded, nor of what was
    taken before the first step, nor of a copy that nobody updates."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    bound = (Compression.cser() if method == "cser" else getattr(Compression, method)(8)).bind(model)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=bound)
    saved = copy.deepcopy(averaged)
    saved.n_averaged.fill_(7)
    if use == "before training":
        averaged.update_parameters(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 40)).square().sum().backward()
            optimizer.step()
            if use == "made outside" and t == 1:
                averaged = torch.optim.swa_utils.AveragedModel(model)
            if use == "outside":
                averaged.update_parameters(model)
            elif use == "loaded":
                averaged.load_state_dict(saved.state_dict())
            elif use in ("at averaged", "made outside"):
                with bound.at("averaged"):
                    averaged.update_parameters(model)
    told = [str(w.message) for w in caught if "averages other weights" in str(w.message)]
    assert len(told) == (use == "outside" and method in ("detached", "cser")) and len(caught) == len(told)


@pytest.mark.parametrize("of", ["the model", "its parameters", "a part", "what holds it", "another model"])
def test_averaged_models_are_watched_whatever_was_bound_and_copied(of: str) -> None:
    """The usual way binds parameters, and leads to no module; the average may be of a part, or of a wrapper around it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Linear(40, 40))
    sgd, compression = torch.optim.SGD(model.parameters(), lr=0.1), Compression.detached(8, **ALL)
    bound = compression.bind(model) if of == "the model" else compression
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), bound)
    copied = {"a part": model[1], "what holds it": torch.nn.ModuleList([model]), "another model": torch.nn.Linear(2, 2)}.get(of, model)
    averaged = torch.optim.swa_utils.AveragedModel(copied, device=torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 20)).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(copied)
    assert len(["averages other weights" in str(w.message) for w in caught]) == (of != "another model"), "once; of another model (control) never"


def test_an_averaged_model_that_is_dropped_is_let_go() -> None:
    model, optimizer = trained(Compression.detached(8))
    with optimizer.compression.at("averaged"):
        averaged = weakref.ref(torch.optim.swa_utils.AveragedModel(model))
    gc.collect()
    assert averaged() is None
    with optimizer.compression.at("averaged"):
        assert not optimizer.compression.averages._watched
