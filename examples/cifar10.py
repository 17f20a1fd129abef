"""CIFAR-10 with the settings of the DoubleSqueeze and the DEF paper, on the official `cifar-10-batches-py` files.

    mpirun -n 8 python examples/cifar10.py --data cifar-10-batches-py --config doublesqueeze-ternary
    horovodrun -np 8 python examples/cifar10.py --backend horovod --data cifar-10-batches-py --config def
    mpirun -n 2 python examples/cifar10.py --list

The files: https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, unpacked. They are pickles, which are read with a loader that builds nothing but
numbers, text, lists, dictionaries and numpy arrays. A configuration's batch size is that of one worker; the papers had 8 workers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hvd_ecsgd import Compression, double_squeeze_comparison
from hvd_ecsgd.compressors import Ternary, TopK

# -- the data ---------------------------------------------------------------------------------------------------------------------

FILES = {  # name → md5 of the official file
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1), torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


class DataError(ValueError):
    """A file that is not what the official archive holds; the message names it."""


class _OnlyArrays(pickle.Unpickler):
    """Builds what the official files hold, and nothing else: a pickle may otherwise run any code."""

    ALLOWED = frozenset(
        [(module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray") for name in ("_reconstruct", "scalar")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise DataError(f"it refers to {module}.{name}, which a CIFAR-10 file does not")
        return super().find_class(module, name)


def load_file(path: Path, check_md5: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 images [n, 3, 32, 32], int64 labels [n]) of one official file, a pickled dictionary with bytes as keys. Raises `DataError`."""
    expected = FILES[path.name]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Unpack cifar-10-python.tar.gz and give --data the folder cifar-10-batches-py.") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if check_md5 and found != expected:
        raise DataError(f"{path}: its md5 is {found}, the official file's {expected}. Download it again, or use --no-md5 for files of your own.")
    try:
        import io

        entry = _OnlyArrays(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error
    except Exception as error:
        raise DataError(f"{path}: not a pickle ({error}).") from error
    if not isinstance(entry, dict) or not {b"data", b"labels"} <= set(entry):
        keys = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{path}: expected a dictionary with keys b'data' and b'labels', got {keys}.")
    data, labels = entry[b"data"], entry[b"labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        came = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: b'data' must be uint8 of shape (n, 3072), got {came}.")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(isinstance(y, int) and 0 <= y <= 9 for y in labels):
        raise DataError(f"{path}: b'labels' must be {len(data)} integers from 0 to 9.")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.tensor(labels)


@dataclass
class Data:
    """uint8 images and labels."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_data(folder: Path, check_md5: bool = True) -> Data:
    parts = [load_file(folder / name, check_md5) for name in FILES]
    images, labels = torch.cat([p[0] for p in parts[:-1]]), torch.cat([p[1] for p in parts[:-1]])
    return Data(images, labels, *parts[-1])


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Padded by 4 and cropped at random, and mirrored half of the time: as in both papers."""
    n = len(images)
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (n, 1, 1), generator=generator), torch.randint(0, 9, (n, 1, 1), generator=generator)
    mirrored = torch.rand(n, 1, 1, generator=generator) < 0.5
    rows, columns = torch.arange(32).view(1, 32, 1) + top, torch.arange(32).view(1, 1, 32)
    columns = torch.where(mirrored, 31 - columns, columns) + left
    return padded[torch.arange(n).view(n, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


# -- the models -------------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Module:
    """For 32 × 32 images: a 3 × 3 first convolution and no pooling before the blocks. 11.2 million parameters at width 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for i, stride in enumerate((1, 2, 2, 2)):
        outputs = width * 2**i
        layers += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def vgg16_bn(width: int = 64) -> nn.Module:
    """VGG-16 with batch normalisation and one linear layer, as is usual for 32 × 32 images. 14.7 million parameters at width 64."""
    layers: list[nn.Module] = []
    inputs = 3
    for multiples in ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)):
        for m in multiples:
            layers += [nn.Conv2d(inputs, m * width, 3, padding=1), nn.BatchNorm2d(m * width), nn.ReLU()]
            inputs = m * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, 10))


# -- the papers' settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """`batch` is one worker's; `milestones` are shares of all epochs after which the learning rate is multiplied by .1."""

    model: Callable[[int], nn.Module]
    compression: Callable[[], Any]
    batch: int
    lr: float
    epochs: int
    milestones: tuple[float, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0


def _squeezed(name: str, compressor: Any) -> Config:
    # The authors' servers add the workers' gradients, so their lr of .01 with 8 workers is .08 of a mean. × .1 every 20 epochs of 100.
    return Config(resnet18, lambda: double_squeeze_comparison(compressor())[name], batch=256, lr=0.08, epochs=100, milestones=(0.2, 0.4, 0.6, 0.8))


def _detached(compression: Callable[[], Any], lr: float = 0.05) -> Config:
    return Config(vgg16_bn, compression, batch=16, lr=lr, epochs=200, milestones=(0.5, 0.75), momentum=0.9, weight_decay=5e-4)


EVERYTHING: dict[str, Any] = {"dense_below": 0, "dense_1d": False}  # the DEF authors compress all tensors
TERNARY, TOP_K = (lambda: Ternary("l2")), (lambda: TopK(1 / 0.027))
CONFIGS: dict[str, Config] = {
    "doublesqueeze-vanilla": _squeezed("vanilla", TERNARY),
    **{
        f"doublesqueeze-{kind}{suffix}": _squeezed(name, compressor)
        for kind, compressor in (("ternary", TERNARY), ("topk", TOP_K))
        for name, suffix in (
            ("double_squeeze", ""),
            ("mem_sgd", "-mem_sgd"),
            ("worker_only", "-worker_only"),
            ("uncompensated", "-uncompensated"),
        )
    },
    "def-dense": _detached(lambda: Compression.none()),
    "def": _detached(lambda: Compression.detached(64, 0.3, **EVERYTHING)),
    "def-ef": _detached(lambda: Compression.local_momentum(64, **EVERYTHING), lr=0.01),
    "def-saef": _detached(lambda: Compression.detached(64, 1.0, **EVERYTHING)),
}

# -- training ---------------------------------------------------------------------------------------------------------------------


def accuracy(model: nn.Module, data: Data, device: torch.device) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True):
            right += int((model(normalised(images.to(device))).argmax(1) == labels.to(device)).sum())
    model.train()
    return right / len(data.test_labels)


def average_statistics(hvd: ModuleType, model: nn.Module) -> None:
    """Workers saw different images, and with DEF at different parameters: evaluate with the mean of their batch-norm statistics."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(hvd.allreduce(buffer, name=f"statistics.{name}"))


def train(hvd: ModuleType, config: Config, data: Data, *, width: int = 64, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Train this rank's share of every epoch; `steps` ends it early. Rank 0 prints a line an epoch. What was measured."""
    device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(seed)
    model = config.model(width).to(device)
    compression = config.compression().bind(model)
    sgd = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters(), compression=compression)
    compression.attach(optimizer)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(m * config.epochs)) for m in config.milestones])

    per_epoch = len(data.train_labels) // (config.batch * hvd.size())
    if per_epoch == 0:
        raise SystemExit(f"{len(data.train_labels)} images are fewer than one batch of {config.batch} for each of {hvd.size()} workers: use --batch.")
    shuffle, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1_000_003 * (seed + 1) + hvd.rank())
    done, loss, curve = 0, math.nan, []
    started = time.perf_counter()
    for epoch in range(config.epochs):
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        for step in range(per_epoch):
            if steps is not None and done == steps:
                break
            mine = order[(step * hvd.size() + hvd.rank()) * config.batch :][: config.batch]
            images = normalised(augmented(data.train_images[mine], own)).to(device)
            optimizer.zero_grad()
            output = functional.cross_entropy(model(images), data.train_labels[mine].to(device))
            output.backward()
            optimizer.step()
            loss, done = float(output.detach()), done + 1
        schedule.step()
        with compression.at("averaged"):  # DEF and SAEF train at shifted parameters; others are unaffected
            average_statistics(hvd, model)
            curve.append(accuracy(model, data, device))
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1:3d}: loss {loss:.4f}, test accuracy {curve[-1]:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
        if steps is not None and done == steps:
            break
    with compression.at("averaged"):
        weights = torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()])
    return {
        "accuracy": curve[-1],
        "curve": curve,
        "steps": done,
        "megabytes_sent": compression.traffic.sent / 1e6,
        "seconds": time.perf_counter() - started,
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("cifar-10-batches-py"), help="folder of the official files")
    parser.add_argument("--config", choices=list(CONFIGS), default="def")
    parser.add_argument("--backend", choices=("mpi", "horovod"), default="mpi", help="mpi: mpi_backend, needs no Horovod")
    parser.add_argument("--list", action="store_true", help="print the configurations and stop")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None, help="of one worker")
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--width", type=int, default=64, help="channels of the first layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-md5", action="store_true", help="take files that are not the official ones")
    parser.add_argument("--out", type=Path, default=None, help="write the results to this JSON file")
    args = parser.parse_args()
    if args.list:
        for name, c in CONFIGS.items():
            print(f"{name:<34} {c.model.__name__:<9} batch {c.batch:<4} lr {c.lr:<5} epochs {c.epochs:<4} momentum {c.momentum} wd {c.weight_decay}")
        return
    config = CONFIGS[args.config]
    config = replace(config, **{k: getattr(args, k) for k in ("epochs", "batch", "lr") if getattr(args, k) is not None})
    hvd = importlib.import_module("mpi_backend" if args.backend == "mpi" else "horovod.torch")
    hvd.init()
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())
    else:
        torch.set_num_threads(1)
    try:
        data = load_data(args.data, not args.no_md5)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    result = train(hvd, config, data, width=args.width, steps=args.steps, seed=args.seed)
    if hvd.rank() == 0:
        print(
            f"{args.config}: test accuracy {result['accuracy']:.4f} after {result['steps']} steps, {result['megabytes_sent']:.2f} MB sent per "
            f"worker, {result['seconds']:.1f} s, weights {result['weights']}"
        )
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"config": args.config, "workers": hvd.size(), "seed": args.seed, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
