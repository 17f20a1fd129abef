"""TopK-SGD (Alistarh et al. 2018; Stich et al. 2018): one entry in a hundred, on real text, and the auxiliary sequence that explains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compression import AnyCompression, Compression
from ..transport import Transport
from .problems import Text
from .report import Claim, Report, Spread, Table, seeds
from .simulation import Size, run_all, train

__all__ = ["claims", "run"]

RATIO = 100.0
METHODS: dict[str, Callable[[], AnyCompression]] = {
    "dense": lambda: Compression.none,
    "TopK-SGD": lambda: Compression.topk_sgd(RATIO, dense_below=0, dense_1d=False),
    "TopK-SGD, blocks of 512": lambda: Compression.topk_sgd(RATIO, block=512, dense_below=0, dense_1d=False),
    "top-k, no feedback": lambda: Compression.top_k(RATIO, error_feedback=False, dense_below=0, dense_1d=False),
}
LR = 0.3


class Auxiliary:
    """Follows z = x − mean e of one worker: how far z is from moving as SGD does, and x from z."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.z: torch.Tensor | None = None
        self.start: torch.Tensor | None = None
        self.gradient = torch.zeros(0)
        self.violation = 0.0
        self.distances: list[tuple[int, float]] = []

    def _mean(self, parts: Any, transport: Transport, name: str) -> torch.Tensor:
        flat = torch.cat([p.detach().double().flatten() for p in parts])
        return transport.allreduce_(flat, name).wait() / transport.size

    def before_step(self, step: int, model: torch.nn.Module, optimizer: Any, transport: Transport) -> None:
        self.gradient = self._mean((p.grad for p in model.parameters()), transport, "auxiliary.gradient")
        if self.z is None:
            self.z = torch.cat([p.detach().double().flatten() for p in model.parameters()])
            self.start = self.z

    def after_step(self, step: int, model: torch.nn.Module, optimizer: Any, transport: Transport) -> None:
        saved = optimizer.compression.state_dict()["parameters"]
        e = self._mean((saved[n]["residual"] for n, _ in model.named_parameters()), transport, "auxiliary.error")
        x = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        assert self.z is not None and self.start is not None
        moved, self.z = self.z - self.lr * self.gradient, x - e
        self.violation = max(self.violation, float((self.z - moved).norm() / (self.lr * self.gradient).norm()))
        self.distances.append((step + 1, float(e.norm() / (self.z - self.start).norm())))


def one(method: str, seed: int, steps: int, width: int) -> dict[str, Any]:
    watched: dict[int, Auxiliary] = {}
    at_z: list[float] = []
    problem = Text(width)

    def follower(transport: Transport) -> Auxiliary:
        return watched.setdefault(transport.rank, Auxiliary(LR))

    def before(step: int, model: torch.nn.Module, optimizer: Any, transport: Transport) -> None:
        if step < 100:  # each step is an exact check of its own; a hundred are enough
            follower(transport).before_step(step, model, optimizer, transport)

    def after(step: int, model: torch.nn.Module, optimizer: Any, transport: Transport) -> None:
        if step < 100:
            follower(transport).after_step(step, model, optimizer, transport)
        if step == steps - 1:
            with optimizer.compression.at("virtual"), torch.no_grad():
                if transport.rank == 0:
                    at_z.append(problem.evaluate(model)["bits"])

    follow = {"before_step": before, "after_step": after} if method.startswith("TopK") else {}
    trained = train(problem, METHODS[method], steps=steps, lr=LR, seed=seed, **follow)  # type: ignore[arg-type]
    result: dict[str, Any] = {"bits": trained.figures["bits"], "curve": [(s, f["bits"]) for s, f in trained.curve], "megabytes": trained.sent / 1e6}
    if follow:
        result |= {"bits at z": at_z[0], "violation": watched[0].violation, "distances": watched[0].distances}
    return result


