"""What workers tell each other when a step begins."""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["Note"]

_TRAINS = 2**62


@dataclass(frozen=True)
class Note:
    """What a worker tells the others when a step begins: those that have joined need it to take part."""

    joined_at: int = _TRAINS
    """The step at which it joined; a later one than any of a worker that trains."""
    scale: float = 0.0
    """Of its GradScaler; 0 without one."""
    growth_tracker: float = 0.0
    hyper_parameters: tuple[float, ...] = ()

    @property
    def trains(self) -> bool:
        return self.joined_at >= _TRAINS

    def pack(self) -> bytes:
        return struct.pack(f"<q{len(self.hyper_parameters) + 2}d", self.joined_at, self.scale, self.growth_tracker, *self.hyper_parameters)

    @staticmethod
    def unpack(packed: bytes) -> Note:
        joined_at, scale, growth_tracker, *hyper_parameters = struct.unpack(f"<q{len(packed) // 8 - 1}d", packed)
        return Note(joined_at, scale, growth_tracker, tuple(hyper_parameters))
