"""What the programs under Horovod share: training on the stock optimizer, and checks one after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch

from tests.problems import batch, flat
from tests.verdicts import end_all

__all__ = ["hvd", "prefixed", "run_checks", "same_on_all", "stock", "train_stock"]

warnings.filterwarnings("ignore", "the learning rate is taken to be constant")


def prefixed(model: torch.nn.Module, prefix: str) -> list[tuple[str, torch.nn.Parameter]]:
    """Names of their own for each check: Horovod's tensors are matched by name."""
    return [(f"{prefix}/{n}", p) for n, p in model.named_parameters()]


def stock(
    model: torch.nn.Module, compression: Any, prefix: str, lr: float = 0.1, momentum: float = 0.9, optimizer: Any = None, **options: Any
) -> Any:
    """An unmodified hvd.DistributedOptimizer."""
    inner = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return hvd.DistributedOptimizer(inner, named_parameters=prefixed(model, prefix), compression=compression, **options)


def train_stock(model: torch.nn.Module, optimizer: Any, steps: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(hvd.rank(), step, dtype)
        torch.nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return flat(model.parameters())


def same_on_all(w: torch.Tensor, name: str) -> bool:
    """All ranks hold these bits; collective."""
    every = hvd.allgather(w.contiguous().view(1, -1), name=f"check.{name}")
    return all(torch.equal(row, w.view(-1)) for row in every)


def run_checks(checks: dict[str, Callable[[], None]]) -> None:
    """Run all, and print `passed NAME` of each. One that fails ends the job at once."""
    for name, check in checks.items():
        try:
            check()
        except Exception:
            end_all(name)
        hvd.allgather_object(None, name=f"verdict.{name}")
        if hvd.rank() == 0:
            print(f"passed {name}", flush=True)
    hvd.shutdown()
