"""What tests of single compressors share: operators by kind, values, and one way from the buffer to what is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from hvd_ecsgd.compressors import (
    QSGD,
    BlockTopK,
    Cast,
    GlobalRandomBlock,
    Identity,
    Natural,
    RandomBlock,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
)
from hvd_ecsgd.segments import Key, Segments

checked = settings(deadline=None, max_examples=40, derandomize=True)


seeds = st.integers(0, 2**31)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


SELECTING = [RandomK(3), RandomK(1), RandomK(1.3), GlobalRandomBlock(3, 7), Threshold(4), Threshold(1), BlockTopK(4, 16), BlockTopK(2, 3)]


ROUNDING = [
    Threshold(4, two_bits=True),
    RandomK(3, unbiased=True),
    Cast(torch.bfloat16),
    Sign("l1", 8),
    Sign("l2", 5),
    Ternary("l1"),
    Ternary("l2"),
    QSGD(),
    QSGD(1, 16),
    QSGD(7, 16, "max"),
    QSGD(5, 7),
    Natural(),
]


UNBIASED = [Identity(), RandomK(3, unbiased=True), QSGD(1, 16), QSGD(3, 16, "max"), QSGD(7, 8), QSGD(127), Natural()]


EVERY = [*SELECTING, *ROUNDING, Identity(), RandomBlock(3), TopK(4), Cast(), Sign("l1"), Sign("l2")]


def table(*sizes: int, dtype: torch.dtype = torch.float64) -> Segments:
    return Segments.of([(f"layer{i}.weight", torch.empty(n, dtype=dtype)) for i, n in enumerate(sizes)])


def values(numel: int, kind: str, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    v = {
        "gaussian": lambda: rng.standard_normal(numel),
        "ties": lambda: rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0], numel),
        "sparse": lambda: rng.standard_normal(numel) * (rng.random(numel) < 0.1),
        "zeros": lambda: np.zeros(numel),
        "spike": lambda: np.where(np.arange(numel) == numel // 2, 1.0, 1e-3),
        "equal": lambda: np.full(numel, -0.75),
        "magnitudes": lambda: rng.standard_normal(numel) * 10.0 ** rng.integers(-4, 4, numel),
    }[kind]()
    return torch.from_numpy(v).to(dtype)


kinds = st.sampled_from(["gaussian", "ties", "sparse", "spike", "equal", "magnitudes"])


def send(compressor: Any, v: torch.Tensor, key: Key, segments: Segments | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what stays, what is decoded, payload); `v` is left alone."""
    segments = table(v.numel(), dtype=v.dtype) if segments is None else segments
    buffer, out = v.clone(), torch.zeros_like(v)
    payload = compressor.extract_(buffer, segments, key)
    compressor.add_(out, payload, segments, key)
    return buffer, out, payload


def keys(n: int, seed: int = 0) -> Iterator[Key]:
    return (Key(seed, step, 0) for step in range(n))
