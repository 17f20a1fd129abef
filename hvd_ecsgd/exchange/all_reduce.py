"""Payloads that add up ride one ordinary all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CompressionError
from ..protocols import Compressor, Feedback, Steps, Task, Traffic
from ..transport.base import Transport
from .base import Stateless, added_

__all__ = ["AllReduce"]


@dataclass(frozen=True)
class AllReduce(Stateless):
    """out = (1/n) C⁻¹(Σ payloads). Needs a summable compressor."""

    waits_once = delivers = survives = True

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        if not compressor.summable:
            raise CompressionError(f"payloads of {compressor} cannot be added in an all-reduce; use AllGather() or TwoPass() as the exchange.")
        super().check(compressor, feedback)

    def run(self, task: Task, transport: Transport) -> Steps:
        n = transport.size
        payload = task.extract_("reduce", travels_in_place=n > 1)
        n_bytes = payload.numel() * payload.element_size()
        task.traffic += Traffic(payload=n_bytes, sent=2 * (n - 1) * n_bytes // n)
        total = yield from added_(task, transport, payload, f"{task.name}.reduce")
        task.finite = task.compressor.finite(total, task.segments)
        return task.decoded([(total, task.ctx.key(task.compressor, "reduce"))], 1.0 / transport.divisor)
