"""What kernels do for results larger than a cache, and what they remember from one step to the next: neither changes a bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd.compressors import QSGD, BlockTopK, Cast, Natural, RandomK, Sign, Ternary, TopK
from hvd_ecsgd.kernels import native
from hvd_ecsgd.segments import Key, Segments
from tests.unit.test_kernels import KEY, compiled, library, same, table, values, variants

LARGE = [
    Sign(),
    Sign("l1", 1000),
    Ternary(),
    QSGD(),
    QSGD(7, 100),
    QSGD(1, 16),
    Natural(),
    Cast(),
    BlockTopK(50),
    BlockTopK(50, 600),
    TopK(50),
    RandomK(50),
]
SIZES = [600_001, 3, 500_003]
"""More than 4 MiB of float32, which go past the caches."""


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return values("gaussian", sum(SIZES) + 1, torch.float32)


@compiled
@pytest.mark.parametrize("compressor", LARGE, ids=str)
def test_large_results_hold_what_is_added_to_zeros(compressor: Any, gaussian: torch.Tensor) -> None:
    """On every variant, wherever in memory a segment begins; and nothing outside of the table is touched."""
    segments = table(SIZES, torch.float32)
    payload = None
    for variant in variants():
        if payload is None:
            payload = compressor.extract_(gaussian[1:].clone(), segments, KEY)
        for begin in (0, 1, 6):  # in memory, of a vector
            room = torch.full((segments.numel + 40,), 7.0)
            start = (begin - room.data_ptr() // 4) % 16
            out, added = room[start : start + segments.numel], torch.zeros(segments.numel)
            compressor.assign_(out, payload, segments, KEY, 0.3)
            compressor.add_(added, payload, segments, KEY, 0.3)
            assert same(out, added), (variant, begin)
            assert torch.all(room[:start] == 7.0) and torch.all(room[start + segments.numel :] == 7.0)


@compiled
def test_what_the_last_step_has_chosen_misleads_nobody() -> None:
    """top_k looks at first where the step before tells it to: of magnitudes that rise, fall, are all alike, or zero, it chooses what the reference
    does."""
    segments, compressor = table([70_000, 5, 90_001], torch.float32), TopK(100)
    kinds = [
        "gaussian",
        "gaussian",
        "heavy-tailed",
        "denormal",
        "gaussian",
        "constant",
        "zeros",
        "ascending",
        "ties",
        "gaussian",
        "not finite",
        "gaussian",
    ]
    for i, kind in enumerate(kinds):
        v = values(kind, segments.numel, torch.float32, i) * (1.0, 1e-3, 1e3)[i % 3]
        with native.forced(None):
            expected = compressor.extract_(v.clone(), segments, KEY)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with native.forced(library):
                found = compressor.extract_(v.clone(), segments, KEY)
            torch.set_num_threads(1)
            assert torch.equal(found, expected), (i, kind, threads)


@compiled
def test_positions_of_a_step_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extraction and decoding share them; another step, ratio or table has its own (control)."""
    drawn: list[Segments] = []
    draw = native.Native.random_k
    monkeypatch.setattr(native.Native, "random_k", lambda self, keys, counts: drawn.append(self._segments) or draw(self, keys, counts))
    segments = table([500, 70], torch.float32)
    with native.forced(library):
        for compressor, key, table_, expected in (
            (RandomK(10), KEY, segments, 1), (RandomK(10), Key(5, 8, 1, size=4), segments, 2), (RandomK(7), KEY, segments, 3),
            (RandomK(10), KEY, table([500, 70], torch.float32), 4),
        ):  # fmt: skip
            v = values("gaussian", 570, torch.float32)
            whole = v.clone()
            payload = compressor.extract_(v, table_, key)
            compressor.add_(v, payload, table_, key)
            assert torch.equal(v, whole) and len(compressor.places(payload, table_, key).positions) == payload.numel()
            assert len(drawn) == expected
