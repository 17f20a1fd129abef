"""This worker's gradients as they are accumulated: of an unscaled loss, and clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..kernels import all_finite
from ..protocols import GroupSettings
from ..verdicts import known
from .bucket import Bucket
from .state import MethodState

__all__ = ["clip_factor", "scale_of", "take_"]


@torch.no_grad()
def clip_factor(state: MethodState, gradients: Sequence[torch.Tensor]) -> float:
    """What `clip_norm` multiplies this worker's gradients of the whole model by, as `torch.nn.utils.clip_grad_norm_` would; 1 without it, and
    where some gradient is not finite."""
    clip_norm = state.method.clip_norm
    if clip_norm is None or not gradients:
        return 1.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    norm = math.hypot(*torch.stack([n.to(norms[0].device) for n in norms]).tolist()) / state.settings(state.buckets[0]).loss_scale
    return min(1.0, clip_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0


@torch.no_grad()
def take_(state: MethodState, bucket: Bucket, gradients: Sequence[torch.Tensor], factor: float = 1.0) -> list[torch.Tensor]:
    """The bucket's gradients for `Aggregator.start`: of an unscaled loss, and clipped, by `factor` and by the method's `clip_value`.

    In place, but for types too narrow for unscaled ones. To be called where the script cannot come in between, as it sees them.
    """
    scale, taken = scale_of(state, state.settings(bucket)), list(gradients)
    if scale != 1.0:
        taken = _unscaled_(taken, scale, bucket.segments.dtype)
    _clipped_(taken, state.method.clip_value, factor)
    return taken


def scale_of(state: MethodState, settings: GroupSettings) -> float:
    """What gradients are divided by before they are accumulated. A method without state or clipping need not know the loss scale."""
    return settings.loss_scale if state.method.stateful or state.method.clips else 1.0


def _clipped_(gradients: Sequence[torch.Tensor], value: float | None, factor: float) -> None:
    """In place: multiplied by `factor`, or clamped to ±`value`. What is not finite stays as it is, since clamping would hide it."""
    if factor != 1.0:
        torch._foreach_mul_(list(gradients), factor)
    if value is not None and known(all_finite(g) for g in gradients):
        torch._foreach_clamp_min_(list(gradients), -value)
        torch._foreach_clamp_max_(list(gradients), value)


def _unscaled_(gradients: Sequence[torch.Tensor], scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of an unscaled loss, so that all state is in true units whatever the scale does: in place, but for types too narrow for them."""
    if wide := [g for g in gradients if g.dtype == dtype]:
        torch._foreach_mul_(wide, 1 / scale)
    return [g if g.dtype == dtype else g.to(dtype).mul_(1 / scale) for g in gradients]
