"""What every compressor promises (hvd_ecsgd.protocols.Compressor), on drawn tables of segments and values. One process only."""

from __future__ import annotations

import importlib
import pkgutil
import random
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hvd_ecsgd.compressors
from hvd_ecsgd import Compression
from hvd_ecsgd.compressors import Cast, Identity, RandomBlock, Sign, TopK
from hvd_ecsgd.compressors.base import Operator
from hvd_ecsgd.errors import CompressionError
from hvd_ecsgd.segments import Key, Segments
from tests.cases import CASES, COMPRESSORS, Case, CompressorCase, compressor_cases, ids
from tests.property.layouts import buffers, keys, layouts, named_zeros, values

every_compressor = pytest.mark.parametrize("case", COMPRESSORS, ids=ids)
checked = settings(deadline=None, max_examples=40, derandomize=True)


def decode(compressor: Any, payload: torch.Tensor, like: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> torch.Tensor:
    out = torch.zeros_like(like)
    compressor.add_(out, payload, segments, key, alpha)
    return out


def outside(buffer: torch.Tensor, segments: Segments) -> torch.Tensor:
    mask = torch.ones_like(buffer, dtype=torch.bool)
    for view in segments.views(mask):
        view.fill_(False)
    return mask


def test_every_compressor_is_exported_and_in_the_table() -> None:
    exported = {getattr(hvd_ecsgd.compressors, n) for n in hvd_ecsgd.compressors.__all__}
    modules = [importlib.import_module(f"hvd_ecsgd.compressors.{m.name}") for m in pkgutil.iter_modules(hvd_ecsgd.compressors.__path__)]
    written = {c for m in modules for c in vars(m).values() if is_dataclass(c) and isinstance(c, type) and issubclass(c, Operator)}
    assert written == exported == {type(c.compressor) for c in COMPRESSORS}


def test_a_new_method_brings_its_compressor_into_the_table() -> None:
    """One line in the table of methods; the tests here then find one that sends what it does not take out of the buffer (the second)."""

    class Right(Sign):
        pass

    class Wrong(Sign):
        def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
            return super().extract_(buffer.clone(), segments, key)

    cases = compressor_cases(
        [*CASES, Case("right", lambda: Compression(Right())), Case("wrong", lambda: Compression.double_squeeze(Sign(), Wrong()))]
    )
    right, wrong = cases[len(COMPRESSORS) :]
    assert (right.compressor, wrong.compressor) == (Right(), Wrong())
    test_what_is_sent_and_what_stays_add_up(right)
    test_contraction(right)
    with pytest.raises(AssertionError):
        test_what_is_sent_and_what_stays_add_up(wrong)


@every_compressor
@checked
@given(example=buffers(), key=keys)
def test_what_is_sent_and_what_stays_add_up(case: CompressorCase, example: tuple[torch.Tensor, Segments], key: Key) -> None:
    """Conservation: exactly for selecting compressors, to rounding for the others; elements outside the table are left alone."""
    before, segments = example
    buffer = before.clone()
    payload = case.compressor.extract_(buffer, segments, key)
    decoded = decode(case.compressor, payload, buffer, segments, key)
    rest = outside(before, segments)
    assert torch.equal(buffer[rest], before[rest])
    assert not decoded[rest].any()
    if case.selects:
        assert torch.equal(buffer + decoded, before)
        assert not (buffer * decoded).any(), "an entry is sent whole or not at all"
    else:
        scale = max(before.abs().max().item(), decoded.abs().max().item())
        assert (buffer + decoded - before).abs().max().item() <= 2 * torch.finfo(before.dtype).eps * scale
    if case.compressor.lossless:
        assert not buffer[~rest].any()


def test_the_conservation_check_notices_a_lost_entry() -> None:
    """Control: a compressor that forgets what it did not send is caught."""
    before = values(50, "gaussian", 1)
    buffer, segments, key = before.clone(), Segments.of(named_zeros([50], torch.float64)), Key(0, 0)
    payload = TopK(5).extract_(buffer, segments, key)
    buffer.zero_()
    assert not torch.equal(buffer + decode(TopK(5), payload, buffer, segments, key), before)


@every_compressor
@checked
@given(example=buffers(), key=keys)
def test_payload_is_as_announced(case: CompressorCase, example: tuple[torch.Tensor, Segments], key: Key) -> None:
    """One contiguous vector of the announced type and size, the same size from a compact buffer; bytes come in whole words."""
    buffer, segments = example
    size = case.compressor.payload_size(segments)
    compact = torch.cat(segments.views(buffer)) if len(segments) else buffer[:0]
    payload = case.compressor.extract_(buffer.clone(), segments, key)
    assert payload.dim() == 1
    assert payload.is_contiguous()
    assert payload.dtype == case.compressor.payload_dtype(buffer.dtype)
    assert size is None or payload.numel() == size
    assert payload.dtype != torch.uint8 or payload.numel() % 8 == 0
    assert torch.equal(payload, case.compressor.extract_(compact, segments.compact, key)), "a piece and its compact copy have one payload"
    assert case.compressor.finite(payload, segments)


@every_compressor
@checked
@given(example=buffers(), key=keys, alpha=st.sampled_from([1.0, 0.5, -2.0, 0.25]))
def test_add_adds(case: CompressorCase, example: tuple[torch.Tensor, Segments], key: Key, alpha: float) -> None:
    """out += α·decode(payload), on what is there already; the payload is only read."""
    buffer, segments = example
    payload = case.compressor.extract_(buffer.clone(), segments, key)
    kept = payload.clone()
    start = values(buffer.numel(), "integers", 3, buffer.dtype)
    out = start.clone()
    case.compressor.add_(out, payload, segments, key, alpha)
    expected = start + alpha * decode(case.compressor, payload, buffer, segments, key)
    assert torch.equal(payload, kept)
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(out.dtype).eps, atol=1e-30)


