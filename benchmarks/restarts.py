"""What a learning rate that falls and jumps back does to training with error feedback: losses around warm restarts, in a minute and one process.

    python benchmarks/restarts.py
    python benchmarks/restarts.py --control

Two simulated workers, 64-128-10 on 1024 samples of a linear teacher, SGD .05 with momentum .9, a cosine of 300 steps. `--control`: units of residuals
follow the learning rate exactly, as if nothing remembered what was sent (docs/algorithms.md §2, *Units*).
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.core.bucket import Bucket
from hvd_ecsgd.transport import Transport, run_simulated

PEAK, PERIOD, AFTER = 0.05, 300, 20
FLOORS = (0.1, 0.01, 0.001, 0.0)

METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: Compression.none,
    "detached(16)": lambda: Compression.detached(16),
    "double_squeeze()": lambda: Compression.double_squeeze(),
    "top_k(50)": lambda: Compression.top_k(50),
    "random_block(16)": lambda: Compression.random_block(16),
    "pef(16)": lambda: Compression.pef(16),
    "power_sgd(2)": lambda: Compression.power_sgd(2),
    "dist_ef_sgd(momentum=.9)": lambda: Compression.dist_ef_sgd(momentum=0.9),
    "local_momentum(16)": lambda: Compression.local_momentum(16),
}


def cosine(t: int, floor: float = 0.0) -> float:
    """The learning rate of step `t`: from PEAK to `floor` of it in PERIOD steps, and again."""
    return PEAK * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t % PERIOD) / PERIOD)))


def losses(make: Callable[[], Any], steps: int, floor: float = 0.0) -> list[float]:
    """Of all samples, before step t, for the AFTER steps that follow a restart and the one before it, else NaN; the last one is after all steps."""

    def worker(transport: Transport) -> list[float]:
        def draw(*shape: int, seed: int) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(draw(*p.shape, seed=i) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.zeros_like(p))
        teacher, test = draw(64, 10, seed=9), draw(1024, 64, seed=10)
        answers, found = (test @ teacher).argmax(1), []
        compression = make()
        inside = "momentum=" in repr(compression)  # of dist_ef_sgd, which takes it over from the optimizer
        sgd = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.0 if inside else 0.9)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), compression, transport=transport)
        for t in range(steps + 1):
            with torch.no_grad(), optimizer.compression.at("averaged"):
                near = t == steps or (t >= PERIOD and t % PERIOD <= AFTER)
                found.append(torch.nn.functional.cross_entropy(model(test), answers).item() if near else math.nan)
            if t == steps:
                return found
            optimizer.param_groups[0]["lr"] = cosine(t, floor)
            optimizer.zero_grad()
            x = draw(16, 64, seed=100 + 2 * t + transport.rank)
            torch.nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
            optimizer.step()
        raise AssertionError

    return run_simulated(2, worker)[0]


def largest_after_restart(make: Callable[[], Any], floor: float = 0.0) -> float:
    """Loss within AFTER steps after the first restart; infinity for NaN."""
    after = losses(make, PERIOD + AFTER, floor)[PERIOD + 1 :]
    return max(math.inf if math.isnan(loss) else loss for loss in after)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", action="store_true", help="units that follow the learning rate")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = Bucket.unit_for
    if options.control:
        Bucket.unit_for = lambda bucket, settings: settings.lr  # type: ignore[method-assign]
    try:
        print(f"{'':<26}{'before':>8}{'largest after':>15}{'third cycle':>13}   largest after, floor " + "".join(f"{f:>9.1%}" for f in FLOORS[:-1]))
        for name in options.only:
            make = METHODS[name]
            cycles = losses(make, 3 * PERIOD)
            after = [loss for t, loss in enumerate(cycles) if t > PERIOD and 0 < t % PERIOD <= AFTER]
            largest = max(math.inf if math.isnan(loss) else loss for loss in after)
            floors = "".join(f"{largest_after_restart(make, floor):>9.3g}" for floor in FLOORS[:-1])
            print(f"{name:<26}{cycles[PERIOD]:>8.3g}{largest:>15.3g}{cycles[-1]:>13.3g}{'':>24}{floors}", flush=True)
    finally:
        Bucket.unit_for = kept  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
