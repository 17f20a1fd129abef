"""How all-reduces scale: measured among n hosts, a cost model fitted to that, and what it says of more hosts.

    for n in 2 4 8; do benchmarks/netlab.sh with $n 1gbit python benchmarks/scaling.py measure --json scaling-$n.json; done
    python benchmarks/scaling.py fit scaling-*.json --plot scaling.svg

`measure` takes what the ranks that it runs on take for an all-reduce of several sizes. `fit` needs no ranks: of the files of several n it fits

    seconds = a · (n - 1) + b · 2(n-1)/n · bytes + c

(a: what a message to one more host takes, b: what a byte takes on the wire, c: what does not depend on either), which is linear, by least squares of
relative errors without negative coefficients, and draws it up to 1 024 hosts beside the measured points. Ranks that share cores pay for that in `a`
and `c`: hosts of their own would be faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

COEFFICIENTS = ("seconds per host", "seconds per byte", "seconds")


def features(n: float, nbytes: float) -> list[float]:
    return [n - 1, 2 * (n - 1) / n * nbytes, 1.0]


def fitted(points: list[tuple[int, int, float]]) -> np.ndarray:
    """The coefficients, from (n, bytes, seconds). Those that would be negative are left out: the best of all choices without one."""
    rows = np.array([[f / seconds for f in features(n, nbytes)] for n, nbytes, seconds in points])
    best, least = np.zeros(3), np.inf
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), k) for k in (1, 2, 3)):
        x = np.zeros(3)
        x[list(kept)] = np.linalg.lstsq(rows[:, kept], np.ones(len(points)), rcond=None)[0]
        if (x >= 0).all() and (error := float(((rows @ x - 1) ** 2).sum())) < least:
            best, least = x, error
    return best


def measure(options: argparse.Namespace) -> None:
    import torch
    from collectives import all_reduces, comm, size
    from collectives import measure as measured
    from reporting import start_gloo, write

    torch.set_num_threads(1)
    start_gloo(comm)
    sizes, seconds, most = ([4e3, 1e5], 0.1, 2) if options.short else (options.sizes, options.seconds, 15)
    runs = {name: run for name, run in all_reduces([]).items() if name == "ours"}
    tables = {f"all-reduce of {nbytes:g} bytes": measured(runs, int(nbytes), 2, options, seconds, most) for nbytes in sizes}
    if comm.rank == 0:
        write(options, f"All-reduces among {size} ranks", tables, lambda axes: axes.set(xlabel="use fit for a plot"), size=size)
    torch.distributed.destroy_process_group()


def fit(options: argparse.Namespace) -> None:
    points = []
    for file in options.files:
        found = json.loads(file.read_text())
        for heading, rows in found["tables"].items():
            points += [(int(found["size"]), int(float(heading.split()[2])), float(row["median"])) for row in rows]
    if len({n for n, _, _ in points}) < 2:
        sys.exit("scaling.py fit: the files are of one number of hosts; a fit needs two at least.")
    model = fitted(points)
    for name, value in zip(COEFFICIENTS, model, strict=True):
        print(f"{name}: {value:.3g}")
    if model[1]:
        print(f"that is a link of {8 / model[1] / 1e6:.0f} Mbit/s")
    errors = [abs(float(np.dot(model, features(n, b))) / seconds - 1) for n, b, seconds in points]
    print(f"relative error of the fit: median {np.median(errors):.2f}, largest {max(errors):.2f}")
    drawn = [2**k for k in range(1, 11)]
    sizes = sorted({b for _, b, _ in points})
    curves = {b: [float(np.dot(model, features(n, b))) for n in drawn] for b in sizes}
    for b in sizes:
        print(f"{b:>12} bytes: " + ", ".join(f"{n} hosts {1e3 * t:.1f} ms" for n, t in zip(drawn, curves[b], strict=True) if n in (16, 64, 1024)))
    if options.json is not None:
        plain = {"model": dict(zip(COEFFICIENTS, model.tolist(), strict=True)), "hosts": drawn, "curves": curves, "points": points}
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    if options.plot is not None:
        plot(options.plot, points, drawn, curves)


def plot(file: Path, points: list[tuple[int, int, float]], drawn: list[int], curves: dict[int, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for b, curve in curves.items():
        (line,) = axes.loglog(drawn, curve, "-", label=f"{b:g} bytes")
        axes.loglog(*zip(*((n, t) for n, size, t in points if size == b)), "o", color=line.get_color())
    axes.set(xlabel="hosts", ylabel="seconds", title="All-reduce: measured (points), and the model")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="on the ranks that run this")
    if "measure" in sys.argv[1:2]:  # what it needs imports MPI
        from reporting import add_arguments

        add_arguments(measuring)
    measuring.add_argument("--sizes", type=float, nargs="+", default=[4e3, 1e5, 1.56e6, 10e6], help="bytes")
    measuring.add_argument("--seconds", type=float, default=4, help="for each size")
    measuring.set_defaults(run=measure)
    fitting = commands.add_parser("fit", help="of files that `measure` wrote")
    fitting.add_argument("files", type=Path, nargs="+")
    fitting.add_argument("--json", type=Path, help="file that model and curves are written to")
    fitting.add_argument("--plot", type=Path, help="file that a plot is written to (.svg, .png)")
    fitting.set_defaults(run=fit)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
