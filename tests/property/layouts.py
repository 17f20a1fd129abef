"""Examples for the properties of compressors: tables of segments, and values that are smooth, tied, sparse, or of very different magnitudes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from hvd_ecsgd.segments import Key, Segments

__all__ = ["buffers", "keys", "layouts", "named_zeros", "values"]

KINDS = ("gaussian", "ties", "integers", "sparse", "zeros", "magnitudes")

sizes = st.lists(st.integers(1, 70), min_size=1, max_size=6) | st.lists(st.just(1), min_size=1, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float64])
keys = st.builds(Key, seed=st.integers(0, 2**31), step=st.integers(0, 2**20), rank=st.sampled_from([None, 0, 3]), stage=st.sampled_from(["", "push"]))


def named_zeros(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    return [(f"layer{i}.weight", torch.zeros(n, dtype=dtype)) for i, n in enumerate(sizes)]


layouts = st.builds(lambda sizes, dtype: Segments.of(named_zeros(sizes, dtype)), sizes, dtypes)


def values(numel: int, kind: str, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values within half precision's range; "integers" and the sum of three of them are exact in bfloat16."""
    rng = np.random.default_rng(seed)
    v = {
        "gaussian": lambda: rng.standard_normal(numel),
        "ties": lambda: rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0], numel),
        "integers": lambda: rng.integers(-85, 86, numel).astype(float),
        "sparse": lambda: rng.standard_normal(numel) * (rng.random(numel) < 0.1),
        "zeros": lambda: np.zeros(numel),
        "magnitudes": lambda: rng.standard_normal(numel) * 10.0 ** rng.integers(-4, 4, numel),
    }[kind]()
    return torch.from_numpy(v).to(dtype)


@st.composite
def buffers(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> tuple[torch.Tensor, Segments]:
    """A flat buffer and a table over it: all of it, or the r-th pieces of its segments."""
    whole = draw(layouts)
    buffer = values(whole.numel, draw(st.sampled_from(kinds)), draw(st.integers(0, 2**32 - 1)), whole.dtype)
    n = draw(st.sampled_from([1, 1, 2, 3, 5]))
    return buffer, whole.piece(draw(st.integers(0, n - 1)), n)
