"""Random block: consecutive entries at a shared random place, so that payloads line up and ride an ordinary all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import check_ratio
from ..kernels import cuda_for
from ..protocols import Places
from ..segments import Key, Segment, Segments
from .base import FloatPayload, check_payload, kept

__all__ = ["RandomBlock"]


@dataclass(frozen=True)
class RandomBlock(FloatPayload):
    """max(1, ⌊d/ratio⌋) consecutive entries of each segment, from a start uniform over all d positions, modulo d; unscaled.

    Every worker draws the same start from (seed, step, parameter name, piece). δ = block/d in expectation. Payload: the blocks, one after the
    other, no indices. Source: the DEF authors' code (Xu, Huang 2021: Detached Error Feedback, their GRBS/random-block sparsifier).
    """

    ratio: float = 64.0

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "random_block")

    @property
    def summable(self) -> bool:
        return True

    @property
    def shared_key(self) -> bool:
        return True

    def delta(self, v: torch.Tensor) -> float:
        return kept(v.numel(), self.ratio) / v.numel() if bool(v.any()) else 1.0

    def payload_size(self, segments: Segments) -> int:
        return sum(kept(s.numel, self.ratio) for s in segments)

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = torch.empty(self.payload_size(segments), dtype=buffer.dtype, device=buffer.device)
        if cuda := cuda_for(buffer, segments, "random_block"):
            cuda.take_blocks_(*self._blocks(segments, key), payload)
            return payload
        at = 0
        for s in segments:
            for low, high in self._ranges(s, key):
                payload[at : at + high - low] = buffer[low:high]
                buffer[low:high] = 0
                at += high - low
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if cuda := cuda_for(out, segments, "random_block"):
            check_payload(payload, segments.dtype, self.payload_size(segments), "random_block")
            return cuda.decode_blocks_(*self._blocks(segments, key), payload, alpha, add)
        if not add:
            segments.zero_(out)
        at = 0
        for s in segments:
            for low, high in self._ranges(s, key):
                out[low:high].add_(payload[at : at + high - low], alpha=alpha)
                at += high - low

    def places(self, payload: torch.Tensor, segments: Segments, key: Key) -> Places:
        ranges = [sorted(self._ranges(s, key)) for s in segments]
        of = [
            torch.arange(low - s.start, high - s.start, dtype=torch.int32, device="cpu")
            for s, some in zip(segments, ranges, strict=True)
            for low, high in some
        ]
        counts = np.array([sum(high - low for low, high in some) for some in ranges], np.int64)
        return Places(counts, torch.cat(of).to(segments.device) if of else torch.empty(0, dtype=torch.int32, device=segments.device))

    def _first(self, s: Segment, key: Key) -> int:
        """Where the block begins within its segment; no draw is needed where it is everything."""
        return 0 if kept(s.numel, self.ratio) == s.numel else key.below(s, s.numel, "block")

    def _blocks(self, segments: Segments, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """(length, first element within the segment) of each segment's block."""
        return np.array([kept(s.numel, self.ratio) for s in segments], np.int64), np.array([self._first(s, key) for s in segments], np.int64)

    def _ranges(self, s: Segment, key: Key) -> list[tuple[int, int]]:
        """The block of this segment as one range of the flat buffer, or two when it wraps around."""
        block = kept(s.numel, self.ratio)
        if block == 0:
            return []
        first = s.start + self._first(s, key)
        if first + block <= s.stop:
            return [(first, first + block)]
        return [(first, s.stop), (s.start, s.start + first + block - s.stop)]
