"""What is sent and what stays add up, also where an entry is an inf or NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_ecsgd.compressors import (
    QSGD,
    GlobalRandomBlock,
    Natural,
    RandomK,
    Sign,
    Ternary,
)
from hvd_ecsgd.segments import Key
from tests.property.operators import EVERY, ROUNDING, SELECTING, checked, kinds, seeds, send, table, values

# -- conservation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", [*SELECTING, *ROUNDING], ids=str)
@checked
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    n=st.sampled_from([1, 2, 3, 5]),
    kind=kinds | st.just("zeros"),
    seed=seeds,
)
def test_what_is_sent_and_what_stays_add_up(compressor: Any, sizes: list[int], dtype: torch.dtype, n: int, kind: str, seed: int) -> None:
    """Piece by piece over one buffer, with empty segments: exactly for selecting compressors, to rounding for the others; the rest is untouched."""
    whole, before = table(*sizes, dtype=dtype), values(sum(sizes), kind, seed, dtype)
    key = Key(seed, 3, 1, "push")
    buffer, decoded = before.clone(), torch.zeros_like(before)
    for r in range(n):
        piece = whole.piece(r, n)
        outside = torch.ones_like(before, dtype=torch.bool)
        for view in piece.views(outside):
            view.fill_(False)
        untouched = buffer[outside].clone(), decoded[outside].clone()
        payload = compressor.extract_(buffer, piece, key)
        compressor.add_(decoded, payload, piece, key)
        assert torch.equal(buffer[outside], untouched[0])
        assert torch.equal(decoded[outside], untouched[1])
        assert payload.dim() == 1
        assert payload.is_contiguous()
        assert payload.dtype == compressor.payload_dtype(dtype)
        assert payload.dtype != torch.uint8 or payload.numel() % 8 == 0
        assert compressor.payload_size(piece) in (None, payload.numel())
        assert compressor.finite(payload, piece)
        compact = compressor.extract_(torch.cat(piece.views(before)), piece.compact, key)
        assert torch.equal(compact, payload), "a piece and its compact copy have one payload"
    if compressor in SELECTING:
        assert torch.equal(buffer + decoded, before)
        assert not (buffer * decoded).any()
    elif before.numel():
        scale = max(before.abs().max().item(), decoded.abs().max().item())
        assert (buffer + decoded - before).abs().max().item() <= 2 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("compressor", [RandomK(3), GlobalRandomBlock(3, 7)], ids=str)
def test_the_conservation_check_notices_another_key(compressor: Any) -> None:
    """Control: decoded elsewhere than it was taken from."""
    v, segments = values(60, "gaussian", 0), table(60)
    buffer, out = v.clone(), torch.zeros_like(v)
    compressor.add_(out, compressor.extract_(buffer, segments, Key(0, 0)), segments, Key(0, 1))
    assert not torch.equal(buffer + out, v)


def test_the_conservation_check_notices_other_randomness() -> None:
    """Control: a residual that belongs to another draw of a stochastic compressor."""
    v = values(60, "gaussian", 0)
    for compressor in (QSGD(7), Natural()):
        stays, _, _ = send(compressor, v, Key(0, 0, 0))
        _, decoded, _ = send(compressor, v, Key(0, 1, 0))
        assert (stays + decoded - v).abs().max() > 1e-3


# -- inf and NaN -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_poisoned_payload_is_heard_in_every_segment(compressor: Any, dtype: torch.dtype) -> None:
    segments = table(5, 0, 70, 1, dtype=dtype)
    out = torch.zeros(76, dtype=dtype)
    for step in range(10):
        payload = compressor.extract_(torch.full((76,), math.nan, dtype=dtype), segments, Key(0, step))
        assert not compressor.finite(payload, segments)
        compressor.add_(out.zero_(), payload, segments, Key(0, step))
        assert all(view.isnan().any() for view in segments.views(out) if view.numel())


@pytest.mark.parametrize("compressor", [c for c in EVERY if not c.shared_key], ids=str)
@checked
@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]), size=st.integers(1, 600), where=st.floats(0, 1, exclude_max=True), seed=seeds)
def test_one_bad_entry_is_heard(compressor: Any, bad: float, size: int, where: float, seed: int) -> None:
    for dtype in (torch.float32, torch.float64):
        v = values(size, "gaussian", seed, dtype)
        v[int(where * size)] = bad
        _, decoded, payload = send(compressor, v, Key(seed, 0))
        assert not compressor.finite(payload, table(size, dtype=dtype))
        assert not decoded.isfinite().all()


@pytest.mark.parametrize("compressor", [Sign("l1", 8), Sign("l2"), Ternary(), QSGD(), QSGD(1, norm="max")], ids=str)
def test_what_has_no_finite_scale_stays_whole(compressor: Any) -> None:
    """Finite values whose scale overflows: sent as not finite, and still in the buffer."""
    v = torch.full((8,), 3e38)
    if isinstance(compressor, QSGD) and compressor.norm == "max":
        v[3] = math.inf
    stays, _, payload = send(compressor, v, Key(0, 0))
    assert not compressor.finite(payload, table(8, dtype=v.dtype))
    assert torch.equal(stays, v)
