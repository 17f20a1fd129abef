"""Payloads have the bits that they are said to have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_ecsgd.compressors import (
    QSGD,
    BlockTopK,
    Natural,
    Sign,
    Ternary,
    TopK,
)
from hvd_ecsgd.kernels import pack_codes, top_k_indices, top_k_rows, unpack_codes
from hvd_ecsgd.segments import Key
from tests.property.operators import DEVICES, checked, kinds, seeds, send, table, values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 4])
@checked
@given(size=st.integers(0, 100), seed=seeds)
def test_codes_are_packed_for_real(device: str, bits: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint8)
    packed = pack_codes(torch.from_numpy(codes).to(device), bits)
    oracle = np.zeros(-(-size * bits // 8), dtype=np.uint8)
    for i, code in enumerate(codes):
        oracle[i * bits // 8] |= code << i * bits % 8
    assert packed.dtype == torch.uint8
    assert packed.cpu().numpy().tolist() == oracle.tolist()
    assert torch.equal(unpack_codes(packed, size, bits).cpu(), torch.from_numpy(codes))


SIZES = [
    (Sign(), 4 + 125),
    (Sign("l1", 512), 2 * 4 + 125),
    (Ternary(), 4 + 250),
    (QSGD(1), 2 * 4 + 250),
    (QSGD(2), 2 * 4 + 500),
    (QSGD(7), 2 * 4 + 500),
    (QSGD(8), 2 * 4 + 1000),
    (QSGD(127, 100), 10 * 4 + 1000),
    (Natural(), 1000 + 125),
    (BlockTopK(), (5 + 4) * 6),
    (TopK(), 10 * 8),
]


@pytest.mark.parametrize(("compressor", "n_bytes"), SIZES, ids=str)
def test_packed_sizes(compressor: Any, n_bytes: int) -> None:
    """Of 1000 float32 entries, then rounded up to 8."""
    v = values(1000, "gaussian", 0, torch.float32)
    payload = send(compressor, v, Key(0, 0))[2]
    assert payload.nbytes == compressor.payload_size(table(1000, dtype=torch.float32)) == -(-n_bytes // 8) * 8


@checked
@given(n=st.integers(1, 12), width=st.integers(1, 20), share=st.floats(0, 1), kind=kinds | st.just("zeros"), seed=seeds)
def test_top_k_of_rows_is_top_k_of_each_row(n: int, width: int, share: float, kind: str, seed: int) -> None:
    m, k = values(n * width, kind, seed).view(n, width), max(1, round(share * width))
    assert torch.equal(top_k_rows(m, k), torch.stack([top_k_indices(row, k) for row in m]))
