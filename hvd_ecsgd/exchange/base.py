"""What most exchanges have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import CompressionError
from ..protocols import Compressor, Exchange, Feedback, Slots, settled
from ..segments import Segments

__all__ = ["Faithful", "Skipping", "Stateless", "check_pair", "nothing"]


def nothing(compressor: Compressor, like: Segments) -> torch.Tensor:
    """The payload of somebody who sends none, or to a server whose pieces are empty."""
    return torch.empty(0, dtype=compressor.payload_dtype(like.dtype), device=like.device)


def check_pair(exchange: Exchange, feedback: Feedback, settles: bool) -> None:
    """Raise `CompressionError` where a residual waits for what an exchange does not add to it, or the other way round."""
    if settled(feedback) != settles:
        raise CompressionError(
            f"{feedback} and {exchange} do not go together: CSER() needs ErrorReset(…) or Butterfly(…) as its exchange, and only CSER does."
        )


class Faithful:
    """Mixin: what the compressor extracts travels as it is, and what it leaves stays in the buffer."""

    @property
    def approximates(self) -> bool:
        return False

    def check(self: Exchange, compressor: Compressor, feedback: Feedback) -> None:
        """Any compressor can travel this way."""
        check_pair(self, feedback, settles=False)


class Skipping(Faithful):
    """Mixin: in a step that is skipped the buffer stays as it is."""

    @property
    def approximates(self) -> bool:
        return True


class Stateless(Faithful):
    """Mixin: nothing is kept between steps."""

    def slots(self, size: int) -> Slots:
        return {}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments

    def extracts(self, segments: Segments, size: int) -> Sequence[Segments]:
        """All of the buffer at once."""
        return [segments]
