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

__all__ = ["Bytes", "Digits", "Logistic", "TeacherStudent", "Text"]


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


class Transformer(torch.nn.Module):
    """Logits of the next code at every place of the windows: one block with two heads, each layer normalised before."""

    def __init__(self, codes: int, length: int, width: int) -> None:
        super().__init__()
        self.codes, self.places = torch.nn.Embedding(codes, width), torch.nn.Embedding(length, width)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.wide, self.narrow = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.logits = torch.nn.Linear(width, codes)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.codes(text) + self.places.weight
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.narrow(functional.gelu(self.wide(self.norms[1](x))))
        logits: torch.Tensor = self.logits(self.norms[2](x))
        return logits.transpose(1, 2)


class Bytes(Text):
    """The same text, every next character of windows of 16 by a small transformer. Each worker has modules of its own."""

    CONTEXT = 16

    def model(self, seed: int) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Transformer(self.CODES, self.CONTEXT, self.width)

    def _windows(self, text: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = text[ends.unsqueeze(1) + torch.arange(-self.CONTEXT, 1)]
        return rows[:, :-1], rows[:, 1:]

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, float]:
        """Of modules that nobody trained on, in nats a character."""
        ends = torch.arange(self.CONTEXT, len(self.held_out), max(1, len(self.held_out) // 500))
        return dict(zip(("loss", "accuracy"), _loss_and_accuracy(model, *self._windows(self.held_out, ends)), strict=True))


class Logistic:
    """Multinomial logistic regression (convex): 100 normal features whose scales differ by up to 10, 10 classes by a noisy linear rule; from zero."""

    FEATURES, CLASSES, TRAINING = 100, 10, 8000

    def __init__(self, batch: int = 16) -> None:
        g = torch.Generator().manual_seed(77)
        scales = torch.logspace(0, -1, self.FEATURES)[torch.randperm(self.FEATURES, generator=g)]
        x = torch.randn(self.TRAINING + 4000, self.FEATURES, generator=g) * scales
        rule = torch.randn(self.FEATURES, self.CLASSES, generator=g) / scales.unsqueeze(1) * 2 / self.FEATURES**0.5
        y = (x @ rule + 0.5 * torch.randn(len(x), self.CLASSES, generator=g)).argmax(1)
        self.train, self.test = (x[: self.TRAINING], y[: self.TRAINING]), (x[self.TRAINING :], y[self.TRAINING :])
        self.size = batch

    def model(self, seed: int) -> torch.nn.Module:
        model = torch.nn.Linear(self.FEATURES, self.CLASSES)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        return model

    def batch(self, rank: int, workers: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = self.train
        chosen = torch.randint(0, len(labels) // workers, (self.size,), generator=_generator(rank, step, seed)) * workers + rank
        return inputs[chosen], labels[chosen]

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, float]:
        return {"loss": _loss_and_accuracy(model, *self.train)[0], "accuracy": _loss_and_accuracy(model, *self.test)[1]}


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
