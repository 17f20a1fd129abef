"""The compiled kernels give what the reference gives: payloads, residuals and results, to the bit but for sums; on every variant and thread count."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import kernels
from hvd_ecsgd.compressors import QSGD, BlockTopK, Cast, Natural, RandomK, Sign, Ternary, Threshold, TopK
from hvd_ecsgd.errors import CompressionError
from hvd_ecsgd.kernels import draws, native, reference
from hvd_ecsgd.kernels.library import FILE, VARIANTS, Library, chosen
from hvd_ecsgd.protocols import decode_sum_
from hvd_ecsgd.segments import Key, Segments
from tests.forked import forked

REPO = Path(__file__).resolve().parents[2]
KEY = Key(5, 7, 1, size=4)


def loaded() -> Library | None:
    try:
        return Library(FILE)
    except OSError:
        return None


library = loaded()
compiled = pytest.mark.skipif(
    library is None and os.environ.get("HVD_ECSGD_REQUIRE_ALL") != "1", reason="the kernels are not compiled: python setup.py build_ext --inplace"
)

SELECTING = [
    TopK(100), TopK(3), TopK(1), TopK(k=5), BlockTopK(100, 512), BlockTopK(4, 16), BlockTopK(3, 100), RandomK(100), RandomK(1.5), RandomK(1),
    RandomK(5000), RandomK(7, unbiased=True), Threshold(100), Threshold(4), Threshold(1), Threshold(20, 0.9), Threshold(30, two_bits=True),
]  # fmt: skip
ROUNDING = [Natural(), Cast(), Cast(torch.bfloat16), Cast(saturate=True), QSGD(norm="max"), QSGD(7, 16, "max"), QSGD(1, 5, "max"), QSGD(5, 7, "max")]
SCALED = [Sign(), Sign("l2"), Sign("l1", 8), Sign("l1", 5), Sign("l2", 100), Sign("l1", 40000), Ternary(), Ternary("l1")]
NORMED = [QSGD(), QSGD(7), QSGD(1, 16)]
LONG = [
    TopK(50), TopK(3), BlockTopK(100), RandomK(64), RandomK(1.3), Threshold(100), Natural(), Cast(), QSGD(), QSGD(7, 40_000), QSGD(9, 40_001, "max"),
    Sign(), Sign("l1", 1000), Ternary(),
]  # fmt: skip
SIZES = [0, 1, 70, 5000, 0, 333]
KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "heavy-tailed": lambda rng, n: rng.standard_cauchy(n) ** 3,
    "constant": lambda rng, n: np.full(n, -0.75),
    "sparse": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.01),
    "denormal": lambda rng, n: rng.standard_normal(n) * 1e-40,
    "zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "ties": lambda rng, n: rng.choice([-2.0, -1.0, 0.0, -0.0, 1.0, 2.0], n),
    "not finite": lambda rng, n: np.where(rng.random(n) < 0.01, rng.choice([np.nan, np.inf, -np.inf], n), rng.standard_normal(n)),
    "huge": lambda rng, n: rng.standard_normal(n) * 1e38,
    "ascending": lambda rng, n: np.arange(n) / 7.0,
}
EXTREME = ("denormal", "huge")
"""The squares of these leave float32's range: a sum of squares in float32, which the reference takes, is 0 or inf, and in double it is neither."""