@every_compressor
@checked
@given(layout=layouts, key=keys)
def test_a_segment_of_nan_is_seen(case: CompressorCase, layout: Segments, key: Key) -> None:
    """The payload of a poisoned rank decodes to NaN in every segment, and says so."""
    buffer = torch.full((layout.numel,), float("nan"), dtype=layout.dtype)
    payload = case.compressor.extract_(buffer, layout, key)
    assert not case.compressor.finite(payload, layout)
    decoded = decode(case.compressor, payload, buffer, layout, key)
    assert all(view.isnan().any() for view in layout.views(decoded))


@every_compressor
@checked
@given(
    layout=layouts,
    key=keys,
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    where=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 99),
)
def test_one_bad_element_is_never_lost(case: CompressorCase, layout: Segments, key: Key, bad: float, where: float, seed: int) -> None:
    """A single inf or NaN makes the payload not finite; a compressor that looks at a part only may leave it where it was."""
    buffer = values(layout.numel, "gaussian", seed, layout.dtype)
    at = int(where * layout.numel)
    buffer[at] = bad
    payload = case.compressor.extract_(buffer, layout, key)
    seen = not case.compressor.finite(payload, layout)
    if case.sees_everything:
        assert seen
        assert not decode(case.compressor, payload, buffer, layout, key).isfinite().all()
    else:
        assert seen or not buffer[at].isfinite()


SUMMABLE = [c for c in COMPRESSORS if c.compressor.summable]


@pytest.mark.parametrize("case", SUMMABLE, ids=ids)
@checked
@given(example=buffers(kinds=("integers",)), key=keys)
def test_summable_payloads_can_be_added(case: CompressorCase, example: tuple[torch.Tensor, Segments], key: Key) -> None:
    """Three workers' payloads of one key: decoding their sum is summing what each decodes to. Integers, so that all sums are exact."""
    first, segments = example
    workers = [first, *(values(first.numel(), "integers", seed, first.dtype) for seed in (11, 12))]
    payloads = [case.compressor.extract_(w.clone(), segments, key) for w in workers]
    total = decode(case.compressor, payloads[0] + payloads[1] + payloads[2], first, segments, key)
    assert torch.equal(total, sum(decode(case.compressor, p, first, segments, key) for p in payloads))


@pytest.mark.parametrize("case", [c for c in COMPRESSORS if not c.compressor.summable], ids=ids)
def test_other_payloads_cannot_be_added(case: CompressorCase) -> None:
    """Control: what calls itself not summable really is not."""
    segments, key = Segments.of(named_zeros([40])), Key(0, 0)
    workers = [values(40, "gaussian", seed, torch.float32) for seed in range(3)]
    payloads = [case.compressor.extract_(w.clone(), segments, key) for w in workers]
    expected = sum(decode(case.compressor, p, workers[0], segments, key) for p in payloads)
    try:
        total = decode(case.compressor, payloads[0] + payloads[1] + payloads[2], workers[0], segments, key)
    except (IndexError, RuntimeError, CompressionError):  # positions that were added lie outside of the segment
        return
    assert not torch.allclose(total, expected)


def test_payloads_of_different_keys_cannot_be_added() -> None:
    """Control: random blocks line up only under one key."""
    v, segments = values(40, "gaussian", 0, torch.float32), Segments.of(named_zeros([40]))
    a, b = Key(0, 0), Key(1, 0)
    compressor = RandomBlock(4)
    p, q = compressor.extract_(v.clone(), segments, a), compressor.extract_(v.clone(), segments, b)
    assert not torch.allclose(
        decode(compressor, p + q, v, segments, a), decode(compressor, p, v, segments, a) + decode(compressor, q, v, segments, b)
    )


