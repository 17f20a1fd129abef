"""Applying an update that holds something in few places."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..protocols import Places
from ..segments import Segments
from . import native

__all__ = ["move_"]


def move_(targets: Sequence[torch.Tensor], update: torch.Tensor, segments: Segments, places: Places) -> None:
    """targets −= update at the `places`, where the flat `update` is zero then: moving by the same places again changes nothing.

    `targets`: a tensor by segment. The bits are those of subtracting all of an update that is zero elsewhere.
    """
    kernels = native.kernels_for(update, segments, "update") if native.writable(targets, segments) else None
    if kernels is not None:
        kernels.move_(places.counts, places.positions, targets)
        native.raise_versions(targets)
        return
    at = 0
    for target, view, count in zip(targets, segments.views(update), places.counts.tolist(), strict=True):
        if count == 0:
            continue
        where = places.positions[at : at + count].long()
        if target.is_contiguous():
            flat = target.view(-1)
            flat.index_copy_(0, where, flat.index_select(0, where).sub_(view.index_select(0, where)))
        else:
            target.sub_(view.view(target.shape))
        view.index_fill_(0, where, 0.0)
        at += count
