"""No compression: the payload is the buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..segments import Key, Segments
from .base import FloatPayload

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(FloatPayload):
    """C(v) = v; δ = 1, ω = 0. The payload is the segments' elements, one after the other."""

    @property
    def summable(self) -> bool:
        return True

    @property
    def lossless(self) -> bool:
        return True

    @property
    def unbiased(self) -> bool:
        return True

    def omega(self, d: int) -> float:
        return 0.0

    def payload_size(self, segments: Segments) -> int:
        return segments.numel

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        if segments.in_order and segments.numel == buffer.numel():
            payload = segments.scratch().copy_(buffer)
            buffer.zero_()
            return payload
        payload, at = segments.empty(), 0
        for view in segments.views(buffer):
            payload[at : at + view.numel()] = view
            at += view.numel()
            view.zero_()
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        zero = out.new_zeros(1)  # of one dimension, so that its type counts
        at = 0
        for view in [out] if segments.in_order and segments.numel == out.numel() else segments.views(out):
            torch.add(view if add else zero, payload[at : at + view.numel()], alpha=alpha, out=view)
            at += view.numel()
