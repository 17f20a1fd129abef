"""What most exchanges have in common."""

from __future__ import annotations

from ..protocols import State
from ..segments import Segments

__all__ = ["Faithful", "Skipping", "Stateless"]


class Faithful:
    """Mixin: what the compressor extracts travels as it is, and what it leaves stays in the buffer."""

    @property
    def approximates(self) -> bool:
        return False

    @property
    def settles(self) -> bool:
        return False


class Skipping(Faithful):
    """Mixin: in a step that is skipped the buffer stays as it is."""

    @property
    def approximates(self) -> bool:
        return True


class Stateless(Faithful):
    """Mixin: nothing is kept between steps."""

    def init(self, segments: Segments, rank: int, size: int) -> State:
        return {}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments
