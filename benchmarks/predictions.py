"""What `hvd-ecsgd advise` predicts for a step, beside what a step takes, in one run.

    benchmarks/netlab.sh with 4 1gbit python benchmarks/predictions.py --json predictions.json --plot predictions.svg
    benchmarks/netlab.sh with 4 100mbit --delay 25 python benchmarks/predictions.py --methods fp16 "power_sgd(2)" "top_k(100)"

The model is ten square linear layers, and steps are those of mpi_backend's optimizer. Nothing is fitted to what is predicted: the network is
measured by collectives of its own sizes, and kernels without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from functools import partial
from typing import Any

import torch
from reporting import Row, add_arguments, write
from step_time import compute_alone, measure, ours, rank, size

from hvd_ecsgd.advisor import CANDIDATES, cost_of, step_seconds
from hvd_ecsgd.advisor import measure as measure_network
from mpi_backend.transport import MPITransport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    width, layers, rounds, steps = (64, 3, 1, 1) if options.short else (1581, 10, options.rounds, options.steps)
    transport = MPITransport()
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    named = list(model.named_parameters())
    network = measure_network(transport)
    costs = {name: cost_of(CANDIDATES[name].make, named, transport) for name in options.methods}
    alone, rows = Row("compute alone"), {name: Row(name) for name in options.methods}
    for _ in range(rounds):
        alone.seconds += measure(compute_alone, width, layers, 16, steps)[0]
        for name, row in rows.items():
            row.seconds += measure(partial(ours, method=name), width, layers, 16, steps)[0]
    predicted = {name: step_seconds(alone.median, cost, network, sum(p.nbytes for _, p in named)) for name, cost in costs.items()}
    ratios = {name: predicted[name] / rows[name].median for name in rows}

    def plot(axes: Any) -> None:
        for name, row in rows.items():
            axes.plot(row.median, predicted[name], "o", label=name)
        ends = [min(predicted.values()), max(predicted.values())]
        axes.plot(ends, ends, "k-", linewidth=0.5)
        axes.set(xlabel="measured step, s", ylabel="predicted step, s", xscale="log", yscale="log")
        axes.legend(fontsize=8)

    if rank == 0:
        print(f"{size} ranks, {network.rate / 1e6:.0f} Mbit/s, small all-reduce {1e3 * network.latency:.2f} ms; {alone}")
        for name, row in rows.items():
            parts = f"kernels {1e3 * costs[name].kernels:.1f}, network {1e3 * network.total(costs[name].sent):.1f}"
            print(f"{row}  predicted {1e3 * predicted[name]:9.2f} ms, × {ratios[name]:.2f}  ({parts})")
        near = sum(0.8 <= r <= 1.25 for r in ratios.values())
        print(f"{near} of {len(ratios)} within 25 %; the median quotient is {statistics.median(ratios.values()):.2f}")
        about = {"size": size, "predicted": predicted, "compute": alone.median, "latency": network.latency, "rate used": network.rate}
        write(options, "Predicted and measured steps", {"measured": list(rows.values())}, plot, **about)


if __name__ == "__main__":
    main()
