"""Steps of a method's own exchange in which some workers send nothing, as they are late; by who is there, and everybody else alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ..core.bucket import Bucket
from ..core.meter import Meter
from ..core.state import MethodState
from ..core.step import BucketStep, drive
from ..optimizer.hyper_parameters import HyperParameters
from ..protocols import Accumulated, GroupSettings
from ..transport import Transport
from .attendance import Together

__all__ = ["Applicable", "PartialSteps"]


@dataclass(frozen=True)
class Applicable:
    """What came of a step, to be applied by the script's thread: by parameter the mean, None where nothing was sent; `means` None of one that was
    undone. `numbers`: the step's hyper-parameters."""

    means: list[tuple[torch.nn.Parameter, torch.Tensor | None]] | None
    numbers: Sequence[float]


class PartialSteps:
    """Takes the steps of the record `state`, with a copy of the hyper-parameters of `optimizer`, which each step is told anew."""

    def __init__(self, state: MethodState, optimizer: torch.optim.Optimizer, transport: Transport) -> None:
        self.state, self.transport = state, transport
        groups = [
            {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        step_groups: Any = SimpleNamespace(param_groups=groups, defaults=optimizer.defaults)
        self._groups, self._numbers = groups, HyperParameters(step_groups)
        self.meter: Meter | None = None

    @torch.no_grad()
    def take(self, together: Together, numbers: Sequence[float], offered: Mapping[int, torch.Tensor]) -> Applicable:
        """Exchange, and keep or undo what the method keeps of it. `offered`: this worker's gradients by id of the parameter, read if it is present.
        Collective."""
        state, ours = self.state, together.present[self.transport.rank]
        self._numbers.adopt(numbers)
        steps = [self._begin(bucket, together.present, offered) for bucket in state.buckets]
        reductions = [step for step in steps if step is not None]
        drive(reductions)
        stands = all(r.task.finite for r in reductions)
        means: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        for bucket, step in zip(state.buckets, steps, strict=True):
            views = [None] * len(bucket.parameters) if step is None or not stands else step.hand_out()
            means += zip(bucket.parameters, views, strict=True)
        for reduction in reductions:
            reduction.task.traffic.dense = reduction.bucket.bytes_without_compression(state.size)
            state.traffic += reduction.task.traffic
            if stands:
                reduction.commit()
            else:
                reduction.undo_(gradients_gone=not ours)
        state.step += 1
        if not stands:
            state.undone += 1
        if self.meter is not None:
            self.meter.exchanged(state, reductions, "stands" if stands else "undone")
            self.meter.end(state)
        if any(mean is not None and mean.is_cuda for _, mean in means):
            torch.cuda.synchronize()
        return Applicable(means if stands else None, numbers)

    def _begin(self, bucket: Bucket, present: Sequence[bool], offered: Mapping[int, torch.Tensor]) -> BucketStep | None:
        """None when the learning rate is 0, and the method keeps state: nothing is sent, and what is kept stays as it is."""
        state, transport = self.state, self.transport
        settings = GroupSettings.of(self._groups[bucket.group])
        if settings.lr == 0 and state.method.stateful:
            return None
        bucket.allocate(transport.rank, transport.size)
        assert bucket.state is not None and bucket.exchange_state is not None
        gauge = None if self.meter is None else self.meter.begin(state, bucket)
        ctx = bucket.context(settings, state.method.seed, state.step, transport.rank, transport.size)
        if bucket.method.exact:
            bucket.remember()
        gradients = [offered[id(p)] for p in bucket.parameters] if present[transport.rank] else []
        residual = bucket.residual
        if gradients:
            accumulated = bucket.method.feedback.accumulate_(bucket.part, gradients, ctx)
            if gauge is not None:
                gauge.accumulated(gradients, accumulated, bucket, settings)
        else:
            if residual is not None and ctx.carry != 1.0:
                residual.mul_(ctx.carry)  # which the rule's `undo_` takes back
            accumulated = Accumulated(bucket.segments.scratch() if residual is None else residual)
        compressor, exchange = bucket.method.at(state.step)
        task = bucket.task(compressor, ctx, accumulated, present=present, silent=not gradients)
        return BucketStep(bucket, task, exchange.run(task, transport), gradients, settings, gauge=gauge)
