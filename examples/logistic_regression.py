"""Sparse logistic regression whose gradients are rounded to whole numbers, with and without what error feedback and the Hessian put right.

    mpirun -n 4 python examples/logistic_regression.py

Every worker has 400 samples of its own, of 40 features of which the rarest is in one of a hundred. What a worker holds back, e, is carried to the
next step: as it is (error feedback), or multiplied by I − ηH, which undoes what steps have changed about it meanwhile (Khirirat, Magnússon,
Johansson 2019). x itself always stays η‖mean e‖ away from the optimum, so it is z = x − η·mean e that the table and the plot show.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import BACKENDS, Curve, check_out, plot, positive, start, table, times
from torch.nn import functional

from hvd_ecsgd import Compression
from hvd_ecsgd.compressors import Rounding
from hvd_ecsgd.exchange import AllGather
from hvd_ecsgd.feedback import ErrorFeedback, HessianAided, Hutchinson, NoFeedback, Product
from hvd_ecsgd.reproduce.lockstep import Logistic

Vectors = Mapping[str, torch.Tensor]
EVERY = 10


@dataclass
class Result:
    megabytes: list[float] = field(default_factory=list)
    """Sent by this worker until then."""
    ratio: float = 1.0
    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    """‖z − x*‖ after those steps."""


class Model(torch.nn.Module):
    """The loss of one worker's samples, in thousandths, so that rounding matters."""

    def __init__(self, problem: Logistic, rank: int) -> None:
        super().__init__()
        self.x, self.signed = torch.nn.Parameter(problem.start.clone()), problem.data[rank]

    def forward(self) -> torch.Tensor:
        return 1000 * (functional.softplus(-self.signed @ self.x).mean() + 0.5e-3 * self.x.square().sum())

    def hessian_times(self, vectors: Vectors) -> Vectors:
        """This worker's H times v, by differentiating twice."""
        (gradient,) = torch.autograd.grad(self(), self.x, create_graph=True)
        return {"x": torch.autograd.grad(gradient, self.x, vectors["x"])[0]}


METHODS: dict[str, Callable[[Model], Compression]] = {
    "not compressed": lambda model: Compression.none(),
    "rounded, no feedback": lambda model: whole_numbers(NoFeedback()),
    "error feedback": lambda model: whole_numbers(ErrorFeedback()),
    "I − η·diagonal of H": lambda model: whole_numbers(HessianAided(Hutchinson(model.hessian_times, decay=0.98))),
    "I − ηH": lambda model: whole_numbers(HessianAided(Product(model.hessian_times))),
}


def whole_numbers(feedback: Any) -> Compression:
    """Gradients in 16 bits an entry, of all parameters, also the few that otherwise travel as they are."""
    return Compression(Rounding(), feedback, AllGather(), dense_below=0, dense_1d=False)


def train(hvd: ModuleType, method: str, problem: Logistic, steps: int) -> Result:
    model = Model(problem, hvd.rank())
    compression = METHODS[method](model).bind(model)
    sgd = torch.optim.SGD(model.parameters(), lr=problem.eta)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters(), compression=compression)
    compression.attach(optimizer)
    result, started = Result(), time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        if step % EVERY == 0:
            state = compression.state_dict()["parameters"].get("x", {})
            mean = hvd.allreduce(state.get("residual", torch.zeros_like(model.x)), name=f"residual.{step}")
            z = model.x.detach() - problem.eta * mean
            result.steps.append(step)
            result.megabytes.append(compression.traffic.sent / 1e6)
            result.distances.append(float((z - problem.best).norm()))
    result.seconds = time.perf_counter() - started
    result.ratio = compression.traffic.ratio
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="mpi", help="mpi: mpi_backend, needs no Horovod; torch: under torchrun")
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for logistic_regression.png and logistic_regression.json")
    args = parser.parse_args()
    hvd = start(args.backend)
    check_out(hvd, args.out, "logistic_regression")
    problem = Logistic(hvd.size())
    results = {method: train(hvd, method, problem, args.steps) for method in METHODS}
    if hvd.rank() == 0:
        columns = ("method", "distance to the optimum", "MB sent per worker", "compression", "seconds")
        rows = [(m, f"{r.distances[-1]:.2g}", f"{r.megabytes[-1]:.2f}", times(r.ratio), f"{r.seconds:.1f}") for m, r in results.items()]
        print(f"{table(columns, rows)}\n")
        (args.out / "logistic_regression.json").write_text(json.dumps({method: asdict(r) for method, r in results.items()}, indent=1))
        curves = {method: Curve(r.steps, r.distances, r.megabytes) for method, r in results.items()}
        title = f"Sparse logistic regression, {hvd.size()} workers, gradients rounded to whole numbers"
        plot(curves, args.out / "logistic_regression.png", title=title, x="step", y="‖z − x*‖", yscale="log")
        print(f"Plot: {args.out / 'logistic_regression.png'}")


if __name__ == "__main__":
    main()
