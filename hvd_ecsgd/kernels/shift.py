"""Holding parameters at a shifted point, and telling whether somebody else has written to them since: compiled in one pass, and in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..segments import Segments
from . import native, reference

__all__ = ["shift_", "sums_of"]


def shift_(parameters: Sequence[torch.Tensor], segments: Segments, x: torch.Tensor, t: torch.Tensor, factor: float) -> list[torch.Tensor]:
    """parameters ← x − factor·t, for flat x and t; returns `column_sums` of each as it is then."""
    kernels = native.kernels_for(x, segments, "shift") if native.writable(parameters, segments) and t.dtype == x.dtype and t.is_contiguous() else None
    if kernels is None:
        torch._foreach_copy_(list(parameters), segments.shaped_views(x))
        torch._foreach_add_(list(parameters), segments.shaped_views(t), alpha=-factor)
        return [reference.column_sums(p) for p in parameters]
    sums = kernels.shift_(parameters, t, -factor)
    native.raise_versions(parameters)
    return sums


def sums_of(parameters: Sequence[torch.Tensor], segments: Segments) -> list[torch.Tensor]:
    """`column_sums` of each."""
    kernels = native.kernels_for(None, segments, "shift") if native.writable(parameters, segments) else None
    return [reference.column_sums(p) for p in parameters] if kernels is None else kernels.shift_(parameters)
