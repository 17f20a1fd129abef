"""What the examples share: backends and methods by name, where results go, and a table with a plot at the end."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hvd_ecsgd import Compression

BACKENDS = {"mpi": "mpi_backend", "horovod": "horovod.torch", "torch": "hvd_ecsgd.torch_backend"}
METHODS: dict[str, Callable[[float], Any]] = {
    "auto": lambda ratio: Compression.auto(),
    "none": lambda ratio: Compression.none(),
    "fp16": lambda ratio: Compression.fp16(error_feedback=True),
    "random_block_no_feedback": lambda ratio: Compression.random_block(ratio, error_feedback=False),
    "random_block": lambda ratio: Compression.random_block(ratio),
    "top_k": lambda ratio: Compression.top_k(ratio),
    "one_bit": lambda ratio: Compression.one_bit(),
    "power_sgd": lambda ratio: Compression.power_sgd(),
    "double_squeeze": lambda ratio: Compression.double_squeeze(),
    "local_momentum": lambda ratio: Compression.local_momentum(ratio),
    "detached": lambda ratio: Compression.detached(ratio),
}
IN_GRADIENTS = sorted(set(METHODS) - {"auto", "detached", "local_momentum"})
"""Those that leave the update to the script or its optimizer."""


def start(backend: str) -> ModuleType:
    """Horovod's module, or one that takes its place, initialized; one thread and, where there are some, one GPU for each rank."""
    hvd = importlib.import_module(BACKENDS[backend])
    hvd.init()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())
    return hvd


def positive(text: str) -> int:
    """For argparse: a whole number, at least 1."""
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {n}")
    return n


def unwritable(folder: Path, name: str) -> str:
    """Why results cannot be saved there as `name`.json and `name`.png; empty when they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").touch()
    except OSError as error:
        return f"results cannot be saved in '{folder}' ({error.strerror}); name another folder with --out."
    return ""


def check_out(hvd: ModuleType, folder: Path, name: str) -> None:
    """End on all ranks, before anything is trained, where rank 0 cannot save its results."""
    if problem := hvd.broadcast_object(unwritable(folder, name) if hvd.rank() == 0 else None):
        raise SystemExit(f"error: {problem}" if hvd.rank() == 0 else 1)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As text, under a line; the first column is aligned left."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in (columns, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def times(ratio: float) -> str:
    """A compression ratio in a table; NaN where nothing was sent."""
    return "–" if math.isnan(ratio) else f"{ratio:.1f}x"


@dataclass
class Curve:
    """What a method came to, at which points of the training, and what a worker had sent by then."""

    x: list[float]
    y: list[float]
    megabytes: list[float]


def plot(curves: Mapping[str, Curve], file: Path, *, title: str, x: str, y: str, **axes: Any) -> None:
    """Each method by the axis `x`, and by what it has sent. `axes`: of matplotlib's `set`, for both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_x, by_bytes) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for name, curve in curves.items():
        by_x.plot(curve.x, curve.y, marker=".", label=name)
        by_bytes.plot(curve.megabytes, curve.y, marker=".", label=name)
    by_x.set(xlabel=x, ylabel=y, **axes)
    scale = "log" if any(curve.megabytes[-1] for curve in curves.values()) else "linear"
    by_bytes.set(xlabel="MB sent per worker", ylabel=y, xscale=scale, **axes)
    by_x.xaxis.get_major_locator().set_params(integer=True)
    by_x.legend(fontsize=8)
    for each in (by_x, by_bytes):
        each.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)
