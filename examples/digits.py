"""Train on scikit-learn's bundled digits with compressed gradients: the few lines that differ from a plain Horovod script are marked with (+).

    mpirun -n 2 python examples/digits.py --method detached --ratio 64
    horovodrun --gloo -np 2 python examples/digits.py --backend horovod --method double_squeeze
    torchrun --nproc-per-node 2 examples/digits.py --backend torch --method double_squeeze
    mpirun -n 2 python examples/digits.py --checkpoint folder        # saves after every epoch, and goes on from there when it is started again

All backends give the same weights (of two processes or more: with one, Horovod does not compress), to float32 rounding.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from common import BACKENDS, METHODS, positive, start

from hvd_ecsgd import load_checkpoint, save_checkpoint, telemetry  # (+)


@dataclass
class Data:
    """Images as rows of 64 floats in [0, 1], labels 0…9."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass
class Result:
    """What a run measured, the same on every rank but for the byte counters of this one."""

    accuracy: float
    seconds: float
    megabytes_sent: float
    ratio: float
    curve: list[float] = field(default_factory=list)
    """Test accuracy after each epoch."""
    weights_hash: str = ""


def load_digits() -> Data:
    """1 797 images, 1 437 of them for training, split the same way everywhere."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[order])
    cut = int(0.8 * len(labels))
    return Data(images[:cut], labels[:cut], images[cut:], labels[cut:])


def make_model(width: int = 512) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    )  # fmt: skip


def accuracy(model: torch.nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


def train(
    hvd: ModuleType,
    method: str,
    data: Data,
    *,
    ratio: float = 64.0,
    epochs: int = 10,
    lr: float = 0.05,
    batch: int = 16,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    checkpoint: Path | None = None,
    log: Path | None = None,
) -> Result:
    """Train on this rank's share of the data; `hvd` is horovod.torch, mpi_backend or torch_backend. `tick` is called after every step.

    With `checkpoint`, a directory that all ranks share, training is saved there after every epoch, and what is saved there is gone on from.
    With `log`, rank 0 writes what compression does in each step to that file, for `hvd-ecsgd report`.
    """
    torch.manual_seed(seed)
    model = make_model()
    compression = METHODS[method](ratio).bind(model)  # (+)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4),
        named_parameters=model.named_parameters(),
        compression=compression,  # (+)
    )
    compression.attach(optimizer)  # (+) follows the learning-rate schedule
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    logger = telemetry.Logger(compression, log, norms_every=10) if log is not None else None  # (+)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs // 2), max(2, epochs * 3 // 4)])

    shuffle = torch.Generator().manual_seed(seed)
    steps = len(data.train_labels) // (batch * hvd.size())
    curve: list[float] = []
    begin = 0
    if checkpoint is not None and (checkpoint / "manifest.json").exists():
        saved = load_checkpoint(checkpoint, model, optimizer, compression).extras
        begin, curve = saved["epochs"], saved["curve"]
        schedule.load_state_dict(saved["schedule"])
        shuffle.set_state(saved["shuffle"])
        if hvd.rank() == 0:
            print(f"goes on after epoch {begin} of {epochs}, from {checkpoint}", flush=True)
    started = time.perf_counter()
    for epoch in range(begin, epochs):
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        for step in range(steps):
            first = (step * hvd.size() + hvd.rank()) * batch
            mine = order[first : first + batch]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data.train_images[mine]), data.train_labels[mine]).backward()
            optimizer.step()
            tick()
        schedule.step()
        with compression.at("averaged"):  # (+) DEF and SAEF train at shifted parameters; others are unaffected
            curve.append(accuracy(model, data))
        if checkpoint is not None:
            extras = {"epochs": epoch + 1, "curve": curve, "schedule": schedule.state_dict(), "shuffle": shuffle.get_state()}
            save_checkpoint(checkpoint, model, optimizer, compression, extras=extras)
            if hvd.rank() == 0:
                print(f"epoch {epoch + 1} of {epochs} saved: test accuracy {curve[-1]:.3f}", flush=True)
    seconds = time.perf_counter() - started
    if logger is not None:
        logger.close()
    with compression.at("averaged"):
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if compression.tuner is not None and hvd.rank() == 0:
        print(*(f"{method} chose {decision}" for decision in compression.tuner.decisions), sep="\n", flush=True)
    traffic = compression.traffic
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
    return Result(curve[-1], seconds, traffic.sent / 1e6, traffic.ratio if traffic.sent else math.nan, curve, digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="mpi", help="mpi: mpi_backend, needs no Horovod; torch: under torchrun")
    parser.add_argument("--method", choices=sorted(METHODS), default="detached")
    parser.add_argument("--ratio", type=float, default=64.0, help="elements in ÷ elements sent, for methods that have a ratio")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--checkpoint", type=Path, help="a directory that all ranks share: save there after every epoch, and go on from there")
    parser.add_argument(
        "--log", type=Path, help="a file, such as run.jsonl: write what compression does in each step, for hvd-ecsgd report and watch"
    )
    args = parser.parse_args()
    hvd = start(args.backend)
    result = train(hvd, args.method, load_digits(), ratio=args.ratio, epochs=args.epochs, lr=args.lr, checkpoint=args.checkpoint, log=args.log)
    if hvd.rank() == 0:
        print(
            f"{args.backend} {args.method}: test accuracy {result.accuracy:.3f}, {result.megabytes_sent:.2f} MB sent per worker, "
            f"compression {result.ratio:.1f}x, {result.seconds:.1f} s, weights {result.weights_hash}"
        )


if __name__ == "__main__":
    main()
