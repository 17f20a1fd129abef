"""Rounding to multiples of a fixed step: an error that is small absolutely, not relatively."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..arguments import check_choice, check_number
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict, verdict
from .base import BytePayload

__all__ = ["Rounding"]

_TYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True)
class Rounding(BytePayload):
    """Every entry rounded to the nearest multiple of `step`, halves to the even one; what is beyond `bits` bits saturates.

    No entry's error exceeds step/2 (without saturation), nor the entry itself: δ ≥ 0, and δ = 0 at vectors below step/2, of which nothing is
    sent. With feedback nothing is lost: what is small adds up. `step` is in the unit of the feedback rule (gradient or update).
    Payload (bytes): one integer of `bits` bits for each entry; the smallest one says that the entry is not finite.
    """

    step: float = 1.0
    bits: int = 16

    def __post_init__(self) -> None:
        check_number(self.step, "Rounding: step", "a positive number", lambda step: step > 0)
        check_choice(self.bits, "Rounding: bits", _TYPES)

    def payload_size(self, segments: Segments) -> int:
        return aligned(segments.numel * self.bits // 8)

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        dtype, at = _TYPES[self.bits], 0
        words = payload.view(dtype)
        # 24 bits are what a float32 holds exactly: 2³¹ − 1 itself would be rounded out of range.
        most = min(torch.iinfo(dtype).max, 2**24 if buffer.dtype == torch.float32 else 2**31 - 1)
        for view in segments.views(buffer):
            multiples = view.div(self.step).round_()
            overflow = ~torch.isfinite(view)
            multiples.clamp_(-most, most)
            view.sub_(multiples, alpha=self.step)  # an inf or NaN stays one
            words[at : at + view.numel()] = multiples.nan_to_num_(0.0).to(dtype).masked_fill_(overflow, torch.iinfo(dtype).min)
            at += view.numel()
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if not add:
            segments.zero_(out)
        dtype, at = _TYPES[self.bits], 0
        words = payload.view(dtype)
        for view in segments.views(out):
            part = words[at : at + view.numel()]
            view.add_(part.to(out.dtype).masked_fill_(part == torch.iinfo(dtype).min, math.nan).mul_(self.step), alpha=alpha)
            at += view.numel()

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        dtype = _TYPES[self.bits]
        return segments.numel == 0 or verdict(payload.view(dtype)[: segments.numel].min() > torch.iinfo(dtype).min)

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        dtype = _TYPES[self.bits]
        return payload.view(dtype)[: min(1, segments.numel)], torch.iinfo(dtype).min
