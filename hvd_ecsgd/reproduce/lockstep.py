"""Gradient descent on convex functions by several workers in lock-step: feedback rules and compressors as they are, without network and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..compressors import Rounding
from ..protocols import Compressor, Feedback, GroupSettings, Part, StepContext, zeros
from ..segments import Key, Segments

__all__ = ["Convex", "Logistic", "Quadratics", "descend"]

D, LOW, HIGH = 40, 1.0, 100.0


class Convex:
    """n workers' functions, their mean's minimum `best`, where to start, and a step size."""

    n: int
    start: torch.Tensor
    best: torch.Tensor
    eta: float
    x: torch.Tensor
    """Where the descent is now."""

    def gradient(self, i: int, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Quadratics(Convex):
    """f_i(x) = ½(x − b_i)ᵀH_i(x − b_i), d = 40; the global Hessian's eigenvalues are geometric from 1 to 100, or nearly so."""

    def __init__(self, n: int, *, same: bool = True, rotated: bool = True, off_diagonal: float = 0.0, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.n = n

        def matrix() -> torch.Tensor:
            eigenvalues = torch.logspace(math.log10(LOW), math.log10(HIGH), D, dtype=torch.float64)
            q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0] if rotated else torch.eye(D, dtype=torch.float64)
            noise = torch.randn(D, D, generator=g, dtype=torch.float64)
            return q @ torch.diag(eigenvalues) @ q.T + off_diagonal * (noise + noise.T)

        first = matrix()
        self.h = [first if same or i == 0 else matrix() for i in range(n)]
        self.b = [torch.randn(D, generator=g, dtype=torch.float64) * 5 for _ in range(n)]
        self.mean_h = torch.stack(self.h).mean(0)
        self.best = torch.linalg.solve(self.mean_h, torch.stack([h @ b for h, b in zip(self.h, self.b, strict=True)]).mean(0))
        self.start = torch.randn(D, generator=g, dtype=torch.float64) * 5
        values = torch.linalg.eigvalsh(self.mean_h)
        self.eta = 2 / float(values[0] + values[-1])

    def gradient(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return self.h[i] @ (x - self.b[i])


class Logistic(Convex):
    """Regularised logistic regression of 40 sparse features whose frequencies fall from every sample to one in a hundred, and whose sizes with them:
    the Hessian is badly scaled and nearly diagonal. 400 samples a worker; the loss is in units of 1000, so that rounding to integers matters."""

    def __init__(self, n: int, *, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.n = n
        frequency = torch.logspace(0, -2, D, dtype=torch.float64)
        true = torch.randn(D, generator=g, dtype=torch.float64) * 2
        self.data = []
        for _ in range(n):
            present = torch.rand(400, D, generator=g, dtype=torch.float64) < frequency
            a = torch.randn(400, D, generator=g, dtype=torch.float64) * present
            labels = torch.rand(400, generator=g, dtype=torch.float64) < torch.sigmoid(a @ true)
            self.data.append(a * (2 * labels.double() - 1).unsqueeze(1))
        self.start = torch.zeros(D, dtype=torch.float64)
        x = self.start.clone()
        for _ in range(50):  # Newton
            h = torch.stack([self.hessian(i, x) for i in range(n)]).mean(0)
            x = x - torch.linalg.solve(h, torch.stack([self.gradient(i, x) for i in range(n)]).mean(0))
        self.best = x
        values = torch.linalg.eigvalsh(torch.stack([self.hessian(i, x) for i in range(n)]).mean(0))
        self.eta = 2 / float(values[0] + values[-1])

    def gradient(self, i: int, x: torch.Tensor) -> torch.Tensor:
        a = self.data[i]
        return 1000 * (-a.T @ torch.sigmoid(-a @ x) / len(a) + 1e-3 * x)

    def hessian(self, i: int, x: torch.Tensor) -> torch.Tensor:
        a = self.data[i]
        p = torch.sigmoid(a @ x)
        return 1000 * ((a.T * (p * (1 - p))) @ a / len(a) + 1e-3 * torch.eye(D, dtype=x.dtype))


def descend(
    problem: Convex,
    rule: Callable[[int], Feedback],
    steps: int,
    compressor: Compressor | None = None,
    rate: Callable[[int], float] | None = None,
    watch: Callable[[int, float, torch.Tensor, list[torch.Tensor]], object] | None = None,
) -> tuple[float, float]:
    """|x − x*| and |z − x*| after so many steps: the workers' rules and a compressor in lock-step, without a network or an optimizer.

    `watch(t, η, x, residuals)` is called after every step.
    """
    n = problem.n
    compressor = Rounding(bits=32) if compressor is None else compressor
    problem.x = x = problem.start.clone()
    segments = Segments.of([("x", x)])
    rules = [rule(i) for i in range(n)]
    parts = [Part(zeros(r.slots(segments), segments), [x], segments) for r in rules]
    eta = before = problem.eta
    for t in range(steps):
        eta = problem.eta if rate is None else rate(t)
        out = torch.zeros_like(x)
        for i in range(n):
            ctx = StepContext(0, t, i, n, GroupSettings(eta), eta, before if t else eta)
            buffer = rules[i].accumulate_(parts[i], [problem.gradient(i, x)], ctx).buffer
            payload = compressor.extract_(buffer, segments, Key(0, t, i))
            compressor.add_(out, payload, segments, Key(0, t, i), 1 / n)
        running = [rule.between_steps([part], Key(0, t, i, "prepare", n)) for i, (rule, part) in enumerate(zip(rules, parts, strict=True))]
        for lists in zip(*running, strict=True):
            for tensors in zip(*lists, strict=True):
                mean = torch.stack(tensors).mean(0)
                for tensor in tensors:
                    tensor.copy_(mean)
        x -= eta * out
        before = eta
        if watch is not None:
            watch(t, eta, x, [part.state["residual"] for part in parts])
    e = torch.stack([part.state.get("residual", torch.zeros_like(x)) for part in parts]).mean(0)
    return (x - problem.best).norm().item(), (x - eta * e - problem.best).norm().item()
