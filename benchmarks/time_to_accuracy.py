"""Time to the accuracy of dense training, by method and by how slow the network is for the model.

    python benchmarks/time_to_accuracy.py --json time_to_accuracy.json --plot time_to_accuracy.svg            as root, on one machine

How many steps a method needs does not depend on the network, since all workers wait for each other, and how long its steps take does not depend
on how far it has come. So training runs once for each method and seed, on four simulated workers; and on four emulated hosts (netlab.sh) steps
are timed at each pressure ρ = time of a dense ring all-reduce ÷ time to compute a step, all methods taking turns. Time to accuracy is the
product. The target is the dense run's last loss and one per cent. Each method has the learning rate of four (RATES) with which it ends best on
another seed, and if it misses the target on that one, twice as many steps; what does not come there then, with every seed, is said to miss it.
`fp16` has the dense run's rate, and so has `auto`, which takes its trial, and then the steps that are left of the method that it chose.

What was measured is kept in the files of `--curves` and `--steps`, so the work can be done in pieces: curves on a machine that does other things,
too, steps on one that does nothing else. Between hosts that are there: `netlab.sh with 4 RATE python benchmarks/time_to_accuracy.py --steps-at
PROBLEM --json FILE` times steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
import bytes_lm  # noqa: E402
import digits  # noqa: E402

WORKERS, EVERY = 4, 10
PRESSURES = (0.3, 3.0, 30.0, 300.0)
RATES = (0.05, 0.1, 0.2, 0.4)
"""Learning rates. Each method takes the one with which its last loss is least on a seed that counts no further."""
TUNING = 100
"""That seed."""
LONGER = 2
"""So many times as many steps has a method that the dense run's number is not enough for."""
METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: Compression.none(),
    "fp16": lambda: Compression.fp16(error_feedback=True),
    "detached(64)": lambda: Compression.detached(64),
    "double_squeeze()": lambda: Compression.double_squeeze(),
    "top_k(100)": lambda: Compression.top_k(100),
    "power_sgd(2)": lambda: Compression.power_sgd(2),
}
AUTO = "auto()"
NAMED = {"none": "none", "fp16": "fp16", "power_sgd": "power_sgd(2)"}
"""What it chooses among, as those are named here."""
TUNED_AS = {"fp16": "none"}
"""Whose learning rate a method takes, where that is not its own."""

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


def bytes_problem() -> Problem:
    text, length, batch = bytes_lm.load_text(), 64, 4
    tested = bytes_lm.windows(text.held_out, bytes_lm.spread(text.held_out, 64, length), length)

    def loss(model: torch.nn.Module, rank: int, step: int, seed: int) -> torch.Tensor:
        drawn = bytes_lm.draw(text.train, WORKERS * batch, length, torch.Generator().manual_seed(10_000 * seed + step))
        return bytes_lm.loss_of(model, bytes_lm.windows(text.train, drawn[rank * batch : (rank + 1) * batch], length))

    def held_out(model: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(bytes_lm.loss_of(model, tested))}

    return Problem(lambda: bytes_lm.Transformer(length=length), loss, held_out, 240)


PROBLEMS: Mapping[str, Callable[[], Problem]] = {"digits": digits_problem, "bytes": bytes_problem}


Curve = list[dict[str, float]]


def curve(problem: Problem, method: str, rate: float, seed: int, steps: int) -> Curve:
    """What counts after every `EVERY` steps, at x; until the loss is three times what it was in the beginning, where training has failed."""

    def worker(transport: Transport) -> Curve:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = problem.make_model()
        taken: Curve = []
        with torch.no_grad():
            first = float(problem.loss(model, 0, 0, seed))
        sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        optimizer: Any = DistributedOptimizer(sgd, model.named_parameters(), METHODS[method](), transport=transport)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
        for step in range(steps):
            optimizer.zero_grad()
            problem.loss(model, transport.rank, step, seed).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % EVERY == 0:
                with optimizer.compression.at("averaged"):
                    now = problem.held_out(model) if transport.rank == 0 else {"loss": 0.0}
                told = torch.tensor([now["loss"]], dtype=torch.float64)
                if not float(transport.allgather(told, f"loss.{step}", [1] * transport.size).wait()[0]) < 3 * first:
                    break
                taken.append(now)
        return taken

    with torch.random.fork_rng(devices=[]):
        return run_simulated(WORKERS, worker)[0]


@dataclass(frozen=True)
class Kept:
    """What was measured before, by name, in a file. Several processes may add to it at a time, each names of its own."""

    file: Path | None

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        found = self._read()
        if key not in found:
            made = make()
            found = self._read() | {key: made}  # others have added to it meanwhile
            if self.file is None:
                return made
            new = self.file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(found))
            new.replace(self.file)
        return found[key]

    def _read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file is not None and self.file.exists() else {}


