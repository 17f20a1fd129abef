"""What most exchanges have in common."""

from __future__ import annotations

from ..protocols import State
from ..segments import Segments

__all__ = ["Faithful", "Stateless"]


class Faithful:
    """Mixin: what the compressor extracts travels as it is, and what it leaves stays in the buffer."""

    @property
    def approximates(self) -> bool:
        return False

    @property
    def settles(self) -> bool:
        return False


class Stateless(Faithful):
    """Mixin: nothing is kept between steps."""

    def init(self, segments: Segments, rank: int, size: int) -> State:
        return {}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments
