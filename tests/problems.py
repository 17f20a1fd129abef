"""A small problem to train on: data that differ between workers and steps, and helpers to run any method on it, simulated or on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvd_ecsgd import DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated

__all__ = ["batch", "flat", "held", "mlp", "same_bits", "simulate", "slot", "train", "weights"]

INPUTS, HIDDEN, CLASSES, SAMPLES = 20, 64, 5, 16


def mlp(dtype: torch.dtype = torch.float32, hidden: int = HIDDEN) -> torch.nn.Sequential:
    """20-64-5 with fixed weights: one parameter above the default `dense_below`, three that are dense by default."""
    generator = torch.Generator().manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, CLASSES)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Worker `rank`'s batch in this step: four of its own take turns. The labels can be learned: they are a linear function's argmax."""
    generator = torch.Generator().manual_seed(1000 * rank + step % 4)
    x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    teacher = torch.randn(INPUTS, CLASSES, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x.to(dtype), (x @ teacher).argmax(1)


def train(model: torch.nn.Module, optimizer: Any, rank: int, steps: Iterable[int], before_step: Callable[[int], object] = lambda step: None) -> float:
    """Ordinary training; the last step's loss."""
    dtype, loss = next(model.parameters()).dtype, torch.zeros(())
    for step in steps:
        before_step(step)
        optimizer.zero_grad()
        x, y = batch(rank, step, dtype)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def weights(model: torch.nn.Module, compression: Any = None) -> torch.Tensor:
    """A copy of all parameters in one vector; with a bound `compression`, at x (equal on all ranks)."""
    if compression is None:
        return flat(model.parameters())
    with compression.at("averaged"):
        return flat(model.parameters())


def slot(compression: Any, name: str) -> torch.Tensor:
    """One slot of the state of all parameters in one vector; zeros where a parameter has none."""
    saved = compression.state_dict()["parameters"]
    return flat(saved[n][name] if name in saved.get(n, {}) else torch.zeros_like(p) for n, p in compression.named)


def held(compression: Any) -> list[torch.Tensor]:
    """Copies of all that a method keeps on this rank (residuals, momentum, servers' residuals, …), also in the middle of a step."""
    states = [state for bucket in compression.aggregator.state.buckets for state in (bucket.state, bucket.exchange_state)]
    return [t.clone() for state in states for t in (state or {}).values() if t is not None]


def simulate(
    n: int,
    make: Callable[[], Any],
    steps: Iterable[int] = range(12),
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    dtype: torch.dtype = torch.float32,
    after: Callable[[torch.nn.Module, Any, Transport], Any] = lambda model, optimizer, transport: weights(model, optimizer.compression),
    **options: Any,
) -> list[Any]:
    """Train on n simulated workers; what `after(model, optimizer, transport)` returns, by rank (default: the weights)."""
    steps = list(steps)

    def worker(transport: Transport) -> Any:
        model = mlp(dtype)
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), make(), transport=transport, **options)
        train(model, optimizer, transport.rank, steps)
        return after(model, optimizer, transport)

    return run_simulated(n, worker)


def same_bits(tensors: Iterable[torch.Tensor]) -> bool:
    first, *others = tensors
    return all(torch.equal(first, t) for t in others)


def told(kind: type[Exception], run: Callable[[], object], *fragments: str) -> None:
    """`run` raises `kind`, and the message holds the fragments."""
    try:
        run()
    except kind as error:
        missing = [f for f in fragments if f not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")