def values(kind: str, numel: int, dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(KINDS[kind](np.random.default_rng(seed), numel)).to(dtype)


def table(sizes: list[int], dtype: torch.dtype) -> Segments:
    return Segments.of([(f"layer{i}.weight", torch.empty(n, dtype=dtype)) for i, n in enumerate(sizes)])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, but that any NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    known = ~a.isnan()
    return torch.equal(known, ~b.isnan()) and torch.equal(a[known], b[known]) and torch.equal(a.signbit()[known], b.signbit()[known])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is so small is faster so; and what a test sets is set back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if library is not None:
        library.limit_variant(VARIANTS[-1])


def variants() -> Iterator[str]:
    """Those of this processor, each in use while the caller looks at it."""
    assert library is not None
    for most in VARIANTS:
        if library.limit_variant(most) == most:
            with native.forced(library):
                yield most


class Expected:
    """What the reference makes of `v`: residual, payload, and the payload added to something with two factors."""

    def __init__(self, compressor: Any, segments: Segments, v: torch.Tensor, kind: str) -> None:
        self.compressor, self.segments, self.v = compressor, segments, v
        # Where the reference's sum of squares overflows or underflows there is nothing to compare with.
        squares = "l2" in (getattr(compressor, "scale", None), getattr(compressor, "norm", None))
        self.has_scales = not (squares and kind in EXTREME and v.dtype == torch.float32)
        with native.forced(None):
            self.rest, self.payload = self.extracted()
            self.sums = self.added(self.payload)
            zeros = torch.full_like(self.v, 7.0)
            segments.zero_(zeros)
            compressor.add_(zeros, self.payload, segments, KEY)
        assert same(self.sums[1], zeros), "assigning is adding to zeros, and what is outside of the table is not touched"

    def extracted(self) -> tuple[torch.Tensor, torch.Tensor]:
        rest = self.v.clone()
        payload = self.compressor.extract_(rest, self.segments, KEY)
        return rest, payload

    def added(self, payload: torch.Tensor) -> list[torch.Tensor]:
        sums = []
        for alpha in (1.0, 1 / 3):
            sums.append(values("gaussian", self.v.numel(), self.v.dtype, 9))
            self.compressor.add_(sums[-1], payload, self.segments, KEY, alpha)
            sums.append(torch.full_like(self.v, 7.0))
            self.compressor.assign_(sums[-1], payload, self.segments, KEY, alpha)
        return sums

    def differences(self) -> list[str]:
        """In what the kernels in use differ from it."""
        rest, payload = self.extracted()
        found = [f"sum {i}" for i, (a, b) in enumerate(zip(self.sums, self.added(self.payload), strict=True)) if not same(a, b)]
        if not (isinstance(self.compressor, (Sign, Ternary)) or (isinstance(self.compressor, QSGD) and self.compressor.norm == "l2")):
            return found + [what for what, a, b in (("payload", self.payload, payload), ("rest", self.rest, rest)) if not same(a, b)]
        parts = self.compressor._parts if isinstance(self.compressor, QSGD) else self.compressor._scales
        (theirs, at), (ours, _) = parts(self.payload, self.segments), parts(payload, self.segments)
        if self.has_scales:
            error = 2e-6 if self.v.dtype == torch.float32 else 1e-13
            near = ((theirs - ours).abs() <= error * ours.abs() + 2e-45) | (~theirs.isfinite() & ~ours.isfinite())
            codes = float((self.payload[at:] != payload[at:]).double().mean()) if payload.numel() > at else 0.0
            found += [] if bool(near.all()) else ["scales"]
            found += [] if codes <= (0.01 if isinstance(self.compressor, QSGD) else 0.0) else ["codes"]
        if bool(ours.isfinite().all()):  # the rest is exactly what the payload, as it is, leaves
            decoded = torch.zeros_like(self.v)
            with native.forced(None):
                self.compressor.add_(decoded, payload, self.segments, KEY)
            found += [] if torch.equal((self.v - decoded).nan_to_num(), rest.nan_to_num()) else ["rest"]
        return found


@compiled
@pytest.mark.parametrize("compressor", [*SELECTING, *ROUNDING, *SCALED, *NORMED], ids=str)
def test_kernels_give_what_the_reference_gives(compressor: Any) -> None:
    """Of a whole table, with empty segments, and of pieces of it, which begin anywhere; and all variants give the same bits, sums included."""
    found = []
    for i, (kind, dtype) in enumerate(itertools.product(KINDS, (torch.float32, torch.float64))):
        n = (1, 3)[i // 2 % 2]
        segments = table(SIZES, dtype)
        expected = Expected(compressor, segments.piece(n - 1, n), values(kind, segments.numel + 1, dtype)[1:], kind)  # not aligned to a vector
        bits = []
        for variant in variants():
            found += [(variant, dtype, kind, n, what) for what in expected.differences()] if compressor not in SCALED or not bits else []
            bits.append(expected.extracted())
            found += [] if all(same(a, b) for a, b in zip(bits[0], bits[-1], strict=True)) else [(variant, dtype, kind, n, "bits")]
    assert not found


@compiled
@pytest.mark.parametrize("compressor", LONG, ids=str)
def test_long_segments_and_threads_change_nothing(compressor: Any) -> None:
    """More than a tile and than a thread is woken for; two threads give the bits of one, sums included."""
    assert library is not None
    segments = table([300_001, 100, 70_003], torch.float32)
    for kind in ("gaussian", "constant", "sparse", "ascending"):
        expected, bits = Expected(compressor, segments, values(kind, segments.numel, torch.float32), kind), []
        for n, most in ((1, "avx512"), (2, "avx512"), (3, "avx2")):
            torch.set_num_threads(n)
            library.limit_variant(most)
            with native.forced(library):
                bits.append(expected.extracted())
                bits[-1] += (expected.added(bits[-1][1])[1],)
                assert n > 1 or not expected.differences(), kind
            torch.set_num_threads(1)
        assert all(same(a, b) for other in bits[1:] for a, b in zip(bits[0], other, strict=True)), kind


@compiled
def test_what_top_k_expects_of_the_next_step_changes_nothing() -> None:
    """Steps whose magnitudes grow, stay and fall, at first by so little that some reach what is expected; in one part and in two. Control: what is
    expected is another magnitude in each."""
    numel = 300_001
    v, wanted = values("gaussian", numel, torch.float32), TopK(100)
    for threads in (1, 2):
        segments, seen = table([numel], torch.float32), set()
        torch.set_num_threads(threads)
        try:
            for scale in (1, 0.9, 2, 3, 1e-3, 1e-3, 1e4, 1e4, 5e3, 0, 1):
                left, expected = v * scale, v * scale
                with native.forced(library):
                    payload = wanted.extract_(left, segments, KEY)
                with native.forced(None):
                    assert same(payload, wanted.extract_(expected, segments, KEY)) and same(left, expected), (threads, scale)
                seen.add(int(segments.once("top_k", wanted._counts(segments).tobytes(), lambda: np.zeros((1, 4)))[0, 0]))
        finally:
            torch.set_num_threads(1)
        assert len(seen) >= 8


@compiled
def test_one_large_segment_is_the_work_of_several_threads() -> None:
    """Whatever works on it asks the OpenMP runtime for two threads. Control: of one thread it is asked for nothing."""
    assert library is not None
    asked: list[int] = []
    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def fork(function: int, given: int, n: int, _: int) -> None:
        asked.append(n)
        task(function)(given)

    numel = 300_000
    segments, v = table([numel], torch.float32), values("gaussian", numel, torch.float32)
    work: dict[str, Callable[[], object]] = {}
    for c in (QSGD(), QSGD(7), QSGD(7, 40_000), Natural(), Ternary(), TopK(50), BlockTopK(100), Threshold(50), Sign(), Cast()):
        payload = c.extract_(v.clone(), segments, KEY)
        work[f"{c}: extract"] = lambda c=c: c.extract_(v.clone(), segments, KEY)
        work[f"{c}: decode"] = lambda c=c, payload=payload: c.assign_(torch.empty(numel), payload, segments, KEY)
    low_rank, rows, p, q = native.Native(library, v, segments, "test"), np.array([600], np.int64), torch.ones(600), torch.ones(500)
    work["P"] = lambda: low_rank.low_rank_p(rows, 1, q)
    work["Q"] = lambda: low_rank.low_rank_q(rows, 1, p)
    work["PQ"] = lambda: low_rank.low_rank_decode_(rows, 1, p, q, None, [torch.empty(numel)])
    use_openmp = library._library.hvd_ecsgd_use_openmp
    use_openmp(ctypes.cast(fork, ctypes.c_void_p).value)
    try:
        for threads, expected in ((2, {2}), (1, set())):
            torch.set_num_threads(threads)
            low_rank._threads = threads
            for what, run in work.items():
                asked.clear()
                with native.forced(library):
                    run()
                assert set(asked) == expected, (what, threads)
    finally:
        use_openmp(kernels.library._fork_of_torch())


class Doubled(Sign):
    """A user's own, derived from one that assigns, which decodes in its own way."""

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        super().add_(out, payload, segments, key, 2 * alpha)


class Wrapped:
    """One that is all of another but for `add_`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(Sign(), name)

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        Sign().add_(out, payload, segments, key, 2 * alpha)


@pytest.mark.parametrize("kind", [Doubled, Wrapped])
def test_a_compressor_that_only_adds_is_added_to_zeros(kind: Any) -> None:
    """Whatever the result held; what lies outside of the table is not touched. Control: one that assigns."""
    segments, v = table([9, 640], torch.float32), values("gaussian", 649, torch.float32)
    payload = Sign().extract_(v, segments.piece(0, 2), KEY)
    results = []
    for compressor in (kind(), Sign()):
        results.append(torch.full((649,), 7.0))
        decode_sum_(results[-1], compressor, segments.piece(0, 2), [(payload, KEY), (payload, KEY)], 0.5)
    left, right = (torch.cat([result[s.start : s.stop] for s in segments.piece(0, 2)]) for result in results)
    assert torch.equal(left, 2 * right)
    assert all(bool((result[s.start : s.stop] == 7.0).all()) for result in results for s in segments.piece(1, 2))
    decode_sum_(results[0], kind(), segments, [])
    assert not results[0].any()


def matrices_of_low_rank(dtype: torch.dtype) -> tuple[Segments, np.ndarray, list[tuple[int, int]]]:
    """Rows and columns that end within a vector, a block of rows or a tile of columns."""
    shapes = [(3, 70), (130, 33), (300, 5000), (1, 7)]
    return table([r * c for r, c in shapes], dtype), np.array([r for r, _ in shapes], np.int64), shapes


def thin(a: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The matrices, factors Q and P of rank a, and the Q that is kept of a step."""
    segments, rows, shapes = matrices_of_low_rank(dtype)
    columns = sum(c for _, c in shapes)
    return tuple(values("gaussian", n, dtype, i) for i, n in enumerate((segments.numel, columns * a, int(rows.sum()) * a, columns * a)))


def thin_products(a: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """P, Q, residual and result, by the kernels in use."""
    segments, rows, _ = matrices_of_low_rank(dtype)
    left, q, p, kept = thin(a, dtype)
    out = torch.full_like(left, 7.0)
    low_rank = native.native_for(left, segments, "test")
    assert low_rank is not None
    products = [low_rank.low_rank_p(rows, a, q), low_rank.low_rank_q(rows, a, p)]
    low_rank.low_rank_decode_(rows, a, p, q, kept, segments.views(out))
    return [*products, left, out]


def thin_products_everything() -> None:
    """With nothing looked at but by a sanitizer."""
    for a in (1, 3):
        for dtype in (torch.float32, torch.float64):
            thin_products(a, dtype)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("a", [1, 3])
def test_thin_products_are_products(a: int, dtype: torch.dtype) -> None:
    """P, Q, result and residual to rounding, whatever the table's order in the buffer; the same bits on every variant and thread count."""
    segments, _, shapes = matrices_of_low_rank(dtype)
    v, q, p, kept = thin(a, dtype)
    bits: list[list[torch.Tensor]] = []
    for threads, _ in itertools.product((1, 2), variants()):
        torch.set_num_threads(threads)
        bits.append(thin_products(a, dtype))
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for other in bits[1:] for x, y in zip(bits[0], other, strict=True))
    found_p, found_q, left, out = (t.double() for t in bits[0])
    at_p = at_q = 0
    near = 1e-5 if dtype == torch.float32 else 1e-13
    for s, (r, c) in zip(segments, shapes, strict=True):
        m, p_s = v[s.start : s.stop].view(r, c).double(), p[at_p : at_p + r * a].view(r, a).double()
        q_s, kept_s = (t[at_q : at_q + c * a].view(c, a).double() for t in (q, kept))
        expected = {"p": m @ q_s, "q": m.T @ p_s, "result": p_s @ q_s.T, "residual": m - p_s @ kept_s.T}
        bounds = {
            "p": m.abs() @ q_s.abs(),
            "q": m.abs().T @ p_s.abs(),
            "result": p_s.abs() @ q_s.abs().T,
            "residual": m.abs() + p_s.abs() @ kept_s.abs().T,
        }
        found = {"p": found_p[at_p : at_p + r * a].view(r, a), "q": found_q[at_q : at_q + c * a].view(c, a)}
        found |= {"result": out[s.start : s.stop].view(r, c), "residual": left[s.start : s.stop].view(r, c)}
        for what, value in expected.items():
            assert bool(((found[what] - value).abs() <= near * bounds[what]).all()), (what, r, c)
        at_p, at_q = at_p + r * a, at_q + c * a


@compiled
def test_every_code_of_two_bits_decodes_as_in_the_reference() -> None:
    """On every variant, also 3, which nobody writes, and whatever the scale. Control: a payload of other codes."""
    compressor = Ternary("l1")
    for dtype, scale in itertools.product((torch.float32, torch.float64), (0.75, 0.0, math.inf, math.nan)):
        segments = table(SIZES, dtype)
        payload = torch.randint(256, (compressor.payload_size(segments),), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        compressor._scales(payload, segments)[0].fill_(scale)
        expected = Expected(compressor, segments, values("gaussian", segments.numel, dtype), "gaussian")
        with native.forced(None):
            of_reference = expected.added(payload)
        for variant in variants():
            assert all(map(same, of_reference, expected.added(payload))), (variant, dtype, scale)
            assert not (scale and all(map(same, of_reference, expected.added(expected.payload))))


@compiled
def test_a_perturbed_kernel_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: one bit of a payload, in its codes."""
    segments = table(SIZES, torch.float32)
    v = values("gaussian", segments.numel, torch.float32)
    expected = [Expected(c, segments, v, "gaussian") for c in (Sign("l1", 40000), Natural(), QSGD(norm="max"), TopK(3))]
    call = Library.call

    def spoilt(self: Library, name: str, *arguments: Any) -> int:
        result = call(self, name, *arguments)
        if "extract" in name or name == "top_k":
            of_payload = arguments[6 if name == "top_k" else 4]
            ctypes.cast(of_payload, ctypes.POINTER(ctypes.c_uint8))[400] ^= 1
        return result

    with native.forced(library):
        assert [e.differences() for e in expected] == [[]] * 4
        monkeypatch.setattr(Library, "call", spoilt)
        assert all(e.differences() for e in expected)


@compiled
def test_whole_tensors() -> None:
    """Finiteness and fingerprints of every type, at odd places and sizes."""
    for _ in variants():
        check_whole_tensors()


def check_whole_tensors() -> None:
    for dtype, numel in itertools.product((torch.float32, torch.float64, torch.float16, torch.bfloat16), (0, 1, 3, 17, 4097, 70_000)):
        for kind in ("gaussian", "zeros", "not finite", "huge"):
            t = values(kind, numel + 1, dtype)[1:]
            assert kernels.all_finite(t) == reference.all_finite(t) == bool(t.isfinite().all())
            assert torch.equal(kernels.fingerprint(t), reference.fingerprint(t))
        for bad, place in itertools.product((math.inf, -math.inf, math.nan), {0, numel // 2, numel - 1} if numel else ()):
            t = torch.full((numel,), 2.0, dtype=dtype)
            t[place] = bad
            assert not kernels.all_finite(t)
    for integers in (torch.arange(-99, 100, dtype=d) for d in (torch.int8, torch.int16, torch.int32, torch.int64)):
        assert torch.equal(kernels.fingerprint(integers), reference.fingerprint(integers))


@compiled
@pytest.mark.parametrize("kernels_in_use", ["native", "reference"])
@pytest.mark.parametrize("compressor", [TopK(4), BlockTopK(4, 16), Threshold(4), Threshold(4, two_bits=True)], ids=str)
def test_positions_that_cannot_be_are_errors(compressor: Any, kernels_in_use: str) -> None:
    """Out of range, repeated, descending; the parameter is named, and the result is left alone."""
    segments = table([7, 64], torch.float32)
    v = values("gaussian", 71, torch.float32)
    with native.forced(library if kernels_in_use == "native" else None):
        payload = compressor.extract_(v.clone(), segments, Key(0, 0))
        width = torch.int16 if isinstance(compressor, BlockTopK) else torch.int32
        found = compressor._parts(payload, segments)[1]
        first = (found.data_ptr() - payload.data_ptr()) // width.itemsize + 1  # one entry of the first parameter
        last = first + found.numel() - 2
        for place, wrong in ((first, -1), (first, 64), (first, 2**15 - 1), (first + 1, "previous"), (first, "next"), (last, 99)):
            spoilt = payload.clone()
            entries = spoilt.view(width)
            entries[place] = entries[place - 1] if wrong == "previous" else entries[place + 1] if wrong == "next" else wrong
            out = torch.zeros(71)
            with pytest.raises(CompressionError, match=r"layer1\.weight.*must ascend"):
                compressor.add_(out, spoilt, segments, Key(0, 0))
            assert kernels_in_use == "reference" or getattr(compressor, "two_bits", False) or not out.any()
        compressor.add_(torch.zeros(71), payload, segments, Key(0, 0))  # control


@compiled
@pytest.mark.parametrize("kernels_in_use", ["native", "reference"])
@pytest.mark.parametrize("compressor", [*SELECTING, Natural(), Cast(), QSGD(5, 7), Sign("l1", 5), Ternary()], ids=str)
def test_payloads_that_are_too_short_or_of_another_kind_are_errors(compressor: Any, kernels_in_use: str) -> None:
    segments = table([7, 640], torch.float32)
    with native.forced(library if kernels_in_use == "native" else None):
        payload = compressor.extract_(values("gaussian", 647, torch.float32), segments, Key(0, 0))
        for numel in (payload.numel() - (8 if payload.dtype == torch.uint8 else 1), 0):
            with pytest.raises(CompressionError, match="payload has"):
                compressor.add_(torch.zeros(647), payload[:numel].clone(), segments, Key(0, 0))
        for wrong in (payload.double(), payload.repeat(2)[::2]):
            with pytest.raises(CompressionError, match="payload has"):
                compressor.add_(torch.zeros(647), wrong, segments, Key(0, 0))
        compressor.add_(torch.zeros(647), payload, segments, Key(0, 0))


@compiled
def test_a_table_beyond_the_buffer_is_an_error() -> None:
    with native.forced(library), pytest.raises(CompressionError, match="buffer of 70"):
        Sign().extract_(torch.zeros(70), table([71], torch.float32), Key(0, 0))


def python(code: str, folder: Path = REPO, arguments: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "HVD_ECSGD_KERNELS"} | {"PYTHONPATH": str(folder)} | env
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


def test_what_the_environment_asks_for() -> None:
    """A word that means nothing is an error when the package is imported, and native where that cannot be."""
    assert chosen("reference") is None
    with pytest.raises(CompressionError, match="must be native or reference, or not be set"):
        chosen("fast")
    done = python("import hvd_ecsgd", HVD_ECSGD_KERNELS="nativ")
    assert done.returncode != 0
    assert "got 'nativ'" in done.stderr


def test_without_the_library_the_reference_runs_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a place where nothing was built; asked for, it is an error with the remedy."""
    monkeypatch.setattr(kernels.library, "FILE", tmp_path / "not_built.so")
    monkeypatch.setattr(kernels.library, "_missing", "")
    with pytest.raises(CompressionError, match=r"HVD_ECSGD_KERNELS=native.*setup\.py build_ext --inplace"):
        chosen("native")
    assert chosen(None) is None
    with native.forced(None), pytest.warns(UserWarning, match="without its compiled kernels") as told:
        for _ in range(2):
            Sign().extract_(torch.ones(8), table([8], torch.float32), Key(0, 0))
    assert len(told) == 1


@compiled
def test_a_library_of_other_sources_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    (folder / "csrc").mkdir(parents=True)
    (folder / FILE.name).write_bytes(FILE.read_bytes())
    for source in (REPO / "hvd_ecsgd/kernels/csrc").iterdir():
        (folder / "csrc" / source.name).write_bytes(source.read_bytes())
    Library(folder / FILE.name)  # control
    (folder / "csrc" / "sign.h").write_text("// changed\n")
    with pytest.raises(OSError, match="built from other sources"):
        Library(folder / FILE.name)


@compiled
def test_threads_work_after_a_fork() -> None:
    """A child has none of its parent's threads. (torch's own threads do not survive it, so nothing here uses them.)"""
    torch.set_num_threads(2)
    v = np.arange(100_000, dtype=np.float32) - 5e4  # of less than a thread of torch is woken for, payload included
    segments = Segments.of([("v", torch.from_numpy(v))])

    def payload() -> bytes:
        return bytes(Sign().extract_(torch.from_numpy(v.copy()), segments, Key(0, 0)).numpy().tobytes())

    with native.forced(library):
        expected = payload()
        with forked(lambda said: said.send_bytes(payload())) as child:
            assert child.recv_bytes() == expected
        assert payload() == expected


UNDER_SANITIZERS = """
    import os, sys, pathlib, torch
    from hvd_ecsgd.errors import CompressionError
    from hvd_ecsgd.kernels import library, native
    from tests.unit import test_accumulate, test_decoding, test_kernels as tests, test_move, test_shift, test_unread
    library.digest_of_sources = lambda folder: ""
    made = library.Library(pathlib.Path(sys.argv[1]))
    made.limit_variant(sys.argv[2])
    generator = torch.Generator().manual_seed(0)
    refused = 0
    with native.forced(made):
        for compressor in [*tests.SELECTING, *tests.ROUNDING, *tests.SCALED, *tests.NORMED]:
            for dtype in (torch.float32, torch.float64):
                segments = tests.table([3, 0, 66, 200, 1500], dtype).piece(1, 2).compact
                for kind in tests.KINDS:
                    v = tests.values(kind, segments.numel, dtype)
                    payload = compressor.extract_(v, segments, tests.KEY)
                    compressor.add_(torch.zeros_like(v), payload, segments, tests.KEY, 0.5)
                    compressor.assign_(torch.empty_like(v), payload, segments, tests.KEY, 0.5)
                for i in range(8):  # garbage: a few bytes, or all
                    spoilt = payload.clone()
                    if spoilt.numel():
                        raw = spoilt.view(torch.uint8)
                        n = raw.numel() if i == 0 else 3
                        raw[torch.randint(raw.numel(), (n,), generator=generator)] = torch.randint(256, (n,), generator=generator, dtype=torch.uint8)
                    for decode in (compressor.add_, compressor.assign_):
                        try:
                            decode(torch.zeros_like(v), spoilt, segments, tests.KEY)
                        except CompressionError:
                            refused += 1
        tests.check_whole_tensors()
        tests.thin_products_everything()
        test_accumulate.accumulate_everything()
        test_unread.extract_everything()
        test_decoding.decode_everything()
        test_shift.shift_everything()
        test_move.move_everything()
        control = os.fork()
        if control == 0:
            made.call("all_finite", 0, torch.zeros(100).data_ptr(), 10_000, 1)
            os._exit(0)
    print("control", os.waitpid(control, 0)[1])
    print("refused", refused)
"""


def preloaded_sanitizer() -> str | None:
    """The runtime that a sanitized library needs in a process that was built without."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, timeout=600).stdout.strip()
    return found if os.path.isabs(found) else None


@compiled
@pytest.mark.skipif(preloaded_sanitizer() is None, reason="no g++ with libasan")
def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, the widest variant of this processor, also with payloads that are garbage."""
    assert library is not None
    sources = sorted(str(f) for f in (REPO / "hvd_ecsgd/kernels/csrc").glob("*.cpp"))
    flags = [
        "-std=c++17",
        "-O0",
        "-fPIC",
        "-ffp-contract=off",
        "-shared",
        "-pthread",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ]
    made = tmp_path / "kernels.so"
    command = [os.environ.get("CXX", "g++"), *flags, f"-DHVD_ECSGD_ONLY={VARIANTS.index(library.variant)}", *sources, "-o", str(made)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    env = {"LD_PRELOAD": preloaded_sanitizer() or "", "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    done = python(textwrap.dedent(UNDER_SANITIZERS), arguments=[str(made), library.variant], **env)
    assert done.returncode == 0, done.stderr[-3000:]
    control, refused = map(int, re.findall(r"^(?:control|refused) (\d+)$", done.stdout, re.MULTILINE))
    assert refused > 10, "garbage was not refused"
    assert control != 0 and "AddressSanitizer" in done.stderr


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in whole numbers, as its authors define it."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [p1 >> 32 ^ counter[1] ^ key[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ counter[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_draws_are_philox() -> None:
    """Its authors' example, and any block by itself, also beyond the first chunk; of float64 two words for each."""
    cpu, key, n = torch.device("cpu"), 0xFEDCBA9876543210, 4 * ((1 << 16) + 3) + 1
    assert draws(0, 4, torch.float32, cpu).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    drawn = draws(key, n, torch.float32, cpu)
    assert len(drawn) == n
    for block in (0, 1, 77, (1 << 16) - 1, 1 << 16, (1 << 16) + 2):
        assert drawn[4 * block : 4 * block + 4].tolist() == philox([block, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32])
    wide = draws(key, 100, torch.float64, cpu)
    assert torch.equal(wide & 0xFFFFFFFF, drawn[:200:2]) and torch.equal((wide >> 32) & 0xFFFFFFFF, drawn[1:200:2])
    assert not torch.equal(draws(key + 1, 100, torch.float32, cpu), drawn[:100])
    assert draws(key, 0, torch.float32, cpu).numel() == 0
