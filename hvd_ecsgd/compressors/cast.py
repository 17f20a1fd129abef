"""Rounding to 16 bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import all_finite
from ..segments import Key, Segments
from .identity import Identity

__all__ = ["Cast"]

_PLAIN = Identity()


@dataclass(frozen=True)
class Cast:
    """C(v) = v rounded to float16; δ ≈ 1 within its range.

    A finite element beyond ±65504 is sent as inf, so that every rank sees the overflow, and stays whole in the residual. The sum of
    an all-reduce can overflow too, with the same effect.
    """

    @property
    def summable(self) -> bool:
        return True

    @property
    def shared_key(self) -> bool:
        return False

    @property
    def lossless(self) -> bool:
        return False

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def payload_size(self, segments: Segments) -> int:
        return segments.numel

    def finite(self, payload: torch.Tensor, segments: Segments) -> bool:
        return all_finite(payload)

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = torch.empty(segments.numel, dtype=torch.float16, device=buffer.device)
        at = 0
        for view in segments.views(buffer):
            part = payload[at : at + view.numel()]
            part.copy_(view)
            view.sub_(part if all_finite(part) else part.nan_to_num(0.0, 0.0, 0.0))
            at += view.numel()
        return payload

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        _PLAIN.add_(out, payload, segments, key, alpha)
