"""One bit per entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..arguments import check_choice, check_integer
from ..kernels import Kernels, Native, all_finite, cuda_for, kernels_for, negative, pack_bits, signs, unpack_bits
from ..protocols import Decoding, Sums, Wanted
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict
from .base import CodePayload, n_rows, rows, warn_once

__all__ = ["Sign"]


@dataclass(frozen=True)
class Sign(CodePayload):
    """s·sign(v) with sign(0) = +1 and one scale per segment, or per block of `block` entries of it: ‖v‖₁/d (`"l1"`) or ‖v‖₂/√d (`"l2"`).

    d is the length of what has a scale; a segment's last block may be shorter. For one scale δ = ‖v‖₁²/(d‖v‖₂²) with ℓ1. With ℓ2
    δ = 2‖v‖₁/(√d‖v‖₂) − 1, which is negative when ‖v‖₁ < √d‖v‖₂/2 (few entries hold most of the norm): not a contraction in general, so a
    warning with error feedback.
    With blocks 1 − δ is the mean of the blocks' 1 − δ, weighted by their ‖v‖₂².
    Payload (bytes): the scales of all segments in the buffer's type, then each segment's signs, 8 to a byte, set bit = negative.
    Seide et al. 2014; Karimireddy et al. 2019 (ℓ1 scale); Zheng, Huang, Kwok 2019 (blockwise).
    """

    _who = "one_bit"
    scale: Literal["l1", "l2"] = "l1"
    block: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.scale, "one_bit: scale", ("l1", "l2"))
        if self.block is not None:
            check_integer(self.block, "one_bit: block", least=1, most=2**31 - 1)

    def check_feedback(self) -> None:
        if self.scale == "l2":
            warn_once(
                f"{self} with error feedback: δ(v) = 2‖v‖₁/(√d‖v‖₂) − 1 is negative when few entries hold most of the norm, so it is not a "
                "contraction in general and residuals may grow; scale='l1' always is one."
            )

    def payload_size(self, segments: Segments) -> int:
        return aligned(self._n_scales(segments) * segments.dtype.itemsize + sum(-(-s.numel // 8) for s in segments))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        if native := self._native(buffer, segments):
            native.sign_extract_(payload, self.scale == "l2", self.block)
            return payload
        scales, at = self._scales(payload, segments)
        i = 0
        for view in segments.views(buffer):
            if view.numel() == 0:
                i += self._blocks(0)
                continue
            bits = negative(view)
            n_bytes = -(-view.numel() // 8)
            payload[at : at + n_bytes] = pack_bits(bits)
            at += n_bytes
            for part, part_bits in self._rows(view, bits):
                s = scales[i : i + part.shape[0]]
                s.copy_(part.abs().mean(1) if self.scale == "l1" else torch.linalg.vector_norm(part, dim=1) / part.shape[1] ** 0.5)
                part.sub_(signs(part_bits, s.nan_to_num(0.0, 0.0, 0.0).unsqueeze(1)))  # what has no finite scale stays whole
                i += part.shape[0]
        return payload

    def wants(self, tables: Sequence[Segments]) -> Wanted | None:
        """What one scale a segment is made of."""
        return Wanted(tuple(tables), squares=self.scale == "l2") if self.block is None else None

    def extract_by_sums_(self, buffer: torch.Tensor, segments: Segments, key: Key, sums: Sums) -> torch.Tensor:
        """`extract_` in one pass."""
        native = self._native(buffer, segments)
        if not isinstance(native, Native):
            return self.extract_(buffer, segments, key)
        payload = segments.payload(self.payload_size(segments))
        native.sign_extract_(payload, self.scale == "l2", self.block, sums)
        return payload

    def decode_all_(
        self, out: torch.Tensor, payloads: Sequence[torch.Tensor], segments: Segments, alpha: float, *, add: bool, sums: Sums | None = None
    ) -> bool:
        return self.decode_all_by(Decoding("sign", (self.block or 0,)), out, payloads, segments, alpha, add, sums)

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if self.decode_all_(out, [payload], segments, alpha, add=add):
            return
        if self._compiled and (cuda := cuda_for(out, segments, self._who)):
            return cuda.sign_decode_(payload, self.block, alpha, add)
        if not add:
            segments.zero_(out)
        scales, at = self._scales(payload, segments)
        i = 0
        for view in segments.views(out):
            if view.numel() == 0:
                i += self._blocks(0)
                continue
            n_bytes = -(-view.numel() // 8)
            bits = unpack_bits(payload[at : at + n_bytes], view.numel())
            at += n_bytes
            for part, part_bits in self._rows(view, bits):
                part.add_(signs(part_bits, scales[i : i + part.shape[0]].unsqueeze(1)), alpha=alpha)
                i += part.shape[0]

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(self._scales(payload, segments)[0])

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return self._scales(payload, segments)[0][:1], math.nan

    @property
    def _compiled(self) -> bool:
        """Blocks that share bytes are taken by kernels as long as they fit into a cache."""
        return self.block is None or self.block % 8 == 0 or self.block <= 2**12

    def _native(self, buffer: torch.Tensor, segments: Segments) -> Kernels | None:
        return kernels_for(buffer, segments, self._who) if self._compiled else None

    def _rows(self, view: torch.Tensor, bits: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        width = view.numel() if self.block is None else self.block
        return list(zip(rows(view, width), rows(bits, width), strict=True))

    def _blocks(self, numel: int) -> int:
        """Scales of a segment; one, which is zero, of an empty segment."""
        return max(1, n_rows(numel, self.block)) if self.block else 1

    def _n_scales(self, segments: Segments) -> int:
        return sum(self._blocks(s.numel) for s in segments)

    def _scales(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, int]:
        """The scales, as a view of the payload, and where the bits begin."""
        n_bytes = self._n_scales(segments) * segments.dtype.itemsize
        return payload[:n_bytes].view(segments.dtype), n_bytes
