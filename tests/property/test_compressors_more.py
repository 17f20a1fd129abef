"""What the compressors promise beyond the common table: exact δ and ω, unbiasedness, packed sizes, and the definitions, against NumPy oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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
from hvd_ecsgd.compressors.base import distinct_below
from hvd_ecsgd.kernels import pack_codes, top_k_indices, top_k_rows, unpack_codes
from hvd_ecsgd.segments import Key, Segment, Segments

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


# -- packing ---------------------------------------------------------------------------------------------------------------------


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


# -- shared random positions -----------------------------------------------------------------------------------------------------

HERE = Segment("w", 0, 0)


@checked
@given(n=st.integers(1, 3000), share=st.floats(0, 1), seed=seeds)
def test_positions_are_distinct_and_ascending(n: int, share: float, seed: int) -> None:
    k = round(share * n)
    chosen = distinct_below(Key(seed, 0), HERE, n, k, "")
    assert chosen.size == k
    assert k == 0 or (chosen.min() >= 0 and chosen.max() < n)
    assert (np.diff(chosen) > 0).all()


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_subset_is_equally_likely(k: int) -> None:
    """χ² over all subsets of six, six standard deviations; k = 4 takes the way by the complement."""
    subsets = {c: i for i, c in enumerate(itertools.combinations(range(6), k))}
    counts = np.bincount([subsets[tuple(distinct_below(key, HERE, 6, k, "").tolist())] for key in keys(12_000)], minlength=len(subsets))
    degrees = len(subsets) - 1
    assert chi_square(counts) < degrees + 6 * math.sqrt(2 * degrees)
    without_the_last = counts.copy()
    without_the_last[-1] = 0
    assert chi_square(without_the_last) > degrees + 6 * math.sqrt(2 * degrees), "control: one subset never comes"


def test_positions_are_the_same_everywhere() -> None:
    """Fixed numbers: another platform or version that draws other positions would silently average different entries."""
    assert distinct_below(Key(1, 2), Segment("layer.weight", 0, 0), 1_000_000, 5, "positions").tolist() == POSITIONS
    assert distinct_below(Key(1, 3), Segment("layer.weight", 0, 0), 1_000_000, 5, "positions").tolist() != POSITIONS


POSITIONS = [288687, 405998, 431800, 552191, 914854]


# -- global random block ---------------------------------------------------------------------------------------------------------


def chosen_places(compressor: Any, segments: Segments, key: Key) -> set[int]:
    """Places in the model that a table's payload covers."""
    buffer = torch.ones(max((s.stop for s in segments), default=0))
    compressor.extract_(buffer, segments, key)
    return {s.offset + i for s in segments for i in range(s.numel) if buffer[s.start + i] == 0}


@checked
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), blocks=st.integers(1, 50), ratio=st.floats(1, 20), n=st.integers(1, 4), seed=seeds)
def test_places_do_not_depend_on_buckets_or_pieces(sizes: list[int], blocks: int, ratio: float, n: int, seed: int) -> None:
    """The same places of the model from one table, from a table for each parameter, in any order, and from pieces."""
    ratio = min(ratio, blocks)
    compressor, key, d = GlobalRandomBlock(ratio, blocks), Key(seed, 0), sum(sizes)
    whole = table(*sizes, dtype=torch.float32)
    reference = chosen_places(compressor, whole, key)
    named = [(s.name, torch.empty(s.numel)) for s in whole]
    offsets = {s.name: s.offset for s in whole}
    alone = [chosen_places(compressor, Segments.of([pair], offsets, d), key) for pair in named]
    assert set().union(*alone) == reference
    assert chosen_places(compressor, Segments.of(named[::-1], offsets, d), key) == reference
    assert set().union(*(chosen_places(compressor, whole.piece(r, n), key) for r in range(n))) == reference
    cut = min(blocks, d)
    picked = max(1, int(cut / ratio)) if d else 0
    borders = [i * d // cut for i in range(cut + 1)] if d else [0]
    full = [i for i, (low, high) in enumerate(itertools.pairwise(borders)) if set(range(low, high)) <= reference]
    assert len(full) == picked
    assert len(reference) == sum(borders[i + 1] - borders[i] for i in full)


def test_without_the_place_in_the_model_it_would_depend_on_buckets() -> None:
    """Control: each parameter as a model of its own."""
    compressor, key = GlobalRandomBlock(4, 16), Key(0, 0)
    whole = table(40, 40, dtype=torch.float32)
    own = [chosen_places(compressor, Segments.of([(s.name, torch.empty(s.numel))]), key) for s in whole]
    assert own[0] | {40 + i for i in own[1]} != chosen_places(compressor, whole, key)


def test_a_parameter_without_a_block_still_sends_one_element() -> None:
    """Payload sizes change from step to step, are equal for equal keys, and are never zero; every block comes equally often."""
    compressor, d = GlobalRandomBlock(8, 16), 160
    first = Segments.of([("a", torch.empty(16))], {"a": 16}, d)
    sizes = [compressor.extract_(torch.ones(16), first, key).numel() for key in keys(400)]
    assert set(sizes) == {1, 3, 5, 7, 11, 13, 15}
    assert min(sizes) == 1
    assert compressor.payload_size(first) is None
    counts = np.zeros(16)
    for key in keys(2000):
        for place in chosen_places(compressor, table(d, dtype=torch.float32), key):
            counts[place // 10] += 0.1
    assert chi_square(counts) < 15 + 6 * math.sqrt(30)


# -- threshold -------------------------------------------------------------------------------------------------------------------


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


# -- definitions -----------------------------------------------------------------------------------------------------------------


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
    draws = torch.rand(v.numel(), generator=key.generator(segment, "cpu", "levels"))
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
