"""What several compressors share: a ratio and the number of elements it leaves, and the finiteness of plain payloads."""

from __future__ import annotations

import math

import torch

from ..errors import CompressionError
from ..kernels import all_finite
from ..segments import Segments

__all__ = ["FloatPayload", "check_ratio", "kept"]


def check_ratio(ratio: float, who: str) -> None:
    """Raise unless `ratio` (elements in ÷ elements sent) is a finite number ≥ 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio) or ratio < 1:
        raise CompressionError(
            f"{who}: ratio must be a finite number ≥ 1 (elements in ÷ elements sent), got {ratio!r}. To send 1 % of the elements write ratio=100."
        )


def kept(numel: int, ratio: float) -> int:
    """max(1, ⌊numel/ratio⌋) elements; 0 of an empty segment."""
    return min(numel, max(1, int(numel / ratio)))


class FloatPayload:
    """Mixin for payloads that are floating-point elements of the buffer's own type and nothing else."""

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def finite(self, payload: torch.Tensor, segments: Segments) -> bool:
        return all_finite(payload)
