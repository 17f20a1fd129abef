"""The comparison that `launch/quickstart.sh` runs: five ways to exchange gradients, on real images, over MPI. Ends with a table and a plot.

mpirun -n 2 python examples/quickstart.py --out results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from digits import Result, load_digits, positive, train
from tqdm import tqdm

import mpi_backend as hvd

RATIO = 32.0
COMPARED = {
    "dense": "none",
    f"random block 1/{RATIO:g}, no feedback": "random_block_no_feedback",
    f"random block 1/{RATIO:g} + error feedback": "random_block",
    f"random block 1/{RATIO:g} + DEF": "detached",
    "DoubleSqueeze, 1 bit both ways": "double_squeeze",
}


def table(results: dict[str, Result]) -> str:
    """The results as text, a row a method."""
    width = max(map(len, results))
    lines = [f"{'method':<{width}}  test accuracy  MB sent per worker  compression  seconds"]
    lines.append("-" * len(lines[0]))
    for name, r in results.items():
        ratio = "–" if math.isnan(r.ratio) else f"{r.ratio:.1f}x"
        lines.append(f"{name:<{width}}  {r.accuracy:>13.3f}  {r.megabytes_sent:>18.2f}  {ratio:>11}  {r.seconds:>7.1f}")
    return "\n".join(lines)


def plot(results: dict[str, Result], lr: float, file: Path) -> None:
    """Accuracy by epoch, and what it cost in bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_epoch, by_bytes) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for name, r in results.items():
        epochs = range(1, len(r.curve) + 1)
        by_epoch.plot(epochs, r.curve, marker=".", label=name)
        by_bytes.plot([r.megabytes_sent * e / len(r.curve) for e in epochs], r.curve, marker=".", label=name)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
    by_bytes.set(
        xlabel="MB sent per worker",
        ylabel="test accuracy",
        xscale="log" if any(r.megabytes_sent for r in results.values()) else "linear",
        ylim=(0, 1.02),
    )
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_epoch.legend(loc="lower right", fontsize=8)
    for axes in (by_epoch, by_bytes):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Digits, {hvd.size()} workers, SGD with momentum 0.9, learning rate {lr:g}, lowered after half and three quarters")
    figure.savefig(file, dpi=120)


def unwritable(folder: Path) -> str:
    """Why results cannot be saved there; empty when they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "quickstart.json").touch()
    except OSError as error:
        return f"results cannot be saved in '{folder}' ({error.strerror}); name another folder with --out."
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for quickstart.png and quickstart.json")
    args = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())
    if problem := hvd.broadcast_object(unwritable(args.out) if hvd.rank() == 0 else None):
        raise SystemExit(f"error: {problem}" if hvd.rank() == 0 else 1)
    data = load_digits()
    results: dict[str, Result] = {}
    for name, method in COMPARED.items():
        steps = args.epochs * (len(data.train_labels) // (16 * hvd.size()))
        with tqdm(total=steps, desc=f"{name:<34}", unit="step", disable=hvd.rank() != 0, file=sys.stderr, mininterval=0.5, ncols=100) as bar:
            results[name] = train(hvd, method, data, ratio=RATIO, epochs=args.epochs, lr=args.lr, tick=bar.update)
    hashes = [r.weights_hash for r in results.values()]
    if any(other != hashes for other in hvd.allgather_object(hashes)):
        raise SystemExit("error: the workers ended with different weights; please report this.")
    if hvd.rank() == 0:
        print(f"\n{table(results)}\n")
        (args.out / "quickstart.json").write_text(json.dumps({name: dataclasses.asdict(r) for name, r in results.items()}, indent=1))
        plot(results, args.lr, args.out / "quickstart.png")
        print(f"All {hvd.size()} workers hold the same bits after every run. Plot: {args.out / 'quickstart.png'}")
        print(
            "Seconds: these workers share one machine, where sending is copying in memory and there is little to gain;\n"
            "what compression saves is the megabytes, and on a slow link the time they take."
        )


if __name__ == "__main__":
    main()
