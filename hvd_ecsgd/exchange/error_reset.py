"""CSER's exchange: compressed changes in every step, and now and then a compressed reset of the errors that add up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from ..arguments import check_integer
from ..compressors import RandomBlock
from ..errors import CompressionError
from ..protocols import Accumulated, Compressor, Feedback, Result, Reversals, Steps, Task, Traffic
from ..transport.base import Transport, direct
from .all_gather import AllGather
from .all_reduce import AllReduce
from .base import Stateless, check_pair

__all__ = ["ErrorReset", "reset_"]


def _plain(compressor: Compressor) -> AllReduce | AllGather:
    return AllReduce() if compressor.summable else AllGather()


@dataclass(frozen=True)
class ErrorReset(Stateless):
    """For the feedback rule `CSER`: mean C1(δ_i) in every step; what C1 leaves is added to e_i, and in every `period`-th step mean C2(e_i) comes on
    top, and e_i keeps what C2 leaves. Xie, Zheng, Koyejo, Gupta, Li, Lin 2020: CSER, algorithm 2 (partial synchronisation).

    C1 is the method's compressor, C2 is `reset_compressor`; each travels by all-reduce if its payloads add up, else by all-gather. Resets take place
    in steps period−1, 2·period−1, … counted from 0. e_i has the opposite sign of the paper's, which is the same for compressors with C(−v) = −C(v).
    """

    reset_compressor: Compressor = field(default_factory=lambda: RandomBlock(8))
    period: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.reset_compressor, type) or not isinstance(self.reset_compressor, Compressor):
            raise CompressionError(f"reset_compressor: expected an instance from hvd_ecsgd.compressors, got {self.reset_compressor!r}.")
        check_integer(self.period, "period", "a number of steps from reset to reset, an integer ≥ 1", least=1)

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        """Any compressors can travel this way; C2 is given what it left before."""
        self.reset_compressor.check_feedback()
        check_pair(self, feedback, settles=True)

    def run(self, task: Task, transport: Transport) -> Steps:
        transport = direct(transport)
        out = yield from _plain(task.compressor).run(task, transport)
        if not task.finite:  # on all ranks
            return out
        error, left = task.residual, task.buffer
        error.add_(left)
        task.undo_by(partial(error.sub_, left))
        if (task.ctx.step + 1) % self.period:
            return out
        more = yield from reset_(task, transport, self.reset_compressor, Result(task.segments.scratch()))
        task.into.touched = None  # what is reset is elsewhere, too
        return out.add_(more)


def reset_(task: Task, transport: Transport, compressor: Compressor, into: Result) -> Steps:
    """e_i ← e_i − c_i, c_i = C2(e_i) of the `task`'s residuals; returns mean c_i, by which x is to move."""
    reset = Task(
        name=f"{task.name}.reset",
        segments=task.segments,
        compressor=compressor,
        state={},
        # Draws of its own: what C1 has just sent is not what is missing.
        ctx=replace(task.ctx, seed=task.ctx.seed + 1),
        accumulated=Accumulated(task.residual),
        into=into,
        reversals=Reversals(task.residual),
    )
    task.undo_by(reset.reversals.run)
    mean = yield from _plain(compressor).run(reset, transport)
    task.finite = reset.finite
    task.traffic += Traffic(payload=reset.traffic.payload, sent=reset.traffic.sent)
    return mean
