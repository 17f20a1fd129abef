"""The teacher–student problem of docs/algorithms.md §3, smaller on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvd_ecsgd import DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated

__all__ = ["accuracy"]


def data(seed: int, train: int, test: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal inputs; the label is the argmax of a 40-48-10 teacher."""
    g = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(40, 48, generator=g) * 1.5 / 40**0.5, torch.randn(48, 10, generator=g) * 3 / 48**0.5
    x = torch.randn(train + test, 40, generator=g)
    y = (torch.relu(x @ w1) @ w2).argmax(1)
    return x[:train], y[:train], x[train:], y[train:]


def student(seed: int) -> torch.nn.Sequential:
    """40-128-128-10 with torch's default initialisation, drawn from a generator of its own."""
    g = torch.Generator().manual_seed(1000 + seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                for p in (layer.weight, layer.bias):
                    p.copy_((torch.rand(p.shape, generator=g) * 2 - 1) / layer.in_features**0.5)
    return model


def accuracy(make: Callable[[], Any], lr: float, seed: int, *, workers: int = 8, batch: int = 16, steps: int = 2048, samples: int = 16384) -> float:
    """Of the averaged model on 6 000 test samples; μ .9, weight decay 5e-4, learning rate × .1 at half and three quarters."""
    x, y, x_test, y_test = data(seed, samples, 6000)

    def worker(transport: Transport) -> float:
        model = student(seed)
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], 0.1)
        g = torch.Generator().manual_seed(77 * seed + transport.rank)
        for _ in range(steps):
            chosen = torch.randint(0, samples, (batch,), generator=g)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
        with optimizer.compression.at("averaged"), torch.no_grad():
            return (model(x_test).argmax(1) == y_test).float().mean().item()

    return run_simulated(workers, worker)[0]