@every_compressor
@checked
@given(example=buffers(), key=keys)
def test_pure(case: CompressorCase, example: tuple[torch.Tensor, Segments], key: Key) -> None:
    """The same key and values give the same payload; configuration and the global generators are untouched."""
    buffer, segments = example
    configuration = repr(case.compressor)
    states = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    payloads = []
    for _ in range(2):
        payloads.append(case.compressor.extract_(buffer.clone(), segments, key))
        decode(case.compressor, payloads[-1], buffer, segments, key)
    assert torch.equal(*payloads)
    assert repr(case.compressor) == configuration
    assert hash(case.compressor) == hash(case.compressor)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), repr(np.random.get_state()))


@every_compressor
@checked
@given(size=st.integers(1, 70), kind=st.sampled_from(["gaussian", "ties", "sparse", "magnitudes"]), seed=st.integers(0, 2**31))
def test_contraction(case: CompressorCase, size: int, kind: str, seed: int) -> None:
    """‖C(v) − v‖² ≤ (1 − δ)‖v‖², for each draw, or as the mean over keys that reach every start equally often."""
    v = values(size, kind, seed)
    segments = Segments.of(named_zeros([size], torch.float64))
    keys = one_key_for_each_start(segments) if case.on_average else [Key(seed, 0)]
    left = []
    for key in keys:
        residual = v.clone()
        case.compressor.extract_(residual, segments, key)
        left.append((residual**2).sum().item())
    norm = (v**2).sum().item()
    # Half precision's smallest step is 2^-24: an entry below its normal range may be off by half of that.
    assert np.mean(left) <= case.leaves(v.numpy()) * norm + 1e-12 * norm + size * 2.0**-50


def one_key_for_each_start(segments: Segments) -> list[Key]:
    (segment,) = segments
    found: dict[int, Key] = {}
    step = 0
    while len(found) < segment.numel:
        key = Key(0, step)
        found.setdefault(key.below(segment, segment.numel, "block"), key)
        step += 1
    return list(found.values())


# -- random block ----------------------------------------------------------------------------------------------------------------


def block_of(d: int, ratio: float, key: Key, name: str = "w") -> np.ndarray:
    """Positions of the block, as the decoder fills them."""
    segments = Segments.of([(name, torch.zeros(d))])
    compressor = RandomBlock(ratio)
    payload = torch.ones(compressor.payload_size(segments))
    return decode(compressor, payload, torch.zeros(d), segments, key).nonzero().view(-1).numpy()


def test_block_starts_are_uniform_over_all_positions() -> None:
    """χ² of 20 000 starts over 97 positions: mean 96, standard deviation 14; the bound is five of them. Every position is a start."""
    d, draws = 97, 20_000
    segment = Segments.of(named_zeros([d])).table[0]
    starts = np.array([Key(3, step).below(segment, d, "block") for step in range(draws)])
    counts = np.bincount(starts, minlength=d)
    assert counts.min() > 0
    assert ((counts - draws / d) ** 2 / (draws / d)).sum() < 96 + 5 * 14


def test_the_uniformity_check_notices_blocks_that_do_not_wrap() -> None:
    """Control: starts over d − block + 1 positions only, as without wrapping around, fail the same bound."""
    d, block, draws = 97, 9, 20_000
    segment = Segments.of(named_zeros([d])).table[0]
    counts = np.bincount([Key(3, step).below(segment, d - block + 1, "block") for step in range(draws)], minlength=d)
    assert ((counts - draws / d) ** 2 / (draws / d)).sum() > 96 + 5 * 14


def test_blocks_are_consecutive_and_wrap_around() -> None:
    """Of d = 11, block 3: every one of the eleven circular blocks occurs, and nothing else."""
    seen = {tuple(block_of(11, 3, Key(0, step))) for step in range(400)}
    assert seen == {tuple(sorted((start + j) % 11 for j in range(3))) for start in range(11)}


def test_every_position_is_sent_equally_often_over_all_starts() -> None:
    segments = Segments.of(named_zeros([13]))
    sent = np.concatenate([block_of(13, 4, key, "layer0.weight") for key in one_key_for_each_start(segments)])
    assert np.bincount(sent, minlength=13).tolist() == [3] * 13


def test_blocks_are_shared_by_ranks_and_differ_between_names_steps_seeds_and_pieces() -> None:
    compressor = RandomBlock(50)
    assert compressor.shared_key
    reference = block_of(5000, 50, Key(0, 0))
    assert np.array_equal(reference, block_of(5000, 50, Key(0, 0)))
    for key, name in ((Key(1, 0), "w"), (Key(0, 1), "w"), (Key(0, 0), "v"), (Key(0, 0, stage="push"), "w")):
        assert not np.array_equal(reference, block_of(5000, 50, key, name))
    pieces = Segments.of(named_zeros([8000]))
    first = {Key(0, 0).below(pieces.piece(r, 2).table[0], 4000, "block") for r in range(2)}
    assert len(first) == 2


