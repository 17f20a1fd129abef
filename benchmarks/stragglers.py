"""One worker of four takes five times as long: training that waits for it, serving ranks, and a straggler cutoff, in seconds on real ranks.

    python benchmarks/stragglers.py --out results          # 3 seeds, 8 minutes alone on two cores; writes stragglers.json, .md and .png

Digits (real images), all with the same compression, batches, rate and number of gradients. A worker computes a gradient and sleeps until
`--compute` seconds are over, the slow one five times as long, so that ranks that share a core stand for ranks that do not. Rank 0, which
is not slow, keeps x now and then; its loss is computed when the training is over.

On the ranks of a job: `mpirun -n 4 python benchmarks/stragglers.py --mode cutoff --slow 5` trains once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hvd_ecsgd import Compression
from hvd_ecsgd.reproduce.problems import Digits
from hvd_ecsgd.reproduce.report import Claim, Report, Spread, Table, seeds

REPO = Path(__file__).resolve().parents[1]
WORKERS, SLOW = 4, 5.0
LR = 0.1
MODES = {"synchronous": 0, "cutoff": 0, "asynchronous": 1}
"""Ranks that serve."""
_RESULT = "result "


def share(slow: float) -> float:
    """Gradients that come of all workers in the time in which a fast one computes one."""
    return WORKERS - 1 + 1 / slow


def train(mode: str, slow: float, seed: int, gradients: int, compute: float) -> dict[str, Any]:
    """On a rank: until so many gradients of all workers are applied; rank 0's figures, by time."""
    import mpi_backend as hvd
    from hvd_ecsgd.asynchronous import Cutoff

    hvd.init(servers=MODES[mode])
    torch.set_num_threads(1)
    problem = Digits(256)
    model = problem.model(seed)
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    compression = Compression.double_squeeze(dense_below=0, dense_1d=False)
    if mode == "asynchronous":
        optimizer = hvd.AsyncDistributedOptimizer(sgd, model.named_parameters(), compression)
    elif mode == "cutoff":
        optimizer = hvd.CutoffDistributedOptimizer(sgd, model.named_parameters(), compression, cutoff=Cutoff())
    else:
        optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression)
    rank, factor = hvd.rank(), slow if hvd.rank() == WORKERS - 1 else 1.0
    # Of those that wait for nobody, fast workers have done so much when all of them together have done their part.
    steps = round(gradients / (WORKERS if mode == "synchronous" else share(slow)))
    turns = round(steps / factor) if mode == "asynchronous" else steps
    kept: list[tuple[float, int, list[torch.Tensor]]] = []
    turn = 0
    hvd.barrier()
    started = time.perf_counter()

    def taken() -> int:
        return optimizer.steps if mode == "cutoff" else turn

    while taken() < turns:
        begin = time.perf_counter()
        if rank == 0:
            kept.append((begin - started, taken(), [p.detach().clone() for p in model.parameters()]))
        optimizer.zero_grad()
        inputs, labels = problem.batch(rank, WORKERS, turn, seed)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        time.sleep(max(0.0, factor * compute - (time.perf_counter() - begin)))
        optimizer.step()
        turn += 1
    own = time.perf_counter() - started
    if mode != "synchronous":
        optimizer.finish()
    loss_at = []
    final = {name: float(value) for name, value in problem.evaluate(model).items()}
    for seconds, step, x in kept[:: max(1, len(kept) // 100)] if rank == 0 else []:
        with torch.no_grad():
            for p, value in zip(model.parameters(), x, strict=True):
                p.copy_(value)
            loss_at.append((seconds, step, problem.evaluate(model)["loss"]))
    late = optimizer.late if mode == "cutoff" else 0
    turns_of_all = hvd.allgather_object((turn, late))
    hvd.shutdown()
    return {"final": final, "seconds": own, "steps": taken(), "loss_at": loss_at, "turns": turns_of_all}


def seconds_until(loss_at: list[tuple[float, int, float]], target: float) -> float:
    """When the loss first was at most `target`; inf if it never was."""
    return next((seconds for seconds, _, loss in loss_at if loss <= target), float("inf"))


def measure(mode: str, slow: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """`train` in a job of its own."""
    ranks = WORKERS + MODES[mode]
    command = [str(REPO / "launch" / "mpirun.sh"), "-n", str(ranks), "-t", "1", "--", sys.executable, __file__]
    command += ["--mode", mode, "--slow", str(slow), "--seed", str(seed), "--gradients", str(options.gradients), "--compute", str(options.compute)]
    environment = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    told = [line.split(_RESULT, 1)[1] for line in done.stdout.splitlines() if _RESULT in line]
    if done.returncode or not told:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    result: dict[str, Any] = json.loads(told[-1])
    print(f"{mode}, one worker {slow:g} x, seed {seed}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    return result


Figures = dict[str, dict[str, Spread]]
"""row → figure → over seeds"""

ROWS = [("synchronous", 1.0), ("synchronous", SLOW), ("cutoff", 1.0), ("cutoff", SLOW), ("asynchronous", 1.0), ("asynchronous", SLOW)]


def row_of(mode: str, slow: float) -> str:
    return f"{mode}, {'all alike' if slow == 1 else f'one {slow:g}x slower'}"


def claims(figures: Figures) -> list[Claim]:
    """What is claimed of the straggler cutoff and of serving ranks, and whether these figures agree."""
    alike, waits = figures[row_of("synchronous", 1.0)], figures[row_of("synchronous", SLOW)]
    cut, served = figures[row_of("cutoff", SLOW)], figures[row_of("asynchronous", SLOW)]
    ratio = cut["step"].mean / alike["step"].mean
    apart, spread = abs(cut["loss"].mean - alike["loss"].mean), max(cut["loss"].sd, alike["loss"].sd)
    return [
        Claim(
            "a step of the cutoff takes as long as one of the fast workers",
            f"{1e3 * cut['step'].mean:.1f} ms, of the fast ones {1e3 * alike['step'].mean:.1f} ms, waiting for the slow one "
            f"{1e3 * waits['step'].mean:.1f} ms (agreement: at most 1.2 times the fast ones')",
            ratio <= 1.2,
        ),
        Claim(
            "nothing is lost: after as many gradients the loss is that of full participation",
            f"{cut['loss']:.4f} and {alike['loss']:.4f} (agreement: apart by no more than either spreads over seeds)",
            apart <= spread,
        ),
        Claim(
            "with one slow worker the cutoff reaches the loss sooner than waiting for it",
            f"{cut['until'].mean:.1f} s and {waits['until'].mean:.1f} s (agreement: in half of the time)",
            cut["until"].mean <= waits["until"].mean / 2,
        ),
        Claim(
            "so do serving ranks",
            f"{served['until'].mean:.1f} s and {waits['until'].mean:.1f} s (agreement: in half of the time)",
            served["until"].mean <= waits["until"].mean / 2,
        ),
        Claim(
            "where all are alike the cutoff costs little",
            f"{1e3 * figures[row_of('cutoff', 1.0)]['step'].mean:.1f} ms a step and {1e3 * alike['step'].mean:.1f} ms (agreement: a tenth more)",
            figures[row_of("cutoff", 1.0)]["step"].mean <= 1.1 * alike["step"].mean,
        ),
    ]


def report(results: dict[str, list[dict[str, Any]]], target: float, options: argparse.Namespace) -> Report:
    figures: Figures = {
        row: {
            "loss": Spread(tuple(r["final"]["loss"] for r in runs)),
            "accuracy": Spread(tuple(r["final"]["accuracy"] for r in runs)),
            "step": Spread(tuple(r["seconds"] / max(1, r["steps"]) for r in runs)),
            "until": Spread(tuple(seconds_until(r["loss_at"], target) for r in runs)),
            "slow": Spread(tuple(float(r["turns"][-1][0]) for r in runs)),
        }
        for row, runs in results.items()
    }
    heading = (
        "",
        "ms per step of a fast worker",
        f"seconds until the loss is {target:g}",
        "final training loss",
        "test accuracy",
        "gradients of the last worker",
    )
    table = Table(f"{options.gradients} gradients of all workers together, {seeds(options.seeds)}", heading)
    for row, f in figures.items():
        ms = Spread(tuple(1e3 * v for v in f["step"].values))
        table.rows.append((row, f"{ms:.1f}", f"{f['until']:.1f}", f"{f['loss']:.4f}", f"{f['accuracy']:.3f}", f"{f['slow'].mean:.0f}"))

    def draw(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
        for row, runs in results.items():
            axis.plot(
                [s for s, _, _ in runs[0]["loss_at"]], [loss for *_, loss in runs[0]["loss_at"]], label=row, linestyle="--" if "alike" in row else "-"
            )
        axis.set(xlabel="seconds", ylabel="training loss (seed 0)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
        figure.suptitle("Four workers, of which one is slow: digits")
        return figure

    setting = (
        f"digits (real images), network 64-256-10, {WORKERS} workers × 16, SGD at {LR}, signs both ways, on real ranks of one machine with "
        f"{os.cpu_count()} cores; a gradient takes {1e3 * options.compute:g} ms, the slow worker's {SLOW:g} times that"
    )
    return Report("A slow worker, on real ranks", setting, [table], claims(figures), {"figures": figures, "target": target}, draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for stragglers.json, .md and .png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gradients", type=int, default=1200, help="of all workers together")
    parser.add_argument("--compute", type=float, default=0.03, help="seconds that a gradient takes")
    parser.add_argument("--target", type=float, default=0.4, help="training loss")
    parser.add_argument("--short", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--mode", choices=list(MODES), help="on the ranks of a job: train once")
    parser.add_argument("--slow", type=float, default=SLOW)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.short:
        options.seeds, options.gradients, options.compute, options.target = 1, 64, 0.01, 2.2
    if options.mode is not None:
        result = train(options.mode, options.slow, options.seed, options.gradients, options.compute)
        if result["loss_at"]:
            print(f"{_RESULT}{json.dumps(result)}", flush=True)
        return
    started = time.perf_counter()
    results = {row_of(mode, slow): [] for mode, slow in ROWS}
    for seed in range(options.seeds):  # rows take turns
        for mode, slow in ROWS:
            results[row_of(mode, slow)].append(measure(mode, slow, seed, options))
    made = report(results, options.target, options)
    made.seconds = time.perf_counter() - started
    print(made.text())
    for file in made.save(options.out, "stragglers"):
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
