"""What tests of methods with two-pass error feedback and worker momentum share: a trajectory, and the auxiliary iterate's violation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvd_ecsgd import DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, flat, mlp

__all__ = ["ALL", "CONSTANT", "LRS", "N", "Records", "mean", "residuals", "trajectory", "vary", "violation"]

N = 3
ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
LRS = (0.1, 0.1, 0.02, 0.3, 0.001, 0.05, 0.05, 0.2)
CONSTANT = (0.1,) * 8

Records = list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]]
"""[t][rank]: x and gradient before step t; residual and server residual (zero outside this rank's pieces) after it."""


def residuals(compression: Any, slot: str) -> torch.Tensor:
    """A slot of all parameters in one vector; a server's pieces in their places."""
    saved, transport = compression.state_dict(), compression.aggregator.state.transport
    parts = []
    for name, p in compression.named:
        value = saved["parameters"][name].get(slot, torch.zeros(0, dtype=p.dtype))
        start = min(-(-p.numel() // (8 * transport.size)) * 8 * transport.rank, p.numel()) if slot == "server_residual" else 0
        parts.append(torch.zeros(p.numel(), dtype=p.dtype))
        parts[-1][start : start + value.numel()] = value.reshape(-1)
    return torch.cat(parts)


def trajectory(make: Callable[[], Any], lrs: Sequence[float], change: Any = None, **sgd: Any) -> Records:
    """`change(group, t)` may change hyper-parameters before step t."""

    def worker(transport: Transport) -> list[Any]:
        model = mlp(torch.float64)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=lrs[0], **sgd), model.named_parameters(), make(), transport=transport, bucket_bytes=4000
        )
        records = []
        for t, lr in enumerate(lrs):
            group = optimizer.param_groups[0]
            group["lr"] = lr
            if change:
                change(group, t)
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, torch.float64)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            before, gradient = flat(model.parameters()), flat(p.grad for p in model.parameters())
            optimizer.step()
            records.append((before, gradient, residuals(optimizer.compression, "residual"), residuals(optimizer.compression, "server_residual")))
        records.append((flat(model.parameters()), gradient, gradient, gradient))
        return records

    return [list(step) for step in zip(*run_simulated(N, worker), strict=True)]


def mean(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).mean(0)


def vary(group: dict[str, Any], t: int) -> None:
    group["momentum"] = (0.9, 0.5, 0.95)[t % 3]
    group["weight_decay"] = (1e-3, 0.0, 1e-2)[t % 3]


def violation(
    records: Records, lrs: Sequence[float], nesterov: bool = False, mu: Any = 0.9, wd: Any = 0.0, unit: Sequence[float] | None = None
) -> float:
    """Of y⁺ = y − η·(direction of momentum SGD on mean_i g_i + wd·x) with y_t = x_t − η_{t−1}(E + mean e); `unit` instead of these η_{t−1}."""
    y, m, worst = records[0][0][0], torch.zeros_like(records[0][0][0]), 0.0
    for t, lr in enumerate(lrs):
        mu_t, wd_t = (mu[t % 3], wd[t % 3]) if isinstance(mu, tuple) else (mu, wd)
        g = mean(r[1] for r in records[t]) + wd_t * records[t][0][0]
        m = mu_t * m + g
        expected = y - lr * (g + mu_t * m if nesterov else m)
        y = records[t + 1][0][0] - (unit or lrs)[t] * (mean(r[2] for r in records[t]) + sum(r[3] for r in records[t]))
        worst = max(worst, (y - expected).abs().max().item())
    return worst
