"""An exchange without state of its own."""

from __future__ import annotations

from ..protocols import State
from ..segments import Segments

__all__ = ["Stateless"]


class Stateless:
    """Mixin: nothing is kept between steps."""

    def init(self, segments: Segments, rank: int, size: int) -> State:
        return {}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments
