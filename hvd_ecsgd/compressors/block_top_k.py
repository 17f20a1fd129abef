"""The largest entries of each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CompressionError
from ..kernels import all_finite
from ..segments import Key, Segments, aligned
from .base import check_ratio, kept

__all__ = ["BlockTopK"]


@dataclass(frozen=True)
class BlockTopK:
    """The max(1, ⌊block/ratio⌋) entries of largest magnitude in each block of `block` consecutive entries; ties to the lowest index.

    The last block of a segment may be shorter; k is computed from its own length. Payload (bytes): the values of all segments in the buffer's
    type, then their positions within the block as int16. Alistarh et al. 2018 (TopK-SGD), who select per block of 512.
    """

    ratio: float = 100.0
    block: int = 512

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "top_k")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or not 1 <= self.block <= 2**15:
            raise CompressionError(f"top_k: block must be an integer from 1 to {2**15} (positions are sent as int16), got {self.block!r}.")

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
        return aligned(self._total(segments) * (segments.dtype.itemsize + 2))

    def _total(self, segments: Segments) -> int:
        """Entries sent."""
        counts = (divmod(s.numel, self.block) for s in segments)
        return sum(full * kept(self.block, self.ratio) + kept(rest, self.ratio) for full, rest in counts)

    def _rows(self, view: torch.Tensor) -> list[torch.Tensor]:
        """The segment as a matrix of whole blocks, and one of the shorter last one; views."""
        whole = view.numel() // self.block * self.block
        parts = [view[:whole].view(-1, self.block), view[whole:].view(1, -1)]
        return [p for p in parts if p.numel()]

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = torch.zeros(self.payload_size(segments), dtype=torch.uint8, device=buffer.device)
        values, positions = self._parts(payload, segments)
        at = 0
        for view in segments.views(buffer):
            for part in self._rows(view):
                k = kept(part.shape[1], self.ratio)
                n = part.shape[0] * k
                chosen = part.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]  # NaN counts as largest
                values[at : at + n] = part.gather(1, chosen).view(-1)
                positions[at : at + n] = chosen.reshape(-1)
                part.scatter_(1, chosen, 0.0)
                at += n
        return payload

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        values, positions = self._parts(payload, segments)
        at = 0
        for view in segments.views(out):
            for part in self._rows(view):
                n, k = part.shape[0], kept(part.shape[1], self.ratio)
                part.scatter_add_(1, positions[at : at + n * k].view(n, k).long(), values[at : at + n * k].view(n, k) * alpha)
                at += n * k

    def finite(self, payload: torch.Tensor, segments: Segments) -> bool:
        return all_finite(self._parts(payload, segments)[0])

    def _parts(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, positions): views of the payload."""
        total, width = self._total(segments), segments.dtype.itemsize
        return payload[: total * width].view(segments.dtype), payload[total * width : total * (width + 2)].view(torch.int16)
