"""`hvd-ecsgd advise`: measures the machines at hand, and says which method a model should be trained with on them, or none."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CompressionError
from ..transport import Transport
from .network import Network, measure, meet, slowest
from .predict import CANDIDATES, Cost, cost_of, recommended, step_seconds

__all__ = ["add_arguments", "advise", "connect"]

NETWORKS = {
    "mpi": ("mpi_backend", "mpi_backend.transport", "MPITransport"),
    "torch": ("hvd_ecsgd.torch_backend", "hvd_ecsgd.transport.torch_dist", "TorchTransport"),
}
"""By name: the backend whose `init` joins the job, and the module and class of the transport. Named only, as nothing here may need MPI."""

COPIES = 6
"""Of the model's size, that weighing a method takes at most: parameters, gradients, residual, momentum, x and a result."""

Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `advise`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--parameters", type=float, default=25e6, help="of a model that is made up of square linear layers (default 25e6)")
    what.add_argument("--model", help="module:function that returns a torch module, or a module and a function that does a forward and backward pass")
    parser.add_argument("--compute", type=float, help="seconds of a step without communication; measured if it is not given")
    parser.add_argument("--methods", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="METHOD", help=", ".join(CANDIDATES))
    parser.add_argument("--network", choices=list(NETWORKS), help="mpi under mpirun and srun, torch under torchrun, as this job was started")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="file for a plot of step time over bandwidth (.svg, .png)")


def connect(network: str | None) -> Transport:
    """Join the job, as it was started, and return a transport of its own."""
    backend, module, name = NETWORKS[network or ("torch" if "TORCHELASTIC_RUN_ID" in os.environ else "mpi")]
    try:
        importlib.import_module(backend).init()
        transport: Transport = getattr(importlib.import_module(module), name)()
    except ImportError as error:
        raise CompressionError(f"advise: {backend} cannot be imported ({error}); under torchrun give --network torch.") from error
    return transport


def _made_up(parameters: int) -> torch.nn.Module:
    if parameters < 1000:
        raise CompressionError(f"advise: --parameters must be at least 1000, got {parameters}.")
    layers = max(1, min(10, parameters // 100_000))
    width = max(1, round(math.sqrt(parameters / layers)))
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, device="cpu", dtype=torch.float32) for _ in range(layers)))


def _trained(model: torch.nn.Module) -> None:
    x = torch.ones(16, int(next(model.parameters()).shape[1]), dtype=torch.float32, device="cpu")
    model(x).square().mean().backward()


def _model(options: argparse.Namespace) -> tuple[torch.nn.Module, Step | None]:
    if options.model is None:
        model = _made_up(int(options.parameters))
        return model, partial(_trained, model)
    made = _function(options.model)()
    model, step = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise CompressionError(f"advise: {options.model} returned {model!r:.80}; expected a torch module, or one and a function.")
    return model, step


