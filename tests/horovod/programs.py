"""What the programs under Horovod share: training on the stock optimizer, and verdicts that all ranks reach together."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch

from tests.problems import batch, flat

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
    """Run all; the verdicts are exchanged, so that every rank ends with the same status. Prints `passed NAME`, or each rank's error."""
    failed = False
    for name, check in checks.items():
        problem = ""
        try:
            check()
        except BaseException:
            problem = traceback.format_exc()
        verdicts = hvd.allgather_object(problem, name=f"verdict.{name}")
        if hvd.rank() == 0:
            print(f"passed {name}" if not any(verdicts) else f"FAILED {name}", flush=True)
            for rank, text in enumerate(verdicts):
                if text:
                    print(f"--- {name}, rank {rank}:\n{text}", flush=True)
        failed = failed or any(verdicts)
    hvd.shutdown()
    sys.exit(1 if failed else 0)
