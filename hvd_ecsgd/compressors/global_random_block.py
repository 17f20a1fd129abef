"""Random blocks of the whole model, at places that all workers share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import check_integer, check_ratio
from ..errors import CompressionError
from ..segments import Key, Segment, Segments
from .base import FloatPayload, distinct_below

__all__ = ["GlobalRandomBlock"]

_MODEL = Segment("", 0, 0)
"""The draw belongs to the model and to no parameter."""


@dataclass(frozen=True)
class GlobalRandomBlock(FloatPayload):
    """The model cut in B = `blocks` equal blocks; a shared draw picks max(1, ⌊B/ratio⌋) of them; unscaled. δ = picked/B in expectation.

    The model is all compressed parameters, one after the other, in the order they were bound; block i is its elements from ⌊i·d/B⌋ to
    ⌊(i+1)·d/B⌋ (B is at most d). Element j is sent or not by its place in the model, whatever bucket or piece it is in: results depend neither on
    bucketing nor, beside the pass, on the number of pieces. Hence a parameter may have no element chosen in a step, and the size of its payload
    changes from step to step, equally on all ranks.
    Payload: the chosen elements in ascending place, and one element that is 0, or NaN when the first element is inf or NaN: so it is never
    empty, and a poisoned worker is heard although none of its blocks is chosen.
    Xie et al. 2020 (CSER): globally randomised blockwise sparsifier, GRBS; used by the DEF authors too.
    """

    ratio: float = 64.0
    blocks: int = 1024

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "global_random_block")
        check_integer(self.blocks, "global_random_block: blocks", least=1, most=2**31 - 1)
        if self.blocks < self.ratio:
            raise CompressionError(
                f"global_random_block: one of {self.blocks} blocks is more than a share of 1/{self.ratio:g}; expected blocks ≥ ratio, and "
                "well above it for a ratio that is nearly kept."
            )

    @property
    def summable(self) -> bool:
        return True

    @property
    def shared_key(self) -> bool:
        return True

    def delta(self, v: torch.Tensor) -> float:
        """Of the whole model v."""
        blocks = min(self.blocks, v.numel())
        return self._picked(blocks) / blocks if bool(v.any()) else 1.0

    def _picked(self, blocks: int) -> int:
        return max(1, int(blocks / self.ratio))

    def payload_size(self, segments: Segments) -> None:
        """It depends on the draw."""
        return None

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        ranges = self._ranges(segments, key)
        first = next((buffer[s.start] for s in segments if s.numel), buffer.new_zeros(()))
        payload = torch.cat([*(buffer[low:high] for low, high in ranges), (first * 0.0).view(1)])
        for low, high in ranges:
            buffer[low:high] = 0
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if not add:
            segments.zero_(out)
        at = 0
        for low, high in self._ranges(segments, key):
            out[low:high].add_(payload[at : at + high - low], alpha=alpha)
            at += high - low
        for s in segments:
            out[s.start : s.start + min(1, s.numel)].add_(payload[-1:], alpha=alpha)  # 0, or the NaN of a poisoned worker

    def _ranges(self, segments: Segments, key: Key) -> list[tuple[int, int]]:
        """The chosen blocks' parts of these segments, as ranges of the flat buffer, in the order of the segments."""
        d = segments.model_numel
        blocks = min(self.blocks, d)
        if blocks == 0:
            return []
        chosen = distinct_below(key, _MODEL, blocks, self._picked(blocks), "blocks")
        starts, stops = chosen * d // blocks, (chosen + 1) * d // blocks
        ranges: list[tuple[int, int]] = []
        for s in segments:
            if s.offset + s.numel > d:
                raise CompressionError(
                    f"global_random_block: parameter '{s.name}' ends at element {s.offset + s.numel} of a model of {d}; make the table with "
                    "Segments.of(…, offsets, model_numel)."
                )
            first, last = np.searchsorted(stops, s.offset, "right"), np.searchsorted(starts, s.offset + s.numel, "left")
            for low, high in zip(starts[first:last].tolist(), stops[first:last].tolist(), strict=True):
                low, high = max(low, s.offset), min(high, s.offset + s.numel)
                ranges.append((s.start + low - s.offset, s.start + high - s.offset))
        return ranges
