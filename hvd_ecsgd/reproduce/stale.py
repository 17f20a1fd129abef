"""Stale and compressed gradients (Khirirat et al. 2018): how large a step may be, and a server that uses silent workers' last gradients again."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch

from ..asynchronous import alpha_of, delay_limit, plan_of, suggested_step_size
from ..asynchronous.simulated import Event, SimulatedJob
from ..compression import Compression
from ..compressors import QSGD, Identity, RandomK
from ..protocols import UnbiasedCompressor
from ..segments import Key, Segments
from .report import Claim, Report, Spread, Table, seeds
from .simulation import Size, run_all

__all__ = ["claims", "mean_square_limit", "run"]

D = 64
TAUS = (0, 1, 3, 7, 15)
COMPRESSORS: dict[str, UnbiasedCompressor] = {
    "none": Identity(),
    "qsgd, 7 levels": QSGD(7, D),
    "ternary (qsgd, 1 level)": QSGD(1, D),
    "random-k, d/k = 16": RandomK(16, unbiased=True),
}
BEYOND = 4.0
"""Times the mean-square limit: the control."""
EXACT = ("none", "random-k, d/k = 16")
"""Compressors with E‖C(v)‖² = α‖v‖² for every v; of others α is a bound, and sparse vectors bear larger steps."""
WORKERS, SLOW = 5, 5.0


def mean_square_limit(alpha: float, tau: int) -> float:
    """The largest η, to a thousandth, with which E x² of x ← x − η·C(x of τ steps ago) stays bounded, E C(v)² = `alpha`·v²: L = 1.

    The mean must be stable, and the noise that a unit of noise leads to in later steps, (α−1)·η²·Σ h_k², less than one; h is the impulse response.
    """
    low, high = 0.0, delay_limit(tau, 1.0)
    if alpha == 1:
        return high
    while high - low > 1e-3 * high:
        eta = (low + high) / 2
        low, high = (eta, high) if (alpha - 1) * eta**2 * _energy(eta, tau) < 1 else (low, eta)
    return (low + high) / 2


def _energy(eta: float, tau: int) -> float:
    """Σ_k h_k² of x_{k+1} = x_k − η·x_{k−τ} after x = 1; inf where it has not died away after many steps."""
    past, energy = deque([0.0] * tau + [1.0], maxlen=tau + 1), 0.0
    for _ in range(int(200 * (tau + 1) / min(1.0, eta * (tau + 1))) + 1):
        energy += past[-1] ** 2
        past.append(past[-1] - eta * past[0])
        if max(map(abs, past)) < 1e-6:
            return energy
    return math.inf


def descend(compressor: str, tau: int, times: float, seed: int, steps: int) -> float:
    """log₁₀ of ‖x − x*‖ / ‖x_0 − x*‖ after so many steps of `times` the suggested size, every gradient being τ steps old; ∞ where it has overflown.

    f = Σ f_i of two workers whose Hessians differ, that all have their minimum at x*; the eigenvalues of f's go from .1 to 1.
    """
    own = COMPRESSORS[compressor]
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 0, D, dtype=torch.float64)
    share = torch.rand(D, generator=g, dtype=torch.float64)
    hessians = [scales * share, scales * (1 - share)]
    x = torch.randn(D, generator=g, dtype=torch.float64)
    segments, start = Segments.of([("x", x)]), float(x.norm())
    eta = times * suggested_step_size(alpha_of(own, D), tau, 1.0)
    past = deque([x.clone() for _ in range(tau + 1)], maxlen=tau + 1)
    for t in range(steps):
        out = torch.zeros_like(x)
        for i, h in enumerate(hessians):
            key = Key(seed, t, i)
            own.add_(out, own.extract_(h * past[0], segments, key), segments, key)
        x = x - eta * out
        past.append(x.clone())
        if not float(x.norm()) < 1e12 * start:
            return math.inf
    return math.log10(max(float(x.norm()) / start, 1e-300))


def aggregate(compressor: str, reuse: bool, seed: int, pushes: int) -> float:
    """‖x − x*‖ / ‖x_0 − x*‖ at the end of asynchronous training, one of five workers being slow: the mean of its last fifth of x.

    Workers' minima differ, so x ends where all count alike, or nearer to those who push more often.
    """
    g = torch.Generator().manual_seed(seed)
    minima = torch.randn(WORKERS, D, generator=g, dtype=torch.float64)
    minima[0] += 3.0

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Module()
        model.register_parameter("x", torch.nn.Parameter(torch.zeros(D, dtype=torch.float64)))
        return model, torch.optim.SGD(model.parameters(), lr=0.2 / WORKERS)

    method = Compression.unbiased(COMPRESSORS[compressor], dense_below=0, dense_1d=False).method
    job = SimulatedJob(plan_of(method, WORKERS, 40, Identity(), reuse=reuse), make)

    def backward(w: int, model: torch.nn.Module) -> None:
        (p,) = model.parameters()
        p.grad = p.detach() - minima[w]

    (server,), (master,) = job.servers, job.masters
    (x,) = master.parameters()
    now, times, mean, taken = 0.0, dict[Event, float](), torch.zeros(D, dtype=torch.float64), 0
    while server.version < pushes:
        for event in job.possible():
            if event not in times:
                lasts = math.exp(0.2 * float(torch.randn(1, generator=g))) * (SLOW if event.worker == 0 else 1.0)
                times[event] = now + (lasts if event.what == "compute" else 0.05)
        event = min(times, key=lambda e: (times[e], e.what, e.worker))
        now, before = times.pop(event), server.version
        job.happen(event, backward)
        if server.version > max(before, 0.8 * pushes):
            mean, taken = mean + x.detach(), taken + 1
    best = minima.mean(0)
    return float((mean / max(1, taken) - best).norm() / best.norm())


Figures = dict[str, dict[str, Any]]
"""`limits`: (compressor, τ as text) → share of the limit; `runs`: the same → step size → over seeds; `reuse`: row → over seeds."""


def _row(compressor: str, tau: int) -> str:
    return f"{compressor}, τ = {tau}"


def claims(figures: Figures) -> list[Claim]:
    """What is claimed of stale and compressed gradients, and whether these figures agree."""
    limits, runs, reuse = figures["limits"], figures["runs"], figures["reuse"]
    worst, best = max(limits.values()), min(limits.values())
    at_zero = [limits[_row(c, 0)] for c in COMPRESSORS]
    suggested = max(r["suggested"].mean for r in runs.values())
    beyond = min(r["beyond"].mean for row, r in runs.items() if row.split(", τ")[0] in EXACT)
    plain, again = reuse["none"], reuse["none, used again"]
    return [
        Claim(
            "(a rule of this library) η = 1/(L(α/2 + τ)) is at or below the mean-square limit",
            f"from {best:.2f} to {worst:.3f} of it (agreement: never above, to a hundredth)",
            worst <= 1.01,
        ),
        Claim(
            "without delay it is the limit itself, 2/(αL)",
            ", ".join(f"{share:.3f}" for share in at_zero) + " of it (agreement: to a hundredth)",
            all(abs(share - 1) <= 0.01 for share in at_zero),
        ),
        Claim(
            "with that step stale and compressed gradient descent converges linearly, where all workers share their minimum",
            f"distance at most 10^{suggested:.1f} of that at the start (agreement: a hundredth, with every compressor and delay)",
            suggested <= -2,
        ),
        Claim(
            f"(the control) with {BEYOND:g} times the limit it diverges",
            f"distance at least 10^{beyond:.1f} of that at the start (agreement: it has grown, with every delay, where α is exact: none, random-k)",
            beyond > 0,
        ),
        Claim(
            "a server that uses a silent worker's last gradient again ends where all workers count alike",
            f"distance {again:.4f}, without that {plain:.4f} (agreement: less than a tenth)",
            again.mean < plain.mean / 10,
        ),
    ]


def run(size: Size) -> Report:
    """The grid staleness × α against the step-size rule, and Q-IAG against plain asynchronous steps."""
    taus, steps, pushes = TAUS[:2] if size.smoke else TAUS, size.pick(50, 1500, 20000), size.pick(30, 2000, 20000)
    cells = [(c, tau) for c in COMPRESSORS for tau in taus]
    limits = {}
    for c, tau in cells:
        alpha = alpha_of(COMPRESSORS[c], D)
        limits[_row(c, tau)] = suggested_step_size(alpha, tau, 1.0) / mean_square_limit(alpha, tau)
    kinds = ("suggested", "beyond")
    keys = [(c, tau, kind, seed) for c, tau in cells for kind in kinds for seed in range(size.seeds)]
    times = {"suggested": dict.fromkeys(limits, 0.99), "beyond": {row: BEYOND / share for row, share in limits.items()}}
    jobs = [(c, tau, times[kind][_row(c, tau)], seed, steps * (tau + 1)) for c, tau, kind, seed in keys]
    ran = dict(zip(keys, run_all(descend, jobs, size, "stale, steps"), strict=True))
    again = [(c, reuse, seed) for c in ("none", "qsgd, 7 levels") for reuse in (False, True) for seed in range(size.seeds)]
    ended = dict(zip(again, run_all(aggregate, [(*key, pushes) for key in again], size, "stale, servers"), strict=True))

    over = range(size.seeds)
    figures: Figures = {
        "limits": limits,
        "runs": {_row(c, tau): {kind: Spread(tuple(ran[c, tau, kind, s] for s in over)) for kind in kinds} for c, tau in cells},
        "reuse": {f"{c}{', used again' * reuse}": Spread(tuple(ended[c, reuse, s] for s in over)) for c, reuse, _ in again},
    }
    grid = Table(
        f"The suggested step as a share of the mean-square limit, and log₁₀ of the distance after {steps} · (τ + 1) steps, {seeds(size.seeds)}",
        ("compressor", "α", "τ", "η suggested", "share of the limit", "log₁₀ distance with it", f"with {BEYOND:g} times the limit"),
    )
    for c, tau in cells:
        alpha, row = alpha_of(COMPRESSORS[c], D), _row(c, tau)
        eta = suggested_step_size(alpha, tau, 1.0)
        f = figures["runs"][row]
        grid.rows.append((c, f"{alpha:.2f}", str(tau), f"{eta:.4f}", f"{limits[row]:.3f}", f"{f['suggested'].mean:.1f}", f"{f['beyond'].mean:.1f}"))
    served = Table(
        f"{WORKERS} workers with different minima, of which one takes {SLOW:g} times as long, {pushes} pushes, {seeds(size.seeds)}",
        ("compressor", "distance to the minimum of all"),
    )
    for row, spread in figures["reuse"].items():
        served.rows.append((row, f"{spread:.4f}"))

    def draw(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
        for c in COMPRESSORS:
            axis.plot(taus, [limits[_row(c, tau)] for tau in taus], marker="o", label=f"{c} (α = {alpha_of(COMPRESSORS[c], D):.1f})")
        axis.axhline(1, linestyle="--", color="gray")
        axis.set(xlabel="staleness τ", ylabel="suggested step ÷ mean-square limit", ylim=(0, 1.1))
        axis.grid(alpha=0.3)
        axis.legend()
        figure.suptitle("η = 1/(L(α/2 + τ)) on quadratics")
        return figure

    setting = (
        f"quadratics with d = {D}, in float64; steps: f = Σ f_i of two workers that share their minimum, eigenvalues .1 to 1, every gradient τ "
        "steps old; servers: Q-IAG on simulated workers with random times (lognormal, σ = 0.2)"
    )
    return Report(
        "Stale and compressed gradients (Khirirat et al. 2018, a reconstruction)",
        setting,
        [grid, served],
        claims(figures),
        {"figures": figures},
        draw,
    )