@checked
@given(size=st.integers(1, 5000), ratio=st.floats(1, 1e6))
def test_block_length(size: int, ratio: float) -> None:
    """max(1, ⌊d/ratio⌋): at least one entry, never more than there are."""
    segments = Segments.of(named_zeros([size]))
    assert RandomBlock(ratio).payload_size(segments) == max(1, int(np.floor(size / ratio)))


# -- top-k -----------------------------------------------------------------------------------------------------------------------


@checked
@given(
    size=st.integers(1, 70),
    k=st.integers(1, 80),
    kind=st.sampled_from(["gaussian", "ties", "zeros", "sparse", "magnitudes"]),
    seed=st.integers(0, 2**31),
)
def test_top_k_is_the_oracles(size: int, k: int, kind: str, seed: int) -> None:
    """The k largest magnitudes, ties to the lowest index, as a stable sort orders them."""
    v = values(size, kind, seed)
    segments, key = Segments.of(named_zeros([size], torch.float64)), Key(0, 0)
    expected = np.zeros(size)
    chosen = np.argsort(-np.abs(v.numpy()), kind="stable")[: min(k, size)]
    expected[chosen] = v.numpy()[chosen]
    payload = TopK(k=k).extract_(v.clone(), segments, key)
    assert np.array_equal(decode(TopK(k=k), payload, v, segments, key).numpy(), expected)
    sent = payload.numpy().tobytes()
    positions = np.frombuffer(sent[8 * len(chosen) : 12 * len(chosen)], np.int32)
    assert positions.tolist() == sorted(chosen.tolist())


# -- sign ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["l1", "l2"])
@checked
@given(size=st.integers(1, 70), kind=st.sampled_from(["gaussian", "ties", "zeros", "sparse"]), seed=st.integers(0, 2**31))
def test_sign_is_the_oracles(scale: Any, size: int, kind: str, seed: int) -> None:
    """s·sign(v), sign(0) = +1, s = ‖v‖₁/d or ‖v‖₂/√d; padding is outside of the scale."""
    v = values(size, kind, seed)
    segments, key = Segments.of(named_zeros([size], torch.float64)), Key(0, 0)
    s = np.abs(v.numpy()).sum() / size if scale == "l1" else np.linalg.norm(v.numpy()) / np.sqrt(size)
    payload = Sign(scale).extract_(v.clone(), segments, key)
    decoded = decode(Sign(scale), payload, v, segments, key).numpy()
    np.testing.assert_allclose(decoded, np.where(v.numpy() < 0, -s, s), rtol=1e-14)
    bits = np.unpackbits(payload.numpy()[8:], bitorder="little")[:size]
    assert np.array_equal(bits, (v.numpy() < 0).astype(np.uint8))


@pytest.mark.parametrize(("scale", "left"), [("l1", 0.3634), ("l2", 0.4042)])
def test_sign_of_a_gaussian(scale: Any, left: float) -> None:
    """‖v − C(v)‖²/‖v‖² at d = 1e6: 1 − 2/π and 2 − 2√(2/π), ± .002."""
    v = values(10**6, "gaussian", 7, torch.float32)
    norm = (v.double() ** 2).sum().item()
    Sign(scale).extract_(v, Segments.of(named_zeros([10**6])), Key(0, 0))
    assert (v.double() ** 2).sum().item() / norm == pytest.approx(left, abs=0.002)


def test_the_l2_scale_is_no_contraction() -> None:
    """Control of the table's bound: one large entry among many small ones is made worse than by sending nothing."""
    v = torch.full((1000,), 1e-3, dtype=torch.float64)
    v[0] = 1.0
    norm = (v**2).sum().item()
    Sign("l2").extract_(v, Segments.of(named_zeros([1000], torch.float64)), Key(0, 0))
    assert (v**2).sum().item() > norm


# -- cast ------------------------------------------------------------------------------------------------------------------------


def test_cast_sends_what_overflows_as_inf_and_keeps_it() -> None:
    v = torch.tensor([1.0, 70000.0, -1e30, 2.0])
    segments, key = Segments.of([("w", v)]), Key(0, 0)
    payload = Cast().extract_(v, segments, key)
    assert not Cast().finite(payload, segments)
    assert payload.tolist() == [1.0, float("inf"), float("-inf"), 2.0]
    assert v.tolist() == [0.0, 70000.0, float(np.float32(-1e30)), 0.0]


def test_identity_is_lossless_and_says_so() -> None:
    assert [c.name for c in COMPRESSORS if c.compressor.lossless] == ["identity"]
    assert Identity() == Identity()
