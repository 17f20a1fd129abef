"""What the reproductions train on: real images, real text, and the synthetic teacher–student task."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from .report import need

__all__ = ["Digits", "TeacherStudent", "Text"]


def _initialised(model: torch.nn.Sequential, seed: int) -> torch.nn.Sequential:
    """torch's default initialisation of linear layers (and N(0, 1) of embeddings), drawn from a generator of its own: workers are threads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                for p in (layer.weight, layer.bias):
                    p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) / layer.in_features**0.5)
            elif isinstance(layer, torch.nn.Embedding):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    return model


def _generator(rank: int, step: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 100_003 + step) * 1009 + rank)


def _loss_and_accuracy(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    output = model(inputs)
    return float(functional.cross_entropy(output, labels)), float((output.argmax(1) == labels).float().mean())


class Digits:
    """scikit-learn's bundled 8 × 8 images: 1 437 for training, 360 for testing; a network 64-`width`-10. Each worker draws from its own eighth."""

    def __init__(self, width: int = 256, batch: int = 16) -> None:
        data = need("sklearn.datasets").load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        images = torch.tensor(data.data[order] / 16.0, dtype=torch.float32)
        labels = torch.tensor(data.target[order])
        self.train, self.test = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])
        self.width, self.size = width, batch

    def model(self, seed: int) -> torch.nn.Module:
        return _initialised(torch.nn.Sequential(torch.nn.Linear(64, self.width), torch.nn.ReLU(), torch.nn.Linear(self.width, 10)), seed)

    def batch(self, rank: int, workers: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.train
        chosen = torch.randint(0, len(labels) // workers, (self.size,), generator=_generator(rank, step, seed)) * workers + rank
        return images[chosen], labels[chosen]

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, float]:
        return {"loss": _loss_and_accuracy(model, *self.train)[0], "accuracy": _loss_and_accuracy(model, *self.test)[1]}


@cache
def _library_text(n_bytes: int) -> tuple[torch.Tensor, ...]:
    """Python's own standard library: 8 shards of different modules for training, and other modules for testing, as codes 0…96."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in folder.glob("*.py") if f.stat().st_size > 2000)
    shards = []
    for part in range(9):
        text = b"".join(f.read_bytes() for f in files[part::9])[:n_bytes]
        codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        shards.append(torch.where((codes >= 32) & (codes < 127), codes - 32, torch.where(codes == 10, 95, 96)))
    return tuple(shards)


class Text:
    """The next character of standard-library sources from the 8 before it: embedding 97 × 16, network 128-`width`-97. Each worker has modules of its
    own, so their data differ."""

    CONTEXT, CODES = 8, 97

    def __init__(self, width: int = 128, batch: int = 32, n_bytes: int = 100_000) -> None:
        *self.shards, self.held_out = _library_text(n_bytes)
        self.width, self.size = width, batch

    def model(self, seed: int) -> torch.nn.Module:
        layers = (
            torch.nn.Embedding(self.CODES, 16),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * self.CONTEXT, self.width),
            torch.nn.ReLU(),
            torch.nn.Linear(self.width, self.CODES),
        )
        return _initialised(torch.nn.Sequential(*layers), seed)

    def _windows(self, text: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text[ends.unsqueeze(1) + torch.arange(-self.CONTEXT, 0)], text[ends]

    def batch(self, rank: int, workers: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        text = self.shards[rank % len(self.shards)]
        return self._windows(text, torch.randint(self.CONTEXT, len(text), (self.size,), generator=_generator(rank, step, seed)))

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, float]:
        """Bits per character of modules that nobody trained on."""
        ends = torch.arange(self.CONTEXT, len(self.held_out), max(1, len(self.held_out) // 4000))
        return {"bits": _loss_and_accuracy(model, *self._windows(self.held_out, ends))[0] / np.log(2)}


class TeacherStudent:
    """Standard normal inputs of 40 numbers, labelled by the argmax of a random network 40-48-10; the student is 40-128-128-10.

    `noise`: the share of training labels that are replaced by a random one.
    """

    def __init__(self, seed: int, samples: int = 16384, batch: int = 16, noise: float = 0.0) -> None:
        g = torch.Generator().manual_seed(seed)
        w1, w2 = torch.randn(40, 48, generator=g) * 1.5 / 40**0.5, torch.randn(48, 10, generator=g) * 3 / 48**0.5
        x = torch.randn(samples + 6000, 40, generator=g)
        y = (torch.relu(x @ w1) @ w2).argmax(1)
        self.test = x[samples:], y[samples:].clone()
        wrong = torch.rand(samples, generator=g) < noise
        y[:samples][wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=g)
        self.train, self.size = (x[:samples], y[:samples]), batch

    def model(self, seed: int) -> torch.nn.Module:
        layers = (torch.nn.Linear(40, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        return _initialised(torch.nn.Sequential(*layers), 1000 + seed)

    def batch(self, rank: int, workers: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An epoch is one permutation, cut among the workers."""
        inputs, labels = self.train
        per_epoch = len(labels) // (self.size * workers)
        order = _permutation(len(labels), seed, step // per_epoch)
        first = (step % per_epoch * workers + rank) * self.size
        chosen = order[first : first + self.size]
        return inputs[chosen], labels[chosen]

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, float]:
        return {"loss": _loss_and_accuracy(model, *self.train)[0], "accuracy": _loss_and_accuracy(model, *self.test)[1]}


@cache
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
