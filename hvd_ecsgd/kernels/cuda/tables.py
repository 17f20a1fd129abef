"""What a launch needs to know of a table of segments, on the device: which program works where. Made once for each table, and kept with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from ...segments import Segments

__all__ = ["ROWS", "TILE", "Tiles", "kept", "ranges_on_device", "tiles_of", "upload"]

TILE = 4096
"""Elements of a program; a multiple of what shares a byte, and of what random numbers are drawn by at once."""
ROWS = 16 * TILE
"""Elements of a program that goes through them in a loop."""

Tiles = torch.Tensor
"""int64, a row for each tile: start in the buffer, elements, start in the segment, segment, first row of the segment, byte of its codes, place in a
payload of elements. `loops` names the columns."""

T = TypeVar("T")


def upload(array: np.ndarray | Sequence[int], device: torch.device) -> torch.Tensor:
    """A copy there, that nobody waits for: int64, or the array's own type."""
    given = torch.from_numpy(np.array(array, np.int64) if not isinstance(array, np.ndarray) else array)
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given.clone()


def kept(segments: Segments, name: tuple[object, ...], make: Callable[[], T]) -> T:
    """`make()`, once for the table."""
    cache: dict[tuple[object, ...], T] = segments.__dict__.setdefault("_device_tables", {})
    if name not in cache:
        cache[name] = make()
    return cache[name]


def ranges_on_device(segments: Segments, device: torch.device) -> torch.Tensor:
    """`segments.ranges`, flat."""
    return kept(segments, ("ranges", device), lambda: upload(segments.ranges.reshape(-1), device))


def tiles_of(ranges: np.ndarray, size: int, device: torch.device, bits: int = 8, width: int = 0, rows: np.ndarray | None = None) -> Tiles:
    """Tiles of up to `size` elements of each range (start, numel). `bits`: of an element's code; each range's codes begin with a byte of their own.
    Rows of `width` elements (0: a range is one) are counted with at least one in each range, or as `rows` says."""
    numels = ranges[:, 1]
    many = -(-numels // size)
    segment = np.repeat(np.arange(len(ranges)), many)
    begin = (np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)) * size
    row = _before(np.maximum(1, -(-numels // width)) if width else np.ones_like(numels)) if rows is None else rows
    columns = [
        ranges[segment, 0] + begin,
        np.minimum(size, numels[segment] - begin),
        begin,
        segment,
        row[segment],
        _before(-(-numels * bits // 8))[segment] + begin * bits // 8,
        _before(numels)[segment] + begin,
    ]
    return upload(np.ascontiguousarray(np.stack(columns, 1), np.int64), device)


def _before(counts: np.ndarray) -> np.ndarray:
    """Σ of the counts before each."""
    result: np.ndarray = np.cumsum(counts) - counts
    return result
