"""One bit per entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import CompressionError
from ..kernels import all_finite, negative, pack_bits, signs, unpack_bits
from ..segments import Key, Segments, aligned

__all__ = ["Sign"]


@dataclass(frozen=True)
class Sign:
    """s·sign(v) with sign(0) = +1 and one scale per segment: ‖v‖₁/d (`"l1"`) or ‖v‖₂/√d (`"l2"`).

    δ = ‖v‖₁²/(d‖v‖₂²) for the ℓ1 scale. With the ℓ2 scale δ = 2‖v‖₁/(√d‖v‖₂) − 1, which may be negative: not a contraction in general.
    Payload (bytes): the scales of all segments in the buffer's type, then each segment's signs, 8 to a byte, set bit = negative.
    Seide et al. 2014; Karimireddy et al. 2019 (ℓ1 scale).
    """

    scale: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        if self.scale not in ("l1", "l2"):
            raise CompressionError(f"one_bit: scale must be 'l1' or 'l2', got {self.scale!r}.")

    @property
    def summable(self) -> bool:
        return False

    @property
    def shared_key(self) -> bool:
        return False

    @property
    def lossless(self) -> bool:
        return False

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def payload_size(self, segments: Segments) -> int:
        return aligned(len(segments) * segments.dtype.itemsize + sum(-(-s.numel // 8) for s in segments))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = torch.zeros(self.payload_size(segments), dtype=torch.uint8, device=buffer.device)
        scales, at = self._scales(payload, segments)
        for i, view in enumerate(segments.views(buffer)):
            if view.numel() == 0:
                continue
            scales[i] = view.abs().mean() if self.scale == "l1" else torch.linalg.vector_norm(view) / view.numel() ** 0.5
            bits = negative(view)
            n_bytes = -(-view.numel() // 8)
            payload[at : at + n_bytes] = pack_bits(bits)
            view.sub_(signs(bits, scales[i]))
            at += n_bytes
        return payload

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        scales, at = self._scales(payload, segments)
        for i, view in enumerate(segments.views(out)):
            if view.numel() == 0:
                continue
            n_bytes = -(-view.numel() // 8)
            view.add_(signs(unpack_bits(payload[at : at + n_bytes], view.numel()), scales[i]), alpha=alpha)
            at += n_bytes

    def finite(self, payload: torch.Tensor, segments: Segments) -> bool:
        return all_finite(self._scales(payload, segments)[0])

    def _scales(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, int]:
        """The scales, as a view of the payload, and where the bits begin."""
        n_bytes = len(segments) * segments.dtype.itemsize
        return payload[:n_bytes].view(segments.dtype), n_bytes
