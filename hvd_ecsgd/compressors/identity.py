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
        if segments.numel == buffer.numel():
            payload = buffer.clone()
            buffer.zero_()
            return payload
        payload, at = segments.empty(), 0
        for view in segments.views(buffer):
            payload[at : at + view.numel()] = view
            at += view.numel()
            view.zero_()
        return payload

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        if segments.numel == out.numel():
            out.add_(payload, alpha=alpha)
            return
        at = 0
        for view in segments.views(out):
            view.add_(payload[at : at + view.numel()], alpha=alpha)
            at += view.numel()
