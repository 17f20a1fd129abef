"""Everybody receives everybody's payload."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocols import Steps, Task, Traffic
from ..transport.base import Transport
from ..verdicts import all_of
from .base import Stateless, nothing

__all__ = ["AllGather"]


@dataclass(frozen=True)
class AllGather(Stateless):
    """out = (1/n) Σ C⁻¹(payload of rank r), in rank order. Works with any compressor; bytes received grow with n."""

    waits_once = delivers = survives = True

    def run(self, task: Task, transport: Transport) -> Steps:
        n = transport.size
        payload = nothing(task.compressor, task.segments) if task.absent else task.extract_("gather")
        n_bytes = payload.numel() * payload.element_size()
        task.traffic += Traffic(payload=n_bytes, sent=(n - 1) * n_bytes)
        size = task.compressor.payload_size(task.segments)
        payloads = yield transport.allgather(payload, f"{task.name}.gather", task.sizes(None if size is None else [size] * n))
        sent = [(p, task.ctx.key(task.compressor, "gather", r)) for r, p in enumerate(payloads) if task.present is None or task.present[r]]
        task.finite = all_of(task.compressor.finite(p, task.segments) for p, _ in sent)
        return task.decoded(sent, 1.0 / n)
