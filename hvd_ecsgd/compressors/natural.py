"""Stochastic rounding to powers of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels import all_finite, cuda_for, draws, kernels_for, negative, pack_bits, unpack_bits
from ..protocols import Decoding, Sums
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict, verdict
from .base import CodePayload, contraction

__all__ = ["Natural"]

_SMALLEST = 2.0**-126
_NOT_FINITE = 255


@dataclass(frozen=True)
class Natural(CodePayload):
    """Every entry rounded to one of the two powers of two around its magnitude, at random so that E C(v) = v; the sign is kept.

    2ᵉ ≤ |v| < 2ᵉ⁺¹ becomes 2ᵉ⁺¹ with probability f = |v|/2ᵉ − 1, else 2ᵉ. E‖C(v) − v‖² = Σ 4ᵉ·f(1 − f): ω ≤ 1/8, hence δ ≥ 7/8 (Gaussian v: .082
    is left), so it bears error feedback.
    Exponents are float32's. Zero stays zero. Below 2⁻¹²⁶ (float32's subnormals) an entry becomes 0 or 2⁻¹²⁶, with probability |v|·2¹²⁶: still
    unbiased, but the relative bound ω does not hold there. What would become 2¹²⁸ or more has no finite representation: it is sent as NaN, so
    that every rank sees the overflow, and stays whole in the residual.
    Payload (bytes): for all segments the 8 exponent bits of each entry (0: zero, 255: not finite); then each segment's signs, 8 to a byte, set bit
    = negative. Every rank rounds with randomness of its own, and decoding needs none. Horváth et al. 2019.
    """

    _who = "natural"

    @property
    def unbiased(self) -> bool:
        return True

    def omega(self, d: int) -> float:
        """1/8, of vectors without entries below 2⁻¹²⁶ (but zeros)."""
        return 0.125

    def delta(self, v: torch.Tensor) -> float:
        """1 − Σ 4ᵉ·f(1 − f)/‖v‖² ≥ 7/8; less, or negative, for entries below 2⁻¹²⁶ only. NaN when an entry may overflow."""
        magnitude = v.detach().double().abs()
        if bool((magnitude > 2.0**127).any()):
            return math.nan
        at_least = magnitude.clamp(min=_SMALLEST)
        step = at_least / (2 * torch.frexp(at_least).mantissa)
        fraction = (magnitude / step).frac()
        return contraction(v, float((step.square() * fraction * (1 - fraction)).sum()))

    def payload_size(self, segments: Segments) -> int:
        return aligned(segments.numel + sum(-(-s.numel // 8) for s in segments))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        if native := kernels_for(buffer, segments, self._who):
            native.natural_extract_(payload, [key.bits(s, "powers") for s in segments])
            return payload
        first, at = 0, segments.numel
        for s, view in zip(segments, segments.views(buffer), strict=True):
            exponents = payload[first : first + s.numel]
            drawn = draws(key.bits(s, "powers"), s.numel, view.dtype, view.device)
            exponents.copy_(_rounded_32(view, drawn) if view.dtype == torch.float32 else _rounded_64(view, drawn))
            bits = negative(view)
            n_bytes = -(-s.numel // 8)
            payload[at : at + n_bytes] = pack_bits(bits)
            decoded = _decoded(exponents, bits, view.dtype)
            view.sub_(decoded if all_finite(decoded) else decoded.nan_to_num_(0.0))
            first += s.numel
            at += n_bytes
        return payload

    def decode_all_(
        self, out: torch.Tensor, payloads: Sequence[torch.Tensor], segments: Segments, alpha: float, *, add: bool, sums: Sums | None = None
    ) -> bool:
        return self.decode_all_by(Decoding("natural"), out, payloads, segments, alpha, add, sums)

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if self.decode_all_(out, [payload], segments, alpha, add=add):
            return
        if cuda := cuda_for(out, segments, self._who):
            return cuda.natural_decode_(payload, alpha, add)
        if not add:
            segments.zero_(out)
        first, at = 0, segments.numel
        for view in segments.views(out):
            n_bytes = -(-view.numel() // 8)
            bits = unpack_bits(payload[at : at + n_bytes], view.numel())
            view.add_(_decoded(payload[first : first + view.numel()], bits, out.dtype), alpha=alpha)
            first += view.numel()
            at += n_bytes

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return segments.numel == 0 or verdict(payload[: segments.numel].max() < _NOT_FINITE)

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return payload[: min(1, segments.numel)], _NOT_FINITE


def _rounded_32(v: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Exponent codes. Adding 23 random bits to the mantissa carries into the exponent with exactly the right probability, subnormals included."""
    magnitude = (v.view(torch.int32) & 0x7FFFFFFF).clamp_(max=_NOT_FINITE << 23)  # a NaN as inf, or the sum would overflow
    magnitude += drawn.bitwise_and_((1 << 23) - 1).to(torch.int32)
    return magnitude >> 23


def _rounded_64(v: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Exponent codes, likewise with 52 random bits; out of float32's range, as the class says."""
    bits = v.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    noise = drawn.bitwise_and_((1 << 52) - 1)
    codes = ((bits + noise) >> 52) - (1023 - 127)
    magnitude = v.abs()
    rounded_up = noise < magnitude * (2.0**126 * 2.0**52)
    codes = torch.where(magnitude < _SMALLEST, rounded_up.to(torch.int64), codes)
    return torch.where(magnitude < math.inf, codes, _NOT_FINITE).clamp_(0, _NOT_FINITE)


def _decoded(exponents: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    words = exponents.to(torch.int32)
    quiet = words.add(1).bitwise_right_shift_(8).bitwise_left_shift_(22)  # makes NaN of 255, where the bits alone would be inf
    words = words.bitwise_left_shift_(23).bitwise_or_(quiet)
    return words.bitwise_or_(bits.to(torch.int32).bitwise_left_shift_(31)).view(torch.float32).to(dtype)