def _function(named: str) -> Callable[[], Any]:
    """The function that `module:function` names. An installed command does not look for modules in the folder that it is called in, as Python does
    for scripts there; so that folder is added."""
    module, _, function = named.partition(":")
    if not (module and function):
        raise CompressionError(f"advise: --model must be module:function, got {named!r}.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # something that the module itself imports
            raise
        raise CompressionError(
            f"advise: --model must be module:function, got {named!r}: there is no module '{error.name}' in {here} nor where Python looks. "
            "Call it in the folder that has the file, or add that to PYTHONPATH."
        ) from error
    if not callable(found):
        raise CompressionError(f"advise: --model must be module:function, got {named!r}: '{module}' has no function '{function}'.")
    return found  # type: ignore[no-any-return]


def _check_memory(parameters: int, transport: Transport) -> None:
    there = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = COPIES * 4 * parameters * int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    worst = slowest(transport, needed / there)
    if worst > 1:
        raise CompressionError(
            f"advise: weighing methods for {parameters:,} parameters takes {needed / 1e9:.1f} GB on this machine, and on some machine that is "
            f"{worst:.1f} times of what is free. Start fewer ranks there, or give a part of the model: times grow with the number of parameters."
        )


def _compute_seconds(model: torch.nn.Module, step: Step, transport: Transport) -> float:
    seconds, sgd = [], torch.optim.SGD(model.parameters(), lr=1e-6)
    for i in range(4):
        meet(transport)
        begin = time.perf_counter()
        step()
        sgd.step()
        sgd.zero_grad()
        if i:
            seconds.append(slowest(transport, time.perf_counter() - begin))
    return statistics.median(seconds)


def advise(options: argparse.Namespace) -> int:
    """Measure, predict and print, on rank 0, which speaks for all: every number is the slowest rank's, and the same on all of them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transport = connect(options.network)
    said = transport.rank == 0
    if transport.size == 1:
        print("There is one rank: nothing is exchanged, so do not compress. Start the job on the machines that are to train (mpirun -n …).")
        return 0
    model, step = _model(options)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = sum(p.numel() for _, p in named)
    _check_memory(parameters, transport)
    if options.compute is None and step is None:
        raise CompressionError("advise: give --compute SECONDS, or let the function of --model return the module and a function that takes a step.")
    network = measure(transport)
    compute = options.compute if options.compute is not None else _compute_seconds(model, step, transport)  # type: ignore[arg-type]
    costs = {name: cost_of(CANDIDATES[name].make, named, transport) for name in dict.fromkeys(["none", *options.methods])}
    gradient_bytes = sum(p.nbytes for _, p in named)

    def predicted(at: Network) -> dict[str, float]:
        return {name: step_seconds(compute, cost, at, gradient_bytes) for name, cost in costs.items()}

    seconds = predicted(network)
    choice = recommended(seconds)
    if not said:
        return 0
    _print(network, parameters, compute, costs, seconds, choice)
    if options.json is not None:
        rows = {
            name: {
                "seconds": seconds[name],
                "kernels": c.kernels,
                "wire": network.total(c.sent),
                "bytes": sum(s.bytes for s in c.sent),
                "memory": c.memory,
            }
            for name, c in costs.items()
        }
        found = {"size": network.size, "latency": network.latency, "rate": network.rate, "spread": network.spread, "points": network.points}
        text = {"network": found, "parameters": parameters, "compute": compute, "methods": rows, "recommended": choice}
        options.json.write_text(json.dumps(text, indent=1))
    if options.plot is not None:
        _plot(options.plot, network, predicted, parameters, compute)
    return 0


def _rate(bits: float) -> str:
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s")):
        if bits >= unit:
            return f"{bits / unit:.3g} {name}"
    return f"{bits / 1e3:.3g} kbit/s"


def _print(network: Network, parameters: int, compute: float, costs: dict[str, Cost], seconds: dict[str, float], choice: str) -> None:
    print(f"{network.size} ranks; a small all-reduce takes {1e3 * network.latency:.2f} ms, large ones use {_rate(network.rate)} of each link.")
    if network.spread > 3:
        print(f"The network is not steady: of equal messages the slowest took {network.spread:.1f} times the median. Repeat this at another time.")
    print(f"{parameters:,} parameters, {1e3 * compute:.0f} ms of computation in a step.\n")
    rows: list[tuple[str, ...]] = [("method", "step ms", "of none", "kernels ms", "network ms", "MB sent", "MB kept", "")]
    for name in sorted(costs, key=lambda name: seconds[name]):
        cost = costs[name]
        numbers = [1e3 * seconds[name], seconds[name] / seconds["none"], 1e3 * cost.kernels, 1e3 * network.total(cost.sent)]
        shown = [f"{numbers[0]:.0f}", f"{numbers[1]:.2f}", *(f"{x:.1f}" for x in numbers[2:])]
        steps = CANDIDATES[name].steps
        known = "accuracy: try it" if steps is None else "" if steps == 1 else f"{steps:g} times as many steps"
        remark = f"<- recommended{known and f', with {known}'}" if name == choice else known
        rows.append((name, *shown, f"{sum(s.bytes for s in cost.sent) / 1e6:.2f}", f"{cost.memory / 1e6:.0f}", remark))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]).rstrip())
    print()
    if choice == "none":
        print("Do not compress: no method that is known to keep the accuracy comes there a tenth sooner here.")
    else:
        steps = CANDIDATES[choice].steps
        more = "" if steps == 1 else f", and {steps:g} times as many steps come to the same accuracy; it may need a smaller learning rate"
        print(f"Compression.{choice}: a step takes {seconds[choice] / seconds['none']:.2f} of an uncompressed one{more}.")


def _plot(file: Path, network: Network, predicted: Callable[[Network], dict[str, float]], parameters: int, compute: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates: Sequence[float] = [10 ** (6 + i / 8) for i in range(33)]
    curves = [predicted(network.at_rate(rate)) for rate in rates]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in curves[0]:
        axes.plot(rates, [curve[name] for curve in curves], label=name, linestyle=":" if CANDIDATES[name].steps is None else "-")
    axes.axvline(network.rate, color="gray", linewidth=1)
    axes.annotate(" this network", (network.rate, axes.get_ylim()[1]), va="top", color="gray")
    axes.axhline(compute, color="black", linewidth=0.5)
    axes.set(
        xscale="log", yscale="log", xlabel="bandwidth, bit/s", ylabel="predicted step, s", title=f"{parameters:,} parameters, {network.size} workers"
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
