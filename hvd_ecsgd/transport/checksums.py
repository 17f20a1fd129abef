"""Sums by which whoever receives a message sees that it is another one than was sent."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

__all__ = ["checksum", "checksum_of"]

_MODULO = 2**64


def checksum(t: torch.Tensor) -> int:
    """Of a contiguous tensor's bytes, by one read of it: their sum as whole numbers of eight bytes, modulo 2⁶⁴, and their number.

    A change within eight bytes always changes it, and random ones of more all but one in 2⁶⁴; words that change places do not.
    """
    data = t.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    whole = len(data) // 8 * 8
    words = int(np.add.reduce(data[:whole].view("<u8"), dtype=np.uint64))
    return (words + int.from_bytes(data[whole:].tobytes(), "little") + len(data)) % _MODULO


def checksum_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of several, in their order."""
    total = 0
    for t in tensors:
        total = (3 * total + checksum(t)) % _MODULO  # an odd factor loses nothing
    return total
