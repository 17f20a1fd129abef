"""What ranks average beside the buckets: what a feedback rule does together with the others between steps, and a model's running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..protocols import Part, Traffic
from ..segments import Key
from ..transport.base import Transport
from .state import MethodState
from .step import BucketStep

__all__ = ["average", "between_steps"]

Count = Callable[[Traffic], None]


@torch.no_grad()
def between_steps(state: MethodState, reductions: Sequence[BucketStep], transport: Transport, count: Count) -> None:
    """What the feedback rule does after a step in which the buckets of `reductions` were exchanged. `count` is told of the bytes. Collective."""
    moving = {id(r.bucket) for r in reductions}
    buckets = [b for b in state.buckets if b.residual is not None]
    parts = [Part(b.state, b.parameters, b.segments, b.method.lossless, id(b) not in moving) for b in buckets if b.state is not None]
    key = Key(state.method.seed, state.step - 1, transport.rank, "prepare", transport.size)
    for round_, tensors in enumerate(state.method.feedback.between_steps(parts, key) if parts else ()):
        for bucket in buckets:  # a residual that takes up others' is zero no more
            bucket.residual_is_zero = bucket.residual_is_zero and not any(t is bucket.residual for t in tensors)
        handles = [transport.allreduce_(t, f"prepare.{round_}.{i}") for i, t in enumerate(tensors)]
        for t, handle in zip(tensors, handles, strict=True):
            handle.wait().div_(transport.divisor)
            count(Traffic(payload=t.nbytes, sent=2 * (transport.size - 1) * t.nbytes // transport.size))


def average(tensors: Sequence[torch.Tensor], transport: Transport, count: Count) -> None:
    """In place, by one dense all-reduce per type and device. Collective."""
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        members = [t for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.reshape(-1) for t in members])
        count(Traffic(payload=flat.nbytes, sent=2 * (transport.size - 1) * flat.nbytes // transport.size))
        transport.allreduce_(flat, f"statistics.{kind[0]}").wait()
        for t, mean in zip(members, torch.split(flat.div_(transport.size), [t.numel() for t in members]), strict=True):
            t.copy_(mean.view(t.shape))
