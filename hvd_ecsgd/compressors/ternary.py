"""Three values per entry: a scale with the entry's sign, and zero for zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..arguments import check_choice
from ..kernels import Native, all_finite, cuda_for, kernels_for, negative, pack_codes, unpack_codes
from ..protocols import Decoding, Sums, Wanted
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict
from .base import CodePayload, warn_once

__all__ = ["Ternary"]


@dataclass(frozen=True)
class Ternary(CodePayload):
    """s·sign(v), sign(0) = 0, with one scale per segment: s = ‖v‖₂/√nnz (`"l2"`, the DoubleSqueeze authors' code) or ‖v‖₁/nnz (`"l1"`).

    nnz is the number of entries that are not zero; an all-zero segment has s = 0. δ = 2‖v‖₁/(√nnz‖v‖₂) − 1 with ℓ2, which is negative when
    ‖v‖₁ < √nnz‖v‖₂/2 (few entries hold most of the norm): not a contraction in general, so a warning with error feedback. With ℓ1
    δ = ‖v‖₁²/(nnz‖v‖₂²) > 0.
    Payload (bytes): the scales in the buffer's type, then each segment's codes, 4 to a byte: 0 zero, 1 positive, 2 negative.
    Tang et al. 2019 (DoubleSqueeze), their 1-bit compression as coded.
    """

    _who = "ternary"
    scale: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        check_choice(self.scale, "ternary: scale", ("l1", "l2"))

    def check_feedback(self) -> None:
        if self.scale == "l2":
            warn_once(
                f"{self} with error feedback: δ(v) = 2‖v‖₁/(√nnz‖v‖₂) − 1 is negative when few entries hold most of the norm, so it is not a "
                "contraction in general and residuals may grow; scale='l1' always is one."
            )

    def payload_size(self, segments: Segments) -> int:
        return aligned(len(segments) * segments.dtype.itemsize + sum(-(-s.numel // 4) for s in segments))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        if native := kernels_for(buffer, segments, self._who):
            native.ternary_extract_(payload, self.scale == "l2")
            return payload
        scales, at = self._scales(payload, segments)
        for i, view in enumerate(segments.views(buffer)):
            if view.numel() == 0:
                continue
            nonzero = torch.count_nonzero(view).clamp(min=1).to(view.dtype)
            scales[i] = view.abs().sum() / nonzero if self.scale == "l1" else torch.linalg.vector_norm(view) / nonzero.sqrt()
            codes = negative(-view).view(torch.uint8).add(negative(view).view(torch.uint8), alpha=2)
            n_bytes = -(-view.numel() // 4)
            payload[at : at + n_bytes] = pack_codes(codes, 2)
            view.sub_(_signs(codes, view.dtype).mul_(scales[i].nan_to_num(0.0, 0.0, 0.0)))  # what has no finite scale stays whole
            at += n_bytes
        return payload

    def wants(self, tables: Sequence[Segments]) -> Wanted:
        """What a scale is made of."""
        return Wanted(tuple(tables), squares=self.scale == "l2", counts=True)

    def extract_by_sums_(self, buffer: torch.Tensor, segments: Segments, key: Key, sums: Sums) -> torch.Tensor:
        """`extract_` in one pass."""
        native = kernels_for(buffer, segments, self._who)
        if not isinstance(native, Native):
            return self.extract_(buffer, segments, key)
        payload = segments.payload(self.payload_size(segments))
        native.ternary_extract_(payload, self.scale == "l2", sums)
        return payload

    def decode_all_(
        self, out: torch.Tensor, payloads: Sequence[torch.Tensor], segments: Segments, alpha: float, *, add: bool, sums: Sums | None = None
    ) -> bool:
        return self.decode_all_by(Decoding("ternary"), out, payloads, segments, alpha, add, sums)

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if self.decode_all_(out, [payload], segments, alpha, add=add):
            return
        if cuda := cuda_for(out, segments, self._who):
            return cuda.ternary_decode_(payload, alpha, add)
        if not add:
            segments.zero_(out)
        scales, at = self._scales(payload, segments)
        for i, view in enumerate(segments.views(out)):
            if view.numel() == 0:
                continue
            n_bytes = -(-view.numel() // 4)
            signs = _signs(unpack_codes(payload[at : at + n_bytes], view.numel(), 2), view.dtype)
            view.add_(signs.mul_(scales[i]), alpha=alpha)  # a NaN scale times a zero is NaN
            at += n_bytes

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(self._scales(payload, segments)[0])

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return self._scales(payload, segments)[0][:1], math.nan

    def _scales(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, int]:
        """The scales, as a view of the payload, and where the codes begin."""
        n_bytes = len(segments) * segments.dtype.itemsize
        return payload[:n_bytes].view(segments.dtype), n_bytes


def _signs(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0, 1, 2 → 0, 1, −1."""
    return (codes & 1).to(dtype).sub_(codes >> 1)
