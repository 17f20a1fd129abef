"""The comparison that `launch/quickstart.sh` runs: five ways to exchange gradients, on real images, over MPI. Ends with a table and a plot.

mpirun -n 2 python examples/quickstart.py --out results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from common import Curve, check_out, plot, positive, start, table, times
from digits import Result, load_digits, train
from tqdm import tqdm

RATIO = 32.0
COLUMNS = ("method", "test accuracy", "MB sent per worker", "compression", "seconds")
COMPARED = {
    "dense": "none",
    f"random block 1/{RATIO:g}, no feedback": "random_block_no_feedback",
    f"random block 1/{RATIO:g} + error feedback": "random_block",
    f"random block 1/{RATIO:g} + DEF": "detached",
    "DoubleSqueeze, 1 bit both ways": "double_squeeze",
}


def rows(results: dict[str, Result]) -> list[tuple[str, ...]]:
    """Of the table, one for each method."""
    return [(name, f"{r.accuracy:.3f}", f"{r.megabytes_sent:.2f}", times(r.ratio), f"{r.seconds:.1f}") for name, r in results.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for quickstart.png and quickstart.json")
    args = parser.parse_args()

    hvd = start("mpi")
    check_out(hvd, args.out, "quickstart")
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
        print(f"\n{table(COLUMNS, rows(results))}\n")
        (args.out / "quickstart.json").write_text(json.dumps({name: dataclasses.asdict(r) for name, r in results.items()}, indent=1))
        epochs = list(range(1, args.epochs + 1))
        curves = {name: Curve(epochs, r.curve, [r.megabytes_sent * e / args.epochs for e in epochs]) for name, r in results.items()}
        title = f"Digits, {hvd.size()} workers, SGD with momentum 0.9, learning rate {args.lr:g}, lowered after half and three quarters"
        plot(curves, args.out / "quickstart.png", title=title, x="epoch", y="test accuracy", ylim=(0, 1.02))
        print(f"All {hvd.size()} workers hold the same bits after every run. Plot: {args.out / 'quickstart.png'}")
        print(
            "Seconds: these workers share one machine, where sending is copying in memory and there is little to gain;\n"
            "what compression saves is the megabytes, and on a slow link the time they take."
        )


if __name__ == "__main__":
    main()
