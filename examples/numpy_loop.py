"""A training loop on NumPy arrays, with neither torch's autograd nor an optimizer, whose gradients are exchanged compressed. The lines that
`mpi_backend` and compression add are marked with (+).

    mpirun -n 2 python examples/numpy_loop.py --method top_k --ratio 100

Tensors are views of the arrays (`torch.from_numpy`), so nothing is copied on the way in or out. Ends with a table and a plot.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import IN_GRADIENTS, METHODS, Curve, check_out, plot, positive, table, times
from digits import Data, load_digits

import mpi_backend as hvd  # (+)
from hvd_ecsgd import GradientExchange  # (+)
from mpi_backend.transport import MPITransport  # (+)

Arrays = dict[str, np.ndarray]


def make_weights(width: int = 512) -> Arrays:
    """Of two layers."""
    draw = np.random.default_rng(0)
    return {
        "first": draw.normal(0, 0.15, (64, width)).astype(np.float32),
        "first_bias": np.zeros(width, np.float32),
        "second": draw.normal(0, 0.06, (width, 10)).astype(np.float32),
        "second_bias": np.zeros(10, np.float32),
    }


def gradients(w: Arrays, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Of the mean cross entropy, by hand."""
    hidden = np.maximum(images @ w["first"] + w["first_bias"], 0)
    scores = hidden @ w["second"] + w["second_bias"]
    wrong = np.exp(scores - scores.max(1, keepdims=True))
    wrong /= wrong.sum(1, keepdims=True)
    wrong[np.arange(len(labels)), labels] -= 1
    wrong /= len(labels)
    before = (wrong @ w["second"].T) * (hidden > 0)
    return {"first": images.T @ before, "first_bias": before.sum(0), "second": hidden.T @ wrong, "second_bias": wrong.sum(0)}


def accuracy(w: Arrays, data: Data) -> float:
    hidden = np.maximum(data.test_images.numpy() @ w["first"] + w["first_bias"], 0)
    return float(((hidden @ w["second"] + w["second_bias"]).argmax(1) == data.test_labels.numpy()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--method", choices=IN_GRADIENTS, default="top_k")
    parser.add_argument("--ratio", type=float, default=64.0, help="elements in ÷ elements sent, for methods that have a ratio")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for numpy_loop.png and numpy_loop.json")
    args = parser.parse_args()
    hvd.init()  # (+)
    check_out(hvd, args.out, "numpy_loop")
    data, curves, rows = load_digits(), dict[str, Curve](), list[tuple[str, ...]]()
    images, labels = data.train_images.numpy()[hvd.rank() :: hvd.size()], data.train_labels.numpy()[hvd.rank() :: hvd.size()]
    for method in dict.fromkeys(("none", args.method)):
        w = make_weights()
        bound = [(name, torch.nn.Parameter(torch.from_numpy(array))) for name, array in w.items()]  # (+) of the same memory
        exchange = GradientExchange(bound, METHODS[method](args.ratio), MPITransport())  # (+)
        order, curve, megabytes, started = np.random.default_rng(1), list[float](), list[float](), time.perf_counter()
        for _ in range(args.epochs):
            for chosen in np.array_split(order.permutation(len(labels)), max(1, len(labels) // 32)):
                own = gradients(w, images[chosen], labels[chosen])
                means = exchange.reduce({name: torch.from_numpy(g) for name, g in own.items()})  # (+)
                for name, mean in means.items():
                    w[name] -= args.lr * mean.numpy()
            curve.append(accuracy(w, data))
            megabytes.append(exchange.compression.traffic.sent / 1e6)
        seconds, traffic = time.perf_counter() - started, exchange.compression.traffic
        curves[method] = Curve(list(range(1, args.epochs + 1)), curve, megabytes)
        rows.append((method, f"{curve[-1]:.3f}", f"{traffic.sent / 1e6:.2f}", times(traffic.ratio), f"{seconds:.1f}"))
    if hvd.rank() == 0:
        print(f"{table(('method', 'test accuracy', 'MB sent per worker', 'compression', 'seconds'), rows)}\n")
        (args.out / "numpy_loop.json").write_text(json.dumps({method: list(curve.y) for method, curve in curves.items()}, indent=1))
        title = f"Digits in NumPy, {hvd.size()} workers, learning rate {args.lr:g}"
        plot(curves, args.out / "numpy_loop.png", title=title, x="epoch", y="test accuracy", ylim=(0, 1.02))
        print(f"Plot: {args.out / 'numpy_loop.png'}")


if __name__ == "__main__":
    main()