@dataclass(frozen=True)
class Trainings:
    """Of a problem: curves by method, learning rate and seed."""

    name: str
    problem: Problem
    steps: int
    rates: Sequence[float]
    kept: Kept

    def curve(self, method: str, rate: float, seed: int, times: int = 1) -> Curve:
        """In `times` as many steps as the dense run takes; the learning rate falls likewise."""
        steps = times * self.steps
        key = f"{self.name}, {method}, rate {rate:g}, seed {seed}, {steps} steps"
        found: Curve = self.kept.get(key, lambda: curve(self.problem, method, rate, seed, steps))
        return found

    def rate(self, method: str) -> float:
        """With which the last loss is least, on a seed of its own."""
        if len(self.rates) == 1:
            return self.rates[0]

        return min(self.rates, key=lambda rate: self._last(method, rate))

    def _last(self, method: str, rate: float) -> float:
        """Loss on that seed, in as many steps as the dense run takes."""
        taken = self.curve(TUNED_AS.get(method, method), rate, TUNING)
        return taken[-1]["loss"] if len(taken) == self.steps // EVERY else math.inf

    def times(self, method: str, rate: float) -> int:
        """Once as many steps as the dense run where that is enough on the seed for tuning, else `LONGER` times as many."""
        if len(self.rates) == 1:
            return 1
        return 1 if self._last(method, rate) <= TARGETS["loss"](self._last("none", self.rate("none"))) else LONGER

    def curves(self, methods: Sequence[str], seeds: int, rate: float | None = None) -> dict[str, list[Curve]]:
        """By method and seed, at each method's own learning rate or at `rate`."""
        rates = {m: self.rate(m) if rate is None else rate for m in methods}
        return {m: [self.curve(m, rates[m], seed, self.times(m, rates[m])) for seed in range(seeds)] for m in methods}


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


def time_steps(name: str, rounds: int, steps: int, warm_up: int) -> dict[str, Any]:
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
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATES[0], momentum=0.9, weight_decay=1e-4)
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
            times += run(method, warm_up)
    after = run(AUTO, 17)
    decision = chosen[0].decisions[0]
    auto = {
        "chose": NAMED[decision.chosen],
        "log": str(decision),
        "trial": decision.step / 3 * sum(decision.seconds.values()),
        "steps": decision.step,
    }
    return {"seconds": seconds, "auto": {**auto, "median": statistics.median(after)}}


def on_hosts(name: str, rate: int, rounds: int, steps: int, warm_up: int) -> dict[str, Any]:
    """`time_steps` on emulated hosts, with links of `rate` bits per second."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        command = [str(HERE / "netlab.sh"), "with", str(WORKERS), f"{max(1, rate // 1000)}kbit", sys.executable, str(Path(__file__).resolve())]
        command += ["--steps-at", name, "--rounds", str(rounds), "--timed", str(steps), "--warm-up", str(warm_up), "--json", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}, timeout=1200)
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def seconds_to_accuracy(needed: Mapping[str, int | None], chosen: Mapping[str, int | None], timed: Mapping[str, Any]) -> dict[str, float | None]:
    """By method; None where it misses the target. `chosen`: steps of what `auto` chooses among, with the dense run's learning rate."""
    step = {method: statistics.median(times) for method, times in timed["seconds"].items()}
    result = {method: None if steps is None else steps * step[method] for method, steps in needed.items()}
    auto = timed["auto"]
    steps = chosen[auto["chose"]]
    result[AUTO] = None if steps is None else auto["trial"] + max(0, steps - auto["steps"]) * step[auto["chose"]]
    return result


def of_problem(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that there is to know of it."""
    problem, timed = PROBLEMS[name](), Kept(options.steps)
    steps, rates = (2 * EVERY, RATES[:1]) if options.short else (problem.steps, RATES)
    trainings = Trainings(name, problem, steps, rates, Kept(options.curves))
    curves = trainings.curves(list(METHODS), options.seeds)
    chosen_among = trainings.curves(list(NAMED.values()), options.seeds, trainings.rate("none"))
    reached = {what: steps_to(what, curves) for what in TARGETS if what in curves["none"][0][0]}
    by_auto = {what: steps_to(what, chosen_among) for what in reached}
    n_bytes = sum(p.nbytes for p in problem.make_model().parameters())
    alone = timed.get(f"{name}, compute alone", lambda: on_hosts(name, 10**10, 1, options.timed, options.warm_up))
    compute = statistics.median(alone["seconds"]["compute alone"])
    cells = {}
    for pressure in options.pressures:
        rate = int(2 * (WORKERS - 1) / WORKERS * 8 * n_bytes / (pressure * compute))
        kept = timed.get(f"{name}, ρ = {pressure:g}", lambda rate=rate: on_hosts(name, rate, options.rounds, options.timed, options.warm_up))
        seconds = {what: seconds_to_accuracy(mean_steps(reached[what]), mean_steps(by_auto[what]), kept) for what in reached}
        cells[str(pressure)] = {"rate": rate, "steps": kept, "seconds": seconds}
    return {
        "bytes": n_bytes,
        "compute": compute,
        "steps": steps,
        "rates": {method: trainings.rate(method) for method in METHODS},
        "times": {method: trainings.times(method, trainings.rate(method)) for method in METHODS},
        "reached": reached,
        "by auto": by_auto,
        "curves": curves,
        "pressures": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the measurements are written to")
    parser.add_argument("--plot", type=Path, help="file that a plot is written to (.svg, .png)")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--curves", type=Path, help="file that losses are kept in, by step: what is there is not trained again")
    parser.add_argument("--steps", type=Path, help="file that times of steps are kept in, likewise")
    parser.add_argument("--pressures", nargs="+", type=float, default=PRESSURES, help="ρ")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="of timing steps")
    parser.add_argument("--timed", type=int, default=4, help="steps that are timed, for each method in each round")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before those")
    parser.add_argument("--short", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--steps-at", choices=list(PROBLEMS), help="time steps on the ranks of this job")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.steps_at:
        result = time_steps(options.steps_at, options.rounds, options.timed, options.warm_up)
        if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0:
            options.json.write_text(json.dumps(result))
        return
    if options.short:
        options.pressures, options.seeds, options.rounds, options.timed = (3.0,), 1, 1, 1
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    for name in options.problems:
        report[name] = of_problem(name, options)
        for what, steps_of in report[name]["reached"].items():
            print(table(name, what, report[name], mean_steps(steps_of)), flush=True)
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
