"""Scaling before and after a reduction."""

from __future__ import annotations

import torch

__all__ = ["finish_", "scale_"]


def scale_(t: torch.Tensor, factor: float) -> None:
    """t ← factor · t, as Horovod does: 16-bit floats in float32 and other floats in their own type, integers in float64, truncated towards zero."""
    if factor != 1.0:
        t.copy_(t.double().mul_(factor)) if not t.is_floating_point() else t.mul_(factor)


def finish_(t: torch.Tensor, n: int, factor: float) -> None:
    """t ← factor · t / n; integers, as in Horovod, are truncated towards zero once."""
    if t.is_floating_point():
        scale_(t if n == 1 else t.div_(n), factor)
    elif factor == 1.0:
        t.copy_(torch.div(t, n, rounding_mode="trunc"))
    else:
        t.copy_(t.double().mul_(factor).div_(n))
