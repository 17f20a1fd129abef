"""Contraction δ and variance ω are what compressors say, and unbiased ones have the vector as their mean."""

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
from hvd_ecsgd.segments import Key
from tests.property.operators import EVERY, UNBIASED, checked, keys, kinds, seeds, send, values

# -- δ and ω ---------------------------------------------------------------------------------------------------------------------


def left(compressor: Any, v: torch.Tensor, key: Key) -> float:
    """‖C(v) − v‖²/‖v‖² of one draw."""
    return float((send(compressor, v, key)[1] - v).square().sum() / v.square().sum())


DETERMINISTIC = [
    Identity(),
    TopK(4),
    BlockTopK(4, 16),
    BlockTopK(),
    Sign("l1"),
    Sign("l2"),
    Sign("l1", 8),
    Sign("l2", 8),
    Ternary("l1"),
    Ternary("l2"),
]


@pytest.mark.parametrize("compressor", [*DETERMINISTIC, Cast(), Cast(torch.bfloat16), Threshold(4), Threshold(4, two_bits=True)], ids=str)
@checked
@given(size=st.integers(1, 90), kind=kinds, seed=seeds)
def test_delta_is_what_is_measured(compressor: Any, size: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    if v.any():
        assert compressor.delta(v) == pytest.approx(1 - left(compressor, v, Key(0, 0)), abs=1e-12)
    else:
        assert compressor.delta(v) == 1.0


def closed_form(compressor: Any, v: np.ndarray) -> float:
    """δ as the table of the methods states it."""
    d, norm = v.size, float(np.linalg.norm(v))
    l1 = float(np.abs(v).sum())
    if isinstance(compressor, Ternary):
        d = int(np.count_nonzero(v))
    return l1**2 / (d * norm**2) if compressor.scale == "l1" else 2 * l1 / (math.sqrt(d) * norm) - 1


@pytest.mark.parametrize("compressor", [Sign("l1"), Sign("l2"), Ternary("l1"), Ternary("l2")], ids=str)
@checked
@given(size=st.integers(1, 90), kind=kinds, seed=seeds)
def test_delta_of_one_scale_is_the_closed_form(compressor: Any, size: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    if v.any():
        assert compressor.delta(v) == pytest.approx(closed_form(compressor, v.numpy()), abs=1e-12)


@pytest.mark.parametrize("compressor", [Sign("l2"), Ternary("l2"), QSGD(1, 10**6), RandomK(3, unbiased=True)], ids=str)
def test_what_is_no_contraction_in_general_has_a_negative_delta(compressor: Any) -> None:
    """One entry that holds the norm among a thousand small ones (its neighbours in a uniform scale)."""
    v = values(1000, "spike", 0)
    if isinstance(compressor, QSGD):
        v = values(1000, "equal", 0)
    assert compressor.delta(v) < 0


@pytest.mark.parametrize(
    "compressor",
    [Sign("l1"), Sign("l1", 8), Ternary("l1"), TopK(4), BlockTopK(4, 16), Threshold(4), Threshold(4, 0.01, True), Natural(), QSGD()],
    ids=str,
)
@checked
@given(size=st.integers(1, 90), kind=kinds, seed=seeds)
def test_contractions_have_a_positive_delta(compressor: Any, size: int, kind: str, seed: int) -> None:
    """Control of the test above: what may carry feedback without a warning."""
    v = values(size, kind, seed)
    assert 0 < compressor.delta(v) <= 1 + 1e-12
    if isinstance(compressor, BlockTopK):
        assert compressor.delta(v) >= min(max(1, n // 4) / n for n in (16, size % 16 or 16, min(size, 16)))


@pytest.mark.parametrize(
    ("compressor", "remains"), [(Sign("l1"), 0.3634), (Sign("l2"), 0.4042), (Ternary("l1"), 0.3634), (Ternary("l2"), 0.4042)], ids=str
)
def test_signs_of_a_gaussian(compressor: Any, remains: float) -> None:
    assert 1 - compressor.delta(values(10**6, "gaussian", 7)) == pytest.approx(remains, abs=0.002)


def test_natural_of_a_gaussian() -> None:
    assert 1 - Natural().delta(values(10**6, "gaussian", 7)) == pytest.approx(0.082, abs=0.0005)


def variance_qsgd(v: np.ndarray, s: int, bucket: int, norm: str) -> float:
    total = 0.0
    for low in range(0, v.size, bucket):
        part = v[low : low + bucket]
        scale = np.linalg.norm(part) if norm == "l2" else np.abs(part).max()
        if scale:
            f = np.abs(part) / scale * s % 1.0
            total += ((scale / s) ** 2 * f * (1 - f)).sum()
    return float(total)


def variance_natural(v: np.ndarray) -> float:
    a = np.abs(v[v != 0])
    low = 2.0 ** np.floor(np.log2(a))
    return float(((a - low) * (2 * low - a)).sum())


@pytest.mark.parametrize("compressor", [QSGD(1, 16), QSGD(7, 16, "max"), QSGD(127), Natural()], ids=str)
@checked
@given(size=st.integers(1, 90), kind=kinds, seed=seeds)
def test_delta_of_a_stochastic_quantiser_is_its_exact_variance(compressor: Any, size: int, kind: str, seed: int) -> None:
    v = values(size, kind, seed)
    exact = (
        variance_natural(v.numpy())
        if isinstance(compressor, Natural)
        else variance_qsgd(v.numpy(), compressor.levels, compressor.bucket, compressor.norm)
    )
    if v.any():
        assert 1 - compressor.delta(v) == pytest.approx(exact / float(v.square().sum()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "compressor",
    [
        *(RandomBlock(3), RandomK(3), RandomK(1.5), RandomK(3, unbiased=True), GlobalRandomBlock(3, 7), QSGD(3, 16), Natural()),
        *(Threshold(2, 0.1), Threshold(2, 0.1, two_bits=True)),
    ],
    ids=str,
)
def test_delta_is_the_mean_over_draws(compressor: Any) -> None:
    """4000 draws; the bound is five standard errors. For `Threshold` the sample is really drawn: 32 of 100 entries."""
    v = values(100, "gaussian", 5)
    draws = np.array([left(compressor, v, key) for key in keys(4000)])
    assert abs(draws.mean() - (1 - compressor.delta(v))) < 5 * draws.std() / math.sqrt(draws.size) + 1e-12
    assert abs(draws.mean() - (1 - compressor.delta(v)) - 0.1) > 5 * draws.std() / math.sqrt(draws.size), "control: a δ that is off by 0.1"
    assert draws.std() > 1e-3, "control: there is something to average"


@pytest.mark.parametrize("compressor", UNBIASED, ids=str)
@checked
@given(size=st.integers(1, 90), kind=kinds, seed=seeds)
def test_omega_bounds_the_variance(compressor: Any, size: int, kind: str, seed: int) -> None:
    assert compressor.unbiased
    assert 1 - compressor.delta(values(size, kind, seed)) <= compressor.omega(size) + 1e-12


def test_omega_is_nearly_attained() -> None:
    """Control: nine tenths of the bound would be wrong. QSGD: equal entries below the first level; natural: 4/3; random-k: everything."""
    for compressor, v in (
        (QSGD(1, 512), torch.ones(512)),
        (QSGD(1, 512, "max"), torch.tensor([1.0] + [1 / math.sqrt(512)] * 511)),
        (Natural(), torch.full((9,), 4 / 3, dtype=torch.float64)),
        (RandomK(4, unbiased=True), torch.arange(1.0, 41.0)),
    ):
        share = 0.45 if compressor == QSGD(1, 512, "max") else 0.9
        assert share * compressor.omega(v.numel()) < 1 - compressor.delta(v) <= compressor.omega(v.numel()) + 1e-12
    assert QSGD(7).omega(10**6) == QSGD(7).omega(512) == pytest.approx(math.sqrt(512) / 7)
    assert QSGD(127).omega(512) == pytest.approx(512 / 127**2)
    assert RandomK(4).omega(40) == pytest.approx(3)


def test_biased_compressors_say_so() -> None:
    assert [c for c in EVERY if c.unbiased] == [c for c in EVERY if c in UNBIASED or isinstance(c, QSGD)]


# -- unbiasedness ----------------------------------------------------------------------------------------------------------------


def bias_in_standard_errors(compressor: Any, v: torch.Tensor, draws: int) -> float:
    """The largest |mean of C(v)_j − v_j| over its standard error; entries that do not vary must be right to rounding."""
    sent = torch.stack([send(compressor, v, key)[1] for key in keys(draws, seed=1)]).double()
    off, error = (sent.mean(0) - v.double()).abs(), sent.std(0) / math.sqrt(draws)
    assert (off[error < 1e-7] < 1e-6).all()
    return float((off / error.clamp(min=1e-7)).max())


@pytest.mark.parametrize("compressor", [c for c in UNBIASED if c != Identity()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_over_draws_is_the_vector(compressor: Any, dtype: torch.dtype) -> None:
    """3000 draws, 40 entries: five standard errors is what chance exceeds once in 40 000 tests."""
    assert bias_in_standard_errors(compressor, values(40, "gaussian", 2, dtype), 3000) < 5


@pytest.mark.parametrize("compressor", [RandomK(3), GlobalRandomBlock(3, 7)], ids=str)
def test_the_unbiasedness_check_notices_a_bias(compressor: Any) -> None:
    """Control: without the factor d/k."""
    assert bias_in_standard_errors(compressor, values(40, "gaussian", 2), 3000) > 20
