"""One step of all parameters on an unmodified Horovod: from the first `compress` to the last `decompress`, and on to the optimizer's step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch

from ..core.guard import Noted
from ..core.step import BucketStep, drive
from ..errors import CompressionError
from .transport import SlotHandle

__all__ = ["Pending", "Phase", "SlotStep"]


class Phase(Enum):
    """Where a step is."""

    COMPRESSING = auto()
    """Gradients come; what they became is on its way."""
    DECOMPRESSING = auto()
    """Results are taken, and no further gradient may come."""
    EXCHANGED = auto()
    """All results were taken, and wait for the optimizer's step."""


@dataclass
class Pending:
    """What travels from `compress` to `decompress` of one parameter."""

    name: str
    gradient: torch.Tensor
    reduction: BucketStep | None
    """None while the learning rate is 0."""
    noted: Noted | None = None
    """The gradient as it was when it was compressed."""

    @property
    def handle(self) -> SlotHandle | None:
        """What Horovod's own all-reduce brings; None for what travels beside it."""
        handle = None if self.reduction is None else self.reduction.pending
        return handle if isinstance(handle, SlotHandle) else None


class SlotStep:
    """A step, by parameter. It begins with a gradient, so there is none without."""

    def __init__(self) -> None:
        self.phase = Phase.COMPRESSING
        self.parts: dict[str, Pending] = {}
        self.undone = False
        """Of a step that is EXCHANGED: some rank held an inf or NaN."""
        self.awaits_synchronize = False
        """`step()` was called: of Horovod's optimizer, which calls `synchronize()` now, before that of the optimizer inside."""
        self._taken = 0

    @property
    def reductions(self) -> list[BucketStep]:
        return [part.reduction for part in self.parts.values() if part.reduction is not None]

    def check_takes(self, name: str) -> None:
        """Raise `CompressionError` unless the parameter's gradient may come now."""
        if self.phase is Phase.DECOMPRESSING:
            raise CompressionError(
                f"parameter '{name}' is compressed before the results of the step before were all taken; call optimizer.step() from one thread only."
            )
        if name in self.parts:
            raise CompressionError(
                f"parameter '{name}' was compressed twice in one step. Give each Horovod optimizer a compression object of its own: "
                "Compression.….bind(model)."
            )

    def finish_what_rides_along(self) -> None:
        """Finish all that travels beside Horovod's own all-reduces, together: waiting parameter by parameter would deadlock."""
        drive(part.reduction for part in self.parts.values() if part.reduction is not None and part.handle is None)

    def take(self) -> bool:
        """A result was taken; returns whether that was the last one."""
        self._taken += 1
        return self._taken == len(self.parts)

    def end(self, undone: bool) -> None:
        self.phase, self.undone = Phase.EXCHANGED, undone
