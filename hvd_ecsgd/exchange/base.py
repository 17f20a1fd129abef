"""What most exchanges have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import CompressionError
from ..protocols import Compressor, Exchange, Feedback, Slots, Steps, Task, settled
from ..segments import Segments
from ..transport.base import Transport, sum_by_rank_, widens

__all__ = ["Faithful", "Skipping", "Stateless", "added_", "check_pair", "nothing"]


def nothing(compressor: Compressor, like: Segments) -> torch.Tensor:
    """The payload of somebody who sends none, or to a server whose pieces are empty."""
    return torch.empty(0, dtype=compressor.payload_dtype(like.dtype), device=like.device)


def added_(task: Task, transport: Transport, payload: torch.Tensor, name: str) -> Steps:
    """The sum over ranks, in place.

    What the network would add in a wider type (halves, under torch.distributed) travels as it is: each rank adds a part of it, and all gather the
    parts. So the bytes are those of an all-reduce, and the bits those of a sum in the order of ranks.
    """
    if not widens(transport, payload):
        total: torch.Tensor = yield transport.allreduce_(payload, name)
        return total
    parts = payload.tensor_split(transport.size)
    mine, sizes = parts[transport.rank], [part.numel() for part in parts]
    was_last, task.last = task.last, False
    rows = yield transport.alltoall(payload, sizes, f"{name}.parts", [mine.numel()] * transport.size)
    task.last = was_last
    sums = yield transport.allgather(sum_by_rank_(mine, rows), f"{name}.sums", sizes)
    return torch.cat(sums, out=payload)


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
