"""Rounding to 16 bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..arguments import check_choice, check_flag
from ..kernels import all_finite, kernels_for
from ..protocols import Extraction
from ..segments import Key, Segments
from ..verdicts import Verdict
from .base import Operator, check_payload
from .identity import Identity

__all__ = ["Cast"]

_PLAIN = Identity()


@dataclass(frozen=True)
class Cast(Operator):
    """C(v) = v rounded to float16 or bfloat16, to nearest; δ ≈ 1 in range (1 − δ ≤ 2⁻²² and 2⁻¹⁶ among normal numbers of the type).

    Payload: the rounded elements of all segments, in that type. A finite element beyond the type's range (±65504, ±3.39e38) is sent as inf, so
    that every rank sees the overflow, and stays whole in the residual. The sum of an all-reduce can overflow too, with the same effect.
    `saturate` (with feedback): an element beyond 1/n of the range is sent as that, so that a sum over n workers stays finite, and what is cut
    off stays in the residual; without it one overflow would come back with the residual for ever.
    bfloat16 sums in an all-reduce of our own transports only; Horovod has none, see `Compression.bf16`.
    """

    dtype: torch.dtype = torch.float16
    saturate: bool = False

    def __post_init__(self) -> None:
        check_choice(self.dtype, "cast: dtype", (torch.float16, torch.bfloat16))
        check_flag(self.saturate, "cast: saturate")

    @property
    def summable(self) -> bool:
        return True

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype

    def payload_size(self, segments: Segments) -> int:
        return segments.numel

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(payload)

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return payload[:1], math.nan

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload, limit = segments.scratch(self.dtype), self._limit(key)
        if native := kernels_for(buffer, segments, "cast"):
            native.cast_extract_(payload, limit)
            return payload
        at = 0
        for view in segments.views(buffer):
            part = payload[at : at + view.numel()]
            part.copy_(view.clamp(-limit, limit) if self.saturate else view)
            view.sub_(part if all_finite(part) else part.nan_to_num(0.0, 0.0, 0.0))
            at += view.numel()
        return payload

    def extraction(self, segments: Segments, key: Key) -> Extraction:
        return Extraction("cast", segments.scratch(self.dtype), (self.dtype == torch.bfloat16, self._limit(key)))

    def _limit(self, key: Key) -> float:
        """Magnitudes beyond it are sent as that."""
        info = torch.finfo(self.dtype)
        return info.max / key.size * (1 - info.eps) if self.saturate else math.inf  # rounding must not push it back over

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        check_payload(payload, self.dtype, segments.numel, "cast")
        if native := kernels_for(out, segments, "cast"):
            return native.cast_decode_(payload, alpha, add)
        _PLAIN.decode_(out, payload, segments, key, alpha, add=add)
