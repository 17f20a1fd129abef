"""Gradient dropping: the share that is sent, the threshold, and values of two bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_ecsgd.compressors import (
    Threshold,
)
from hvd_ecsgd.segments import Key
from tests.property.operators import checked, keys, kinds, seeds, send, table, values


def test_threshold_sends_about_the_share_asked_for() -> None:
    """Within ±5 standard deviations of a quantile from 1000 samples (j = 10 lie above it); the control is a share of twice that."""
    v = values(100_000, "gaussian", 3, torch.float32)
    sent = [int(send(Threshold(100, 0.01), v, key)[1].count_nonzero()) for key in keys(20)]
    assert 100_000 > 2 * 1600  # really sampled
    assert abs(np.mean(sent) - 1000) < 5 * 1000 / math.sqrt(16 * 20)
    assert abs(np.mean(sent) - 2000) > 5 * 1000 / math.sqrt(16 * 20)
    assert len(set(sent)) > 1, "control: the sample differs between keys"


@checked
@given(size=st.integers(1, 90), kind=kinds | st.just("zeros"), seed=seeds)
def test_threshold_of_a_small_segment_is_the_exact_quantile(size: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    t = np.sort(np.abs(v.numpy()))[size - max(1, size // 4)]
    expected = np.where((np.abs(v.numpy()) >= t) & (v.numpy() != 0), v.numpy(), 0.0)
    assert np.array_equal(send(Threshold(4), v, Key(0, 0))[1].numpy(), expected)


@pytest.mark.parametrize(("ratio", "sample"), [(4.0, 0.0502), (10.0, 0.1), (3.3, 0.2), (1.5, 0.01)])
def test_threshold_of_a_large_segment_is_that_of_its_sample(ratio: float, sample: float) -> None:
    """Of max(sample·d, 16·ratio) magnitudes drawn with replacement the ⌊m/ratio⌋-th largest. The next one (control) is another threshold."""
    v, d = values(5000, "gaussian", 4), 5000
    m = max(math.ceil(sample * d), math.ceil(16 * ratio))
    assert 2 * m < d
    others = 0
    for key in keys(20):
        drawn = (key.words(table(d).table[0], "sample").random_raw(m).astype(object) * d) >> 64
        magnitudes = np.sort(np.abs(v.numpy())[drawn.astype(int)])[::-1]
        sent = send(Threshold(ratio, sample), v, key)[1].numpy()
        assert np.array_equal(sent, np.where(np.abs(v.numpy()) >= magnitudes[int(m / ratio) - 1], v.numpy(), 0.0))
        others += not np.array_equal(sent, np.where(np.abs(v.numpy()) >= magnitudes[int(m / ratio)], v.numpy(), 0.0))
    assert others > 10


def test_threshold_of_mostly_zeros_sends_no_zeros() -> None:
    v = torch.zeros(50_000)
    v[::1000] = 1.0
    segments = table(50_000, dtype=torch.float32)
    _, decoded, payload = send(Threshold(100), v, Key(0, 0))
    assert torch.equal(decoded, v)
    assert payload.nbytes == 8 + 50 * 8
    assert Threshold(100).payload_size(segments) is None
    assert send(Threshold(100), torch.zeros(50_000), Key(0, 0))[2].nbytes == 8


def test_threshold_sends_at_least_one_entry() -> None:
    for key in keys(50):
        assert send(Threshold(1e6), values(5000, "magnitudes", 1), key)[1].any()


@checked
@given(size=st.integers(1, 90), kind=kinds | st.just("zeros"), seed=seeds)
def test_two_bits_are_a_sign_and_one_of_two_means(size: int, kind: str, seed: int) -> None:
    """Of the entries that would be sent whole: those up to the mean magnitude, and those above it, each by their own mean."""
    v = values(size, kind, seed)
    whole = send(Threshold(4), v, Key(0, 0))[1].numpy()
    magnitude, sent = np.abs(whole), whole != 0
    expected = np.zeros(size)
    if sent.any():
        large = magnitude > magnitude[sent].mean()
        for group in (sent & large, sent & ~large):
            if group.any():
                expected[group] = magnitude[group].mean()
    np.testing.assert_allclose(send(Threshold(4, two_bits=True), v, Key(0, 0))[1].numpy(), np.copysign(expected, whole), rtol=1e-12, atol=0)


def test_two_bits_are_two_bits() -> None:
    """A count, two magnitudes; for each entry 4 bytes of position and a quarter of a byte, instead of 8 bytes."""
    v = values(50_000, "gaussian", 3, torch.float32)
    n = int(send(Threshold(100), v, Key(0, 0))[1].count_nonzero())
    assert 300 < n < 1000
    assert send(Threshold(100), v, Key(0, 0))[2].nbytes == 8 + 8 * n
    assert 0 <= send(Threshold(100, two_bits=True), v, Key(0, 0))[2].nbytes - (8 + 8 + 4 * n + n / 4) < 8
