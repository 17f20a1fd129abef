"""Time to the accuracy of dense training, by method and by how slow the network is for the model.

    python benchmarks/time_to_accuracy.py --json time_to_accuracy.json --plot time_to_accuracy.svg            as root, on one machine

How many steps a method needs does not depend on the network, since all workers wait for each other, and how long its steps take does not depend
on how far it has come. So training runs once for each method and seed, on four simulated workers; and on four emulated hosts (netlab.sh) steps
are timed at each pressure ρ = time of a dense ring all-reduce ÷ time to compute a step, all methods taking turns. Time to accuracy is the
product. The target is the dense run's last loss and one per cent; a method that does not come there in as many steps as the dense run took in
all is said to miss it. `auto` takes its trial, and then the steps that are left of the method that it chose.

Between these hosts: `netlab.sh with 4 RATE python benchmarks/time_to_accuracy.py --steps-at PROBLEM --json FILE` times steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
import digits  # noqa: E402

WORKERS, EVERY, LR = 4, 10, 0.05
PRESSURES = (0.3, 3.0, 30.0, 300.0)
METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: Compression.none(),
    "fp16": lambda: Compression.fp16(error_feedback=True),
    "detached(64)": lambda: Compression.detached(64),
    "double_squeeze()": lambda: Compression.double_squeeze(),
    "top_k(100)": lambda: Compression.top_k(100),
    "power_sgd(2)": lambda: Compression.power_sgd(2),
}
AUTO = "auto()"


TARGETS: dict[str, Callable[[float], float]] = {"loss": lambda dense: 1.01 * dense, "errors": lambda dense: dense + 0.01}
"""What must be reached, given the dense run's last value: its loss and one per cent; its share of errors and one point."""


@dataclass(frozen=True)
class Problem:
    """`loss(model, rank, step, seed)` of a worker's batch in a step; `held_out(model)`: what counts, by the names of `TARGETS`."""

    make_model: Callable[[], torch.nn.Module]
    loss: Callable[[torch.nn.Module, int, int, int], torch.Tensor]
    held_out: Callable[[torch.nn.Module], dict[str, float]]
    steps: int