def claims(figures: dict[str, dict[str, Spread]]) -> list[Claim]:
    """Of method → figure → over seeds."""
    bits = {m: f["bits"].mean for m, f in figures.items()}
    lost = bits["top-k, no feedback"] - bits["dense"]
    result = []
    for method in ("TopK-SGD", "TopK-SGD, blocks of 512"):
        result.append(
            Claim(
                f"{method} converges nearly as uncompressed SGD does",
                f"{bits[method]:.3f} bits per character, dense {bits['dense']:.3f}, without feedback {bits['top-k, no feedback']:.3f} "
                "(agreement: at least three quarters of what is lost without feedback are won back)",
                lost > 0 and bits[method] - bits["dense"] < 0.25 * lost,
            )
        )
    worst = max(f["violation"].mean for m, f in figures.items() if m.startswith("TopK"))
    result.append(
        Claim(
            "the auxiliary sequence x − mean e moves as SGD with the workers' gradients",
            f"largest deviation from it {worst:.1e} of a step's length, in float32 (agreement: below 1e-3)",
            worst < 1e-3,
        )
    )
    nearby = max(abs(f["bits at z"].mean - f["bits"].mean) for m, f in figures.items() if m.startswith("TopK"))
    result.append(
        Claim(
            "the model stays near the auxiliary sequence",
            f"the two differ by {nearby:.3f} bits per character at the end (agreement: less than a tenth of what is lost without feedback)",
            nearby < 0.1 * lost,
        )
    )
    return result


def run(size: Size) -> Report:
    """Train a character model with TopK-SGD, and measure how far its z is from SGD."""
    steps, width = size.pick(6, 800, 3000), size.pick(32, 128, 256)
    keys = [(m, seed) for m in METHODS for seed in range(size.seeds)]
    trained = dict(zip(keys, run_all(one, [(*key, steps, width) for key in keys], size, "topk"), strict=True))
    names = ("bits", "megabytes", "bits at z", "violation")
    figures = {m: {f: Spread(tuple(trained[m, s][f] for s in range(size.seeds))) for f in names if f in trained[m, 0]} for m in METHODS}
    columns = ("method", "bits per character", "at z = x − mean e", "deviation of z from SGD", "MB sent per worker")
    table = Table(seeds(size.seeds), columns)
    for method, f in figures.items():
        at_z = (f"{f['bits at z']:.3f}", f"{f['violation'].mean:.1e}") if "violation" in f else ("–", "–")
        table.rows.append((method, f"{f['bits']:.3f}", *at_z, f"{f['megabytes'].mean:.2f}"))

    def draw(pyplot: Any) -> Any:
        figure, (by_step, distance) = pyplot.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
        for method in METHODS:
            curves = [trained[method, seed]["curve"] for seed in range(size.seeds)]
            mean = [sum(c[i][1] for c in curves) / len(curves) for i in range(len(curves[0]))]
            (line,) = by_step.plot([step for step, _ in curves[0]], mean, label=method, linestyle="--" if method == "dense" else "-")
            if "distances" in trained[method, 0]:
                xs, ys = zip(*trained[method, 0]["distances"], strict=True)
                distance.plot(xs, ys, label=method, color=line.get_color())
        by_step.set(xlabel="step", ylabel="bits per character, other modules (mean of seeds)")
        distance.set(xlabel="step", ylabel="‖x − z‖ ÷ distance travelled by z (seed 0)", ylim=(0, None))
        for axis in (by_step, distance):
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"TopK-SGD, 1 entry in {RATIO:g}: the next character of standard-library sources, 8 workers")
        return figure

    setting = (
        f"the next character of Python's standard library (real text; each worker has modules of its own), embedding and network 128-{width}-97, "
        f"8 workers × 32, SGD without momentum at {LR}, {steps} steps, everything compressed"
    )
    return Report("TopK-SGD (Alistarh et al. 2018)", setting, [table], claims(figures), {"figures": figures}, draw)
