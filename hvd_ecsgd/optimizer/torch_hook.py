"""What the hooks of DDP and FSDP2 share: a step that is exchanged in torch's backward pass, and ends when an optimizer that is not ours steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.aggregator import Aggregator
from ..core.agreement import in_common_order
from ..core.bound import BoundCompression
from ..core.bucket import Bucket
from ..core.state import MethodState
from ..core.step import BucketStep
from ..errors import CompressionError, DisagreementError
from ..protocols import GroupSettings
from ..transport.torch_dist import TorchTransport
from .executor import Executor
from .step import Outcome, StepExchange

__all__ = ["TorchHook", "mean_of"]


class TorchHook:
    """A driver of `compression` (see `Driver`) over `transport`, to which ranks are told that it is `what`. Collective.

    Those derived from it take gradients, and say which wait for the end of their backward pass.
    """

    def __init__(
        self,
        compression: BoundCompression,
        transport: TorchTransport,
        executor: Executor,
        settings: Callable[[Bucket], GroupSettings],
        what: str,
    ) -> None:
        self.compression = compression
        state = MethodState(
            compression.method,
            in_common_order(compression.named, transport),
            rank=transport.rank,
            size=transport.size,
            settings=settings,
            transport=transport,
        )
        aggregator = Aggregator(state, also={"optimizer": what}, statistics=compression.statistics, averages=compression.averages)
        compression.adopt(aggregator, self)
        self._step = StepExchange(aggregator, transport, executor, None, bytes)
        transport.lend_to(self)
        self._undone = False
        """The step whose gradients are in place was undone."""
        self._refused: CompressionError | None = None
        """Raised when the optimizer steps: torch does not go on after an error in its backward pass."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """None: hyper-parameters are those of the optimizer that is attached to the compression."""
        return None

    @property
    def exchanging(self) -> bool:
        """Always: see `Claimant`."""
        return True

    @property
    def begun(self) -> bool:
        """A backward pass was broken off."""
        return self._step.begun or self._waits()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Driver`."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Gradients are accumulated where torch hands them over."""

    def meet(self, what: str) -> None:
        """See `Driver`."""
        self._step.meeting.before(what)

    def discard(self) -> None:
        """See `Driver`."""
        if self._step.aggregator.step_is_open:
            self._step.meeting.before("discard")
        self._step.discard()
        self._let_go()

    def _waits(self) -> bool:
        """Gradients of a backward pass have come, and its end has not."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Leave the optimizer no gradients: it moves nothing then."""
        raise NotImplementedError

    def _complete(self) -> None:
        """Wait for what was submitted. A step that some rank refused is undone."""
        self._step.drain()
        try:
            outcome = self._step.complete()
        except CompressionError as error:
            if isinstance(error, DisagreementError):
                raise
            outcome, self._refused = Outcome.UNDONE, error
        self._undone = outcome is Outcome.UNDONE

    def _raise_refusal(self) -> None:
        refused, self._refused = self._refused, None
        if refused is not None:
            self._let_go()
            raise refused


def mean_of(reduction: BucketStep | None) -> torch.Tensor | None:
    """What came of a bucket; None where the learning rate is 0, or nobody sent anything."""
    return None if reduction is None or reduction.task.skipped else reduction.out
