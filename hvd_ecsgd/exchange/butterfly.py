"""Butterfly mixing: in every step each worker averages with one other, and after log₂ n steps with all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..arguments import check_integer
from ..compressors import Identity
from ..protocols import Compressor, Feedback, Steps, Task, Traffic
from ..segments import Segments
from ..transport.base import Transport, direct
from ..verdicts import all_of, known, verdict
from .base import Skipping, Stateless, check_pair
from .error_reset import reset_

__all__ = ["Butterfly"]


@dataclass(frozen=True)
class Butterfly(Skipping, Stateless):
    """For the feedback rule `CSER`, p_i = x − e_i: e_i ← e_i − C(e_i)/2 + C(e_j)/2 + δ_i with the step's partner j, so that, uncompressed,
    p_i ← (p_i + p_j)/2 − δ_i, δ_i = ηm_i. In every `period`-th step all meet instead: x ← x − mean_i(e_i + δ_i), e_i ← 0. Zhao, Canny 2013: Butterfly
    Mixing, with the compression and the meetings a *reconstruction*.

    One message of a worker to another in each step, where a ring all-reduce needs 2(n−1). With n a power of two, j is rank XOR 2^(t mod log₂ n) in
    step t, and whatever was there log₂ n steps ago has been averaged among all. With another n, a worker sends to rank + 2^(t mod ⌈log₂ n⌉) and is
    sent to from as far on the other side; after ⌈log₂ n⌉ steps everybody has something of everybody. Either way Σ_i e_i is kept whatever C leaves, so
    mean_i p_i moves as momentum SGD on the mean of the workers' momenta, while the models differ by about what log₂ n steps add.

    x moves in meetings alone: `at("averaged")` shows the model as of the last one, `at("virtual")` the mean of the models as they are. An all-reduce
    of one number goes with each message, since all workers must know of an inf or NaN that one of them has.
    """

    period: int = 64

    def __post_init__(self) -> None:
        check_integer(self.period, "period", "a number of steps from meeting to meeting, an integer ≥ 1", least=1)

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        """Any compressor can travel this way; it is given what it left before."""
        compressor.check_feedback()
        check_pair(self, feedback, settles=True)

    def extracts(self, segments: Segments, size: int) -> Sequence[Segments]:
        """Nothing of the buffer: what travels is the residual."""
        return []

    @staticmethod
    def partners(rank: int, size: int, step: int) -> tuple[int, int]:
        """(whom this rank sends to, who sends to it) in this step, of at least two ranks."""
        rounds = math.ceil(math.log2(size))
        distance = 1 << step % rounds
        if size == 1 << rounds:
            return rank ^ distance, rank ^ distance
        return (rank + distance) % size, (rank - distance) % size

    def run(self, task: Task, transport: Transport) -> Steps:
        transport = direct(transport)
        n, error, ctx, segments = transport.size, task.residual, task.ctx, task.segments
        meeting = n == 1 or (ctx.step + 1) % self.period == 0

        mine = theirs = torch.empty(0, dtype=task.compressor.payload_dtype(segments.dtype), device=segments.device)
        well = task.accumulated.finite
        if not meeting:
            to, source = self.partners(transport.rank, n, ctx.step)
            mine = task.compressor.extract_(segments.scratch().copy_(error), segments, ctx.key(task.compressor, "mix"))
            well = all_of((well, task.compressor.finite(mine, segments)))
        flag = torch.zeros(1, dtype=torch.float32, device=segments.device).masked_fill_(~torch.as_tensor(well, device=segments.device), math.nan)
        told = transport.allreduce_(flag, f"{task.name}.well")
        task.traffic += Traffic(payload=4, sent=2 * (n - 1) * 4 // n)
        if not meeting:
            splits = [mine.numel() if r == to else 0 for r in range(n)]
            size = task.compressor.payload_size(segments)
            expected = None if size is None else [size if r == source else 0 for r in range(n)]
            task.traffic += Traffic(payload=mine.nbytes, sent=mine.nbytes)
            theirs = (yield transport.alltoall(mine, splits, f"{task.name}.mix", expected))[source]
        task.finite = known((verdict(torch.isfinite((yield told))),))
        if not task.finite:
            return task.result().fill_(math.nan)
        if not task.into.is_zero:
            task.into.buffer.zero_()
        task.into.touched = []  # x stays where it is
        if not meeting:
            for payload, rank, half in ((mine, transport.rank, -0.5), (theirs, source, 0.5)):
                key = ctx.key(task.compressor, "mix", rank)
                task.compressor.add_(error, payload, segments, key, half)
                task.undo_by_adding(error, task.compressor, payload, segments, key, -half)
        error.add_(task.buffer)
        task.undo_by(partial(error.sub_, task.buffer))
        if not meeting:
            return task.into.buffer
        return (yield from reset_(task, transport, Identity(), task.into))
