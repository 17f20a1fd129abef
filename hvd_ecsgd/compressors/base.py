"""What several compressors share: defaults, the number of elements a ratio leaves, shared random positions, blocks, exact contractions."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from ..errors import CompressionError
from ..kernels import Native, all_finite, kernels_for
from ..protocols import Compressor, Decoding, Sums
from ..segments import Key, Segment, Segments
from ..verdicts import Verdict

__all__ = [
    "BytePayload",
    "CodePayload",
    "FloatPayload",
    "Operator",
    "check_payload",
    "check_unbiased",
    "below",
    "contraction",
    "distinct_below",
    "kept",
    "n_rows",
    "rows",
    "warn_once",
]

_ZERO_KEY = Key(0, 0)
_warned: set[str] = set()


def check_payload(payload: torch.Tensor, dtype: torch.dtype, size: int, who: str) -> None:
    """Raise unless the `payload` is what decoding will read: contiguous, of `dtype`, of `size` elements or more."""
    if payload.numel() < size or payload.dtype != dtype or not payload.is_contiguous():
        raise CompressionError(
            f"{who}: a payload has {payload.numel()} elements of {payload.dtype} with strides {tuple(payload.stride())}, and {size} of {dtype} were "
            "expected, one after the other: it was cut off on its way, or comes from ranks with other settings."
        )


def check_unbiased(compressor: Compressor, who: str) -> None:
    """Raise unless E C(v) = v: for methods whose analysis, and convergence, rests on it."""
    if not isinstance(compressor, Compressor) or not compressor.unbiased:
        raise CompressionError(
            f"{who}: expected an unbiased compressor (QSGD, Natural, RandomK(unbiased=True), Identity), got {compressor!r}, whose mean is not what "
            "went in: without feedback the difference would be lost in every step. Give it error feedback: Compression(compressor)."
        )


def kept(numel: int, ratio: float) -> int:
    """max(1, ⌊numel/ratio⌋) elements; 0 of an empty segment."""
    return min(numel, max(1, int(numel / ratio)))


def rows(v: torch.Tensor, width: int) -> list[torch.Tensor]:
    """The 1-D `v` cut in blocks of `width`: a matrix with a row for each full block, and one with the last block when that is shorter."""
    full = v.numel() // width * width
    parts = [v[:full].view(-1, width), v[full:].view(1, -1)]
    return [part for part in parts if part.numel()]


def n_rows(numel: int, width: int) -> int:
    """Blocks of `width` that `numel` elements are cut in."""
    return -(-numel // width)


def below(words: np.ndarray, n: int) -> np.ndarray:
    """⌊word·n/2⁶⁴⌋ for uint64 words and n < 2³²: uniform integers in [0, n); no probability is further than 2⁻⁶⁴ from 1/n."""
    high, low = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    return ((high * np.uint64(n) + (low * np.uint64(n) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def distinct_below(key: Key, segment: Segment, n: int, k: int, label: str) -> np.ndarray:
    """k distinct integers in [0, n), every subset equally likely, ascending (int64). n < 2³².

    Integers are drawn one after the other until k different ones have come (of more than n/2, those that stay away are drawn), so the cost is
    O(k log k) and not O(n). Only whole numbers are computed, from a generator whose words are fixed: the same on every platform.
    """
    if 2 * k > n:
        absent = np.ones(n, dtype=bool)
        absent[distinct_below(key, segment, n, n - k, label)] = False
        return np.flatnonzero(absent)
    chosen = np.empty(0, dtype=np.int64)
    source = key.words(segment, label)
    while chosen.size < k:  # never draws more than are missing, so it ends with exactly the first k different ones
        drawn = np.concatenate([chosen, below(source.random_raw(k - chosen.size), n)])
        drawn.sort()
        first = np.ones(drawn.size, dtype=bool)
        np.not_equal(drawn[1:], drawn[:-1], out=first[1:])
        chosen = drawn[first]
    return chosen


def contraction(v: torch.Tensor, left: float) -> float:
    """1 − left/‖v‖², where `left` is E‖C(v) − v‖²; 1 of a zero vector."""
    norm = float(v.double().square().sum())
    return 1.0 - left / norm if norm else 1.0


def warn_once(message: str) -> None:
    """A UserWarning that points at the caller of this package, the first time this message comes in this process."""
    if message in _warned:
        return
    _warned.add(message)
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("hvd_ecsgd."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


class Operator:
    """Mixin: what is true of most compressors. A class says where it differs."""

    @property
    def summable(self) -> bool:
        return False

    @property
    def shared_key(self) -> bool:
        return False

    @property
    def lossless(self) -> bool:
        return False

    @property
    def unbiased(self) -> bool:
        return False

    def check_feedback(self) -> None:
        """It is a contraction."""

    def delta(self, v: torch.Tensor) -> float:
        """1 − ‖C(v) − v‖²/‖v‖², by compressing a float64 copy: for compressors without randomness."""
        residual = v.detach().to(torch.float64, copy=True)
        self.extract_(residual, Segments.of([("v", residual)]), _ZERO_KEY)
        return contraction(v, float(residual.square().sum()))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        raise NotImplementedError

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        self.decode_(out, payload, segments, key, alpha, add=True)

    def assign_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        self.decode_(out, payload, segments, key, alpha, add=False)

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        """`add_`, or `assign_`, of which the bits are those of adding to zeros."""
        raise NotImplementedError


class FloatPayload(Operator):
    """Mixin for payloads that are floating-point elements of the buffer's own type and nothing else."""

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(payload)

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return payload[:1], math.nan


class BytePayload(Operator):
    """Mixin for packed payloads: bytes, in multiples of `PAYLOAD_ALIGNMENT`."""

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8


class CodePayload(BytePayload):
    """Mixin for packed payloads with a code for each element."""

    _who: ClassVar[str]

    def payload_size(self, segments: Segments) -> int:
        raise NotImplementedError

    def decode_all_by(
        self, decoding: Decoding, out: torch.Tensor, payloads: Sequence[torch.Tensor], segments: Segments, alpha: float, add: bool, sums: Sums | None
    ) -> bool:
        """`DecodesAll.decode_all_`, by a kernel that is compiled for the CPU. Raises `CompressionError` when a payload is too short."""
        size = self.payload_size(segments)
        for payload in payloads:
            check_payload(payload, torch.uint8, size, self._who)
        kernels = kernels_for(out, segments, self._who)
        if not isinstance(kernels, Native):
            return False
        kernels.decode_all_(decoding, payloads, alpha, add, sums)
        return True