def digits_problem() -> Problem:
    data, batch = digits.load_digits(), 16
    each = len(data.train_labels) // (batch * WORKERS)

    def loss(model: torch.nn.Module, rank: int, step: int, seed: int) -> torch.Tensor:
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(1000 * seed + step // each))
        first = (step % each * WORKERS + rank) * batch
        mine = order[first : first + batch]
        return torch.nn.functional.cross_entropy(model(data.train_images[mine]), data.train_labels[mine])

    def held_out(model: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            loss = float(torch.nn.functional.cross_entropy(model(data.test_images), data.test_labels))
        return {"loss": loss, "errors": 1 - digits.accuracy(model, data)}

    return Problem(digits.make_model, loss, held_out, 20 * each)


PROBLEMS: Mapping[str, Callable[[], Problem]] = {"digits": digits_problem}


Curve = list[dict[str, float]]


def curve(problem: Problem, method: str, seed: int, steps: int) -> Curve:
    """What counts after every `EVERY` steps, at x."""

    def worker(transport: Transport) -> Curve:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = problem.make_model()
        taken = []
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
        optimizer: Any = DistributedOptimizer(sgd, model.named_parameters(), METHODS[method](), transport=transport)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
        for step in range(steps):
            optimizer.zero_grad()
            problem.loss(model, transport.rank, step, seed).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % EVERY == 0:
                with optimizer.compression.at("averaged"):
                    taken.append(problem.held_out(model) if transport.rank == 0 else {})
        return taken

    with torch.random.fork_rng(devices=[]):
        return run_simulated(WORKERS, worker)[0]


def all_curves(name: str, problem: Problem, seeds: int, steps: int, file: Path | None) -> dict[str, list[Curve]]:
    """By method and seed; kept in `file`."""
    kept: dict[str, Curve] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    curves: dict[str, list[Curve]] = {}
    for method in METHODS:
        for seed in range(seeds):
            key = f"{name}, {method}, seed {seed}, {steps} steps"
            if key not in kept:
                kept[key] = curve(problem, method, seed, steps)
                if file is not None:
                    file.write_text(json.dumps(kept))
            curves.setdefault(method, []).append(kept[key])
    return curves


def steps_to(what: str, curves: Mapping[str, list[Curve]]) -> dict[str, list[int | None]]:
    """By method and seed: until `what` is the dense run's last value of that seed, or what is allowed beside it, for the first time. None: never."""
    targets = [TARGETS[what](taken[-1][what]) for taken in curves["none"]]
    return {
        method: [
            next((EVERY * (i + 1) for i, now in enumerate(taken) if now[what] <= target), None) for taken, target in zip(of, targets, strict=True)
        ]
        for method, of in curves.items()
    }


def mean_steps(reached: Mapping[str, list[int | None]]) -> dict[str, int | None]:
    """Over seeds; None of a method that some seed never gets there with."""
    return {m: None if None in steps else round(statistics.mean(s for s in steps if s is not None)) for m, steps in reached.items()}


def time_steps(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of each method, the slowest rank's, on the ranks of this job; what `auto` chose."""
    import mpi_backend as hvd

    hvd.init()
    from mpi4py import MPI
    from reporting import meet, slowest

    comm, problem = MPI.COMM_WORLD.Dup(), PROBLEMS[name]()
    seconds: dict[str, list[float]] = {method: [] for method in ("compute alone", *METHODS)}
    chosen: list[Any] = []

    def run(method: str, warm_up: int) -> list[float]:
        torch.manual_seed(0)
        model = problem.make_model()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
        if method != "compute alone":
            compression = Compression.auto() if method == AUTO else METHODS[method]()
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
            if method == AUTO:
                chosen.append(optimizer.compression.tuner)
        taken = []
        for step in range(warm_up + steps):
            if step == warm_up:
                meet(comm)
            begin = time.perf_counter()
            optimizer.zero_grad()
            problem.loss(model, comm.rank, step, 0).backward()
            optimizer.step()
            taken.append(time.perf_counter() - begin)
        return slowest(comm, taken[warm_up:])

    for _ in range(rounds):
        for method, times in seconds.items():
            times += run(method, 4)
    after = run(AUTO, 17)
    decision = chosen[0].decisions[0]
    named = {"none": "none", "fp16": "fp16", "power_sgd": "power_sgd(2)"}
    auto = {
        "chose": named[decision.chosen],
        "log": str(decision),
        "trial": decision.step / 3 * sum(decision.seconds.values()),
        "steps": decision.step,
    }
    return {"seconds": seconds, "auto": {**auto, "median": statistics.median(after)}}


def on_hosts(name: str, rate: int, rounds: int, steps: int) -> dict[str, Any]:
    """`time_steps` on emulated hosts, with links of `rate` bits per second."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        command = [str(HERE / "netlab.sh"), "with", str(WORKERS), f"{max(1, rate // 1000)}kbit", sys.executable, str(Path(__file__).resolve())]
        command += ["--steps-at", name, "--rounds", str(rounds), "--timed", str(steps), "--json", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}, timeout=1200)
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def seconds_to_accuracy(needed: Mapping[str, int | None], timed: Mapping[str, Any]) -> dict[str, float | None]:
    """By method; None where it misses the target."""
    step = {method: statistics.median(times) for method, times in timed["seconds"].items()}
    result = {method: None if steps is None else steps * step[method] for method, steps in needed.items()}
    auto = timed["auto"]
    steps = needed[auto["chose"]]
    result[AUTO] = None if steps is None else auto["trial"] + max(0, steps - auto["steps"]) * step[auto["chose"]]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the measurements are written to")
    parser.add_argument("--plot", type=Path, help="file that a plot is written to (.svg, .png)")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--curves", type=Path, help="file that losses are kept in, by step: what is there is not trained again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="of timing steps")
    parser.add_argument("--timed", type=int, default=4, help="steps that are timed, for each method in each round")
    parser.add_argument("--short", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--steps-at", choices=list(PROBLEMS), help="time steps on the ranks of this job")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.steps_at:
        result = time_steps(options.steps_at, options.rounds, options.timed)
        if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0:
            options.json.write_text(json.dumps(result))
        return
    pressures, seeds, rounds, timed = ((3.0,), 1, 1, 1) if options.short else (PRESSURES, options.seeds, options.rounds, options.timed)
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    for name in options.problems:
        problem = PROBLEMS[name]()
        steps = 2 * EVERY if options.short else problem.steps
        curves = all_curves(name, problem, seeds, steps, options.curves)
        reached = {what: steps_to(what, curves) for what in curves["none"][0][0]}
        needed = {what: mean_steps(steps) for what, steps in reached.items()}
        n_bytes = sum(p.nbytes for p in problem.make_model().parameters())
        compute = statistics.median(on_hosts(name, 10**10, 1, timed)["seconds"]["compute alone"])
        cells = {}
        for pressure in pressures:
            rate = int(2 * (WORKERS - 1) / WORKERS * 8 * n_bytes / (pressure * compute))
            found = on_hosts(name, rate, rounds, timed)
            cells[str(pressure)] = {
                "rate": rate,
                "steps": found,
                "seconds": {what: seconds_to_accuracy(steps, found) for what, steps in needed.items()},
            }
        report[name] = {"bytes": n_bytes, "compute": compute, "steps": steps, "reached": reached, "curves": curves, "pressures": cells}
        for what, steps_of in needed.items():
            print(table(name, what, report[name], steps_of), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, options.problems, options.plot)


def table(name: str, what: str, result: Mapping[str, Any], needed: Mapping[str, int | None]) -> str:
    """Markdown."""
    cells = result["pressures"]
    size, compute = f"{result['bytes'] / 1e6:.2f} MB of parameters", f"{1e3 * result['compute']:.1f} ms to compute a step"
    lines = [f"\n{name}, {what}: {size}, {compute}, {result['steps']} steps", ""]
    heads = ["method", "steps", *(f"ρ = {p}, {c['rate'] / 1e6:.3g} Mbit/s" for p, c in cells.items())]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in (*METHODS, AUTO):
        seconds = [c["seconds"][what][method] for c in cells.values()]
        told = ["missed" if s is None else f"{s:.2f} s" for s in seconds]
        if method == AUTO:
            told = [f"{t} ({c['steps']['auto']['chose']})" for t, c in zip(told, cells.values(), strict=True)]
        lines.append(f"| {method} | {needed.get(method) or ('' if method == AUTO else 'missed')} | {' | '.join(told)} |")
    return "\n".join(lines)


def plot(report: Mapping[str, Any], problems: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(1, len(problems), figsize=(7 * len(problems), 5), squeeze=False)
    for axes, name in zip(rows[0], problems, strict=True):
        cells, what = report[name]["pressures"], next(iter(TARGETS))
        for method in (*METHODS, AUTO):
            points = [(float(p), s) for p, c in cells.items() if (s := c["seconds"][what][method]) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "k--" if method == AUTO else "o-", label=method)
        axes.set(xscale="log", yscale="log", xlabel="ρ = dense all-reduce ÷ computation", ylabel="seconds to the dense run's loss + 1 %", title=name)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
