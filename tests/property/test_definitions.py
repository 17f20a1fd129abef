"""Block top-k, signs of blocks, ternary, QSGD and natural compression against their definitions, entry by entry."""

from __future__ import annotations

import math
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
)
from hvd_ecsgd.kernels import uniform
from hvd_ecsgd.segments import Key, Segments
from tests.property.operators import EVERY, checked, kinds, seeds, send, table, values


@checked
@given(size=st.integers(1, 90), block=st.integers(1, 40), kind=kinds | st.just("zeros"), seed=seeds)
def test_block_top_k_is_the_oracles(size: int, block: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    expected = np.zeros(size)
    for low in range(0, size, block):
        part = v.numpy()[low : low + block]
        chosen = low + np.argsort(-np.abs(part), kind="stable")[: max(1, part.size // 3)]
        expected[chosen] = v.numpy()[chosen]
    assert np.array_equal(send(BlockTopK(3, block), v, Key(0, 0))[1].numpy(), expected)


@pytest.mark.parametrize("scale", ["l1", "l2"])
@checked
@given(size=st.integers(1, 90), block=st.integers(1, 40), kind=kinds | st.just("zeros"), seed=seeds)
def test_sign_of_blocks_is_the_oracles(scale: Any, size: int, block: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    expected = np.empty(size)
    for low in range(0, size, block):
        part = v.numpy()[low : low + block]
        s = np.abs(part).mean() if scale == "l1" else np.linalg.norm(part) / math.sqrt(part.size)
        expected[low : low + block] = np.where(part < 0, -s, s)
    np.testing.assert_allclose(send(Sign(scale, block), v, Key(0, 0))[1].numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("scale", ["l1", "l2"])
@checked
@given(size=st.integers(1, 90), kind=kinds | st.just("zeros"), seed=seeds)
def test_ternary_is_the_oracles(scale: Any, size: int, kind: str, seed: int) -> None:
    """Zeros stay zero and are outside of the scale."""
    v = values(size, kind, seed).numpy()
    nnz = max(1, np.count_nonzero(v))
    s = np.abs(v).sum() / nnz if scale == "l1" else np.linalg.norm(v) / math.sqrt(nnz)
    np.testing.assert_allclose(send(Ternary(scale), torch.from_numpy(v), Key(0, 0))[1].numpy(), s * np.sign(v), rtol=1e-14)


@pytest.mark.parametrize("compressor", [QSGD(1, 16), QSGD(7, 16, "max"), QSGD(127), QSGD(100, 7)], ids=str)
@checked
@given(size=st.integers(1, 90), kind=kinds | st.just("zeros"), seed=seeds)
def test_qsgd_rounds_to_a_neighbouring_level(compressor: QSGD, size: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    decoded = send(compressor, v, Key(seed, 0))[1]
    for low in range(0, size, compressor.bucket):
        part, sent = v[low : low + compressor.bucket], decoded[low : low + compressor.bucket]
        norm = float(part.norm() if compressor.norm == "l2" else part.abs().max())
        if norm == 0:
            assert not sent.any()
            continue
        levels = sent.abs() / norm * compressor.levels
        assert (levels - levels.round()).abs().max() < 1e-9
        assert (levels - part.abs() / norm * compressor.levels).abs().max() < 1 + 1e-9
        assert levels.max() < compressor.levels + 0.5
        assert (sent * part >= 0).all()


@pytest.mark.parametrize("levels", [100, 127])
def test_qsgd_never_rounds_beyond_the_highest_level(levels: int) -> None:
    """Entries of the largest magnitude are exact, all four million; in float32 level + uniform draw is the next level now and then (control)."""
    v, key = torch.full((2**22,), -3.0), Key(0, 0)
    (segment,) = table(v.numel(), dtype=v.dtype)
    assert torch.equal(send(QSGD(levels, norm="max"), v, key)[1], v)
    draws = uniform(key.bits(segment, "levels"), v.numel(), v.dtype, v.device)
    assert int(draws.add(levels).floor().max()) == levels + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@checked
@given(size=st.integers(1, 90), kind=kinds | st.just("zeros"), seed=seeds)
def test_natural_rounds_to_a_neighbouring_power(dtype: torch.dtype, size: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed, dtype)
    decoded = send(Natural(), v, Key(seed, 0))[1]
    assert ((decoded == 0) == (v == 0)).all()
    there = v != 0
    low = 2.0 ** torch.floor(torch.log2(v[there].abs().double()))
    assert ((decoded[there].abs() == low) | (decoded[there].abs() == 2 * low)).all()
    assert (decoded * v >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_natural_at_the_ends_of_its_range(dtype: torch.dtype) -> None:
    """Powers of two are kept exactly; below 2⁻¹²⁶ it is 0 or 2⁻¹²⁶, unbiased; from 2¹²⁷ on what rounds to 2¹²⁸ is not finite and stays."""
    powers = torch.tensor([2.0**-126, 2.0**-10, -1.0, 2.0**127, 0.0, -0.0], dtype=dtype)
    assert torch.equal(send(Natural(), powers, Key(0, 0))[1], powers)
    tiny = torch.full((20_000,), 2.0**-128, dtype=dtype)
    sent = send(Natural(), tiny, Key(0, 0))[1].double()
    assert set(sent.tolist()) == {0.0, 2.0**-126}
    assert float((sent * 2.0**126).mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 20_000))
    large = torch.full((200,), 1.5 * 2.0**127, dtype=dtype)
    stays, sent, payload = send(Natural(), large, Key(0, 0))
    assert not Natural().finite(payload, table(200, dtype=dtype))
    assert ((stays == large) == sent.isnan()).all()
    assert 50 < int(sent.isnan().sum()) < 150
    assert math.isnan(Natural().delta(large))


def test_natural_out_of_float32s_range_in_float64() -> None:
    v = torch.tensor([1e-60, 1e60, 5e-324], dtype=torch.float64)
    stays, sent, _ = send(Natural(), v, Key(0, 0))
    assert sent[0] == sent[2] == 0
    assert sent[1].isnan()
    assert torch.equal(stays, v)
    assert Natural().delta(v[:1]) < 0, "below the range the relative variance is not bounded"


@pytest.mark.parametrize("compressor", [QSGD(7), Natural()], ids=str)
def test_private_randomness_differs_between_ranks_and_names(compressor: Any) -> None:
    v = values(64, "gaussian", 0)
    assert not compressor.shared_key
    reference = send(compressor, v, Key(0, 0, 0))[1]
    assert torch.equal(reference, send(compressor, v, Key(0, 0, 0))[1])
    assert not torch.equal(reference, send(compressor, v, Key(0, 0, 1))[1])
    assert not torch.equal(reference, send(compressor, v, Key(0, 1, 0))[1])
    two = torch.cat([v, v])
    halves = send(compressor, two, Key(0, 0, 0), table(64, 64))[1]
    assert not torch.equal(halves[:64], halves[64:])


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_drawing_leaves_the_global_generators_alone(compressor: Any) -> None:
    states = torch.get_rng_state(), repr(np.random.get_state())
    v = values(700, "gaussian", 0, torch.float32)
    send(compressor, v, Key(0, 0))
    compressor.delta(v)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == repr(np.random.get_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_a_gpu_does_the_same(compressor: Any) -> None:
    """Payloads of compressors without private randomness are those of the CPU (scales to rounding); all conserve."""
    v = values(3000, "gaussian", 0, torch.float32)
    segments = Segments.of([("a", v[:1111].cuda()), ("b", v[1111:].cuda())])
    stays, sent, payload = send(compressor, v.cuda(), Key(0, 0), segments)
    assert payload.is_cuda
    assert compressor.finite(payload, segments)
    torch.testing.assert_close(stays + sent, v.cuda(), rtol=1e-5, atol=1e-5)
    if not isinstance(compressor, (QSGD, Natural)):
        reference = send(compressor, v, Key(0, 0), Segments.of([("a", v[:1111]), ("b", v[1111:])]))[1]
        torch.testing.assert_close(sent.cpu(), reference, rtol=1e-5, atol=1e-5)
