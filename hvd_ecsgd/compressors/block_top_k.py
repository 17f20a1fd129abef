"""The largest entries of each block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import check_integer, check_ratio
from ..kernels import all_finite, check_rows, native_for, top_k_rows
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict
from .base import BytePayload, check_payload, kept, rows

__all__ = ["BlockTopK"]


@dataclass(frozen=True)
class BlockTopK(BytePayload):
    """The max(1, ⌊block/ratio⌋) entries of largest magnitude in each block of `block` consecutive entries; ties to the lowest index.

    The last block of a segment may be shorter; k is computed from its own length. δ ≥ the smallest k/length of a block. Positions within a block take
    2 bytes, and all blocks are searched at once.
    Payload (bytes): the values of all segments in the buffer's type, then their positions within the block as int16.
    Alistarh et al. 2018 (Top-K SGD); Renggli et al. 2019 (per bucket of 512).
    """

    ratio: float = 100.0
    block: int = 512

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "top_k")
        check_integer(self.block, "top_k: block", least=1, most=2**15)

    def payload_size(self, segments: Segments) -> int:
        return aligned(sum(self._total(s.numel) for s in segments) * (segments.dtype.itemsize + 2))

    def _total(self, numel: int) -> int:
        """Entries sent of a segment."""
        full, rest = divmod(numel, self.block)
        return full * kept(self.block, self.ratio) + kept(rest, self.ratio)

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        if native := native_for(buffer, segments, "top_k"):
            native.block_top_k_extract_(payload, self.block, kept(self.block, self.ratio), self._last(segments))
            return payload
        values, positions = self._parts(payload, segments)
        at = 0
        for view in segments.views(buffer):
            for part in rows(view, self.block):
                k = kept(part.shape[1], self.ratio)
                n = part.shape[0] * k
                chosen = top_k_rows(part, k)
                values[at : at + n] = part.gather(1, chosen).view(-1)
                positions[at : at + n] = chosen.view(-1)
                part.scatter_(1, chosen, 0.0)
                at += n
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        check_payload(payload, torch.uint8, self.payload_size(segments), "top_k")
        if native := native_for(out, segments, "top_k"):
            return native.block_top_k_decode_(payload, self.block, kept(self.block, self.ratio), self._last(segments), alpha, add)
        if not add:
            segments.zero_(out)
        values, positions = self._parts(payload, segments)
        at = 0
        for s, view in zip(segments, segments.views(out), strict=True):
            for part in rows(view, self.block):
                n, k = part.shape[0], kept(part.shape[1], self.ratio)
                chosen = positions[at : at + n * k].view(n, k).long()
                chosen = check_rows(chosen, part.shape[1], s, "top_k")
                part.scatter_add_(1, chosen, values[at : at + n * k].view(n, k) * alpha)
                at += n * k

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(self._parts(payload, segments)[0])

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return self._parts(payload, segments)[0][:1], math.nan

    def _last(self, segments: Segments) -> np.ndarray:
        """Entries of each segment's last block when it is shorter, else 0."""
        return np.array([kept(s.numel % self.block, self.ratio) for s in segments], np.int64)

    def _parts(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, positions): views of the payload."""
        total, width = sum(self._total(s.numel) for s in segments), segments.dtype.itemsize
        return payload[: total * width].view(segments.dtype), payload[total * width : total * (width + 2)].view(torch.int16)
