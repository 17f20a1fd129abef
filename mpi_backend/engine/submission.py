"""What a rank has handed over, and what of it is on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_ecsgd.transport.base import Handle
from hvd_ecsgd.transport.devices import Marks, current_device, use_device, wait_for

from .negotiation import Request
from .pending import Pending

__all__ = ["InFlight", "Submission"]


@dataclass
class Submission:
    """A request of this rank, with what is needed to run it: tensors to be reduced, or a function that starts it, given everybody's extras."""

    request: Request
    pending: Pending[Any]
    tensors: Sequence[torch.Tensor]
    start: Callable[[Sequence[Any]], Handle[Any]] | None
    since: float
    kind: str
    device: int | None = field(default_factory=current_device)  # of the caller's thread
    given: Marks = field(default_factory=list)  # in CUDA streams that may still be writing the tensors

    @property
    def row(self) -> str:
        """Of the timeline, named as in Horovod's."""
        return f"{self.kind}.{self.request.name}" if self.kind else self.request.name

    @property
    def operation(self) -> str:
        """What Horovod's timeline calls it."""
        return self.kind.removeprefix("grouped_").upper()

    def enter(self) -> None:
        """Be where the caller was: on its device, after what it had started there."""
        use_device(self.device)
        wait_for(self.given)

    def leave(self) -> None:
        """What was started here is over: the caller's stream knows nothing of this thread's."""
        for device, _ in self.given:
            torch.cuda.current_stream(device).synchronize()


@dataclass
class InFlight:
    """Data on its way."""

    handles: list[Handle[Any]]
    submissions: list[Submission]
    finish: Callable[[list[Any]], None]
    what: str
    since: float

    @property
    def pendings(self) -> list[Pending[Any]]:
        return [submission.pending for submission in self.submissions]
