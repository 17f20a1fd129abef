"""Train a small transformer on the bytes of Python's own library, with compressed gradients. Ends with a table and a plot of the loss by step.

    mpirun -n 2 python examples/bytes_lm.py --method none detached double_squeeze
    horovodrun --gloo -np 2 python examples/bytes_lm.py --backend horovod --method power_sgd
    torchrun --nproc-per-node 2 examples/bytes_lm.py --backend torch --method top_k --ratio 100

The text is there wherever Python is, so nothing is downloaded: what the standard library's .py files say, a tenth of them held out. All backends give
the same losses (of two processes or more: with one, Horovod does not compress), to float32 rounding. Lines that differ from a plain Horovod script
are marked with (+).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from common import BACKENDS, METHODS, Curve, check_out, plot, positive, start, table, times
from torch import nn
from torch.nn import functional

LENGTH = 64
"""Bytes that the model sees at most."""


@dataclass
class Text:
    """Bytes of files, one after the other, uint8."""

    train: torch.Tensor
    held_out: torch.Tensor


def load_text() -> Text:
    """Of the standard library's sources (about 8 MB), in the order of their names. Which files are held out depends on their names alone."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"} & set(name.split("/")):
            parts[hashlib.sha256(name.encode()).digest()[0] % 10 == 0].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return Text(train, held_out)


def windows(text: torch.Tensor, begins: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`length` bytes from each of `begins`, and the bytes that follow each of them: int64, one row a window."""
    rows = text[begins[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def draw(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Where windows begin, at random."""
    return torch.randint(len(text) - length, (count,), generator=generator)


def spread(text: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Where windows begin that lie evenly in the text."""
    return torch.arange(count) * ((len(text) - length - 1) // max(1, count - 1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Logits of the next byte, (windows, length, 256), from bytes, (windows, length)."""

    def __init__(self, width: int = 192, layers: int = 2, heads: int = 4, length: int = LENGTH) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last, self.logits = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        return self.logits(self.last(self.blocks(x)))


def loss_of(model: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy, in nats a byte."""
    text, following = pair
    return functional.cross_entropy(model(text).flatten(0, 1), following.flatten())


@dataclass
class Result:
    """The same on every rank but for the bytes of this one."""

    seconds: float = 0.0
    ratio: float = math.nan
    steps: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    """Sent after those steps."""
    losses: list[float] = field(default_factory=list)
    """Of what is held out, in nats a byte, then."""
    weights_hash: str = ""


def train(hvd: ModuleType, method: str, text: Text, args: argparse.Namespace) -> Result:
    """From the same start for every method, on windows that every rank draws of its own."""
    torch.manual_seed(0)
    model = Transformer()
    compression = METHODS[method](args.ratio).bind(model)  # (+)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4),
        named_parameters=model.named_parameters(),
        compression=compression,  # (+)
    )
    compression.attach(optimizer)  # (+) follows the learning-rate schedule
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, args.steps // 2), max(2, args.steps * 3 // 4)])
    drawing, tested = torch.Generator().manual_seed(hvd.rank()), windows(text.held_out, spread(text.held_out, 64, LENGTH), LENGTH)
    result, started = Result(), time.perf_counter()
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss_of(model, windows(text.train, draw(text.train, args.batch, LENGTH, drawing), LENGTH)).backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 20) == 0 or step == args.steps:
            with compression.at("averaged"), torch.no_grad():  # (+) DEF and SAEF train at shifted parameters; others are unaffected
                result.steps.append(step)
                result.megabytes.append(compression.traffic.sent / 1e6)
                result.losses.append(float(loss_of(model, tested)))
    result.seconds = time.perf_counter() - started
    with compression.at("averaged"):
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    result.weights_hash = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
    if compression.tuner is not None and hvd.rank() == 0:
        print(*(f"{method} chose {decision}" for decision in compression.tuner.decisions), sep="\n", flush=True)
    result.ratio = compression.traffic.ratio if compression.traffic.sent else math.nan
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="mpi", help="mpi: mpi_backend, needs no Horovod; torch: under torchrun")
    parser.add_argument("--method", choices=sorted(METHODS), nargs="+", default=["none", "power_sgd", "detached"], help="one after the other")
    parser.add_argument("--ratio", type=float, default=64.0, help="elements in ÷ elements sent, for methods that have a ratio")
    parser.add_argument("--steps", type=positive, default=240)
    parser.add_argument("--batch", type=positive, default=8, help=f"windows of {LENGTH} bytes for each process in a step")
    parser.add_argument("--lr", type=float, default=0.1, help="lowered to a tenth after half of the steps, and again after three quarters")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for bytes_lm.png and bytes_lm.json")
    args = parser.parse_args()
    hvd = start(args.backend)
    check_out(hvd, args.out, "bytes_lm")
    text, results = load_text(), dict[str, Result]()
    if hvd.rank() == 0:
        print(f"{len(text.train) / 1e6:.1f} MB of text, {len(text.held_out) / 1e6:.1f} MB held out", flush=True)
    for method in args.method:
        results[method] = train(hvd, method, text, args)
        if hvd.rank() == 0:
            print(f"{method}: {results[method].losses[-1]:.3f} nats a byte after {results[method].seconds:.0f} s", flush=True)
    if hvd.rank() == 0:
        columns = ("method", "loss, nats a byte", "MB sent per worker", "compression", "seconds", "weights")
        rows = [(m, f"{r.losses[-1]:.3f}", f"{r.megabytes[-1]:.2f}", times(r.ratio), f"{r.seconds:.1f}", r.weights_hash) for m, r in results.items()]
        print(f"\n{table(columns, rows)}\n")
        (args.out / "bytes_lm.json").write_text(json.dumps({method: asdict(r) for method, r in results.items()}, indent=1))
        curves = {method: Curve(r.steps, r.losses, r.megabytes) for method, r in results.items()}
        title = f"Bytes of Python's library, {hvd.size()} workers, SGD with momentum 0.9, learning rate {args.lr:g}"
        plot(curves, args.out / "bytes_lm.png", title=title, x="step", y="loss of held-out bytes, nats a byte")
        print(f"Plot: {args.out / 'bytes_lm.png'}")


if __name__ == "__main__":
    main()
