"""What workers and servers tell each other: a head of a few bytes, and the payloads of the buckets, which travel as they are."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from ..errors import TransportError

__all__ = ["Kind", "Message"]

_MAGIC = b"hvda"
_HEAD = struct.Struct("<4sBxxxIQIII")
"""Magic, kind, worker, number, how many numbers, absent parameters and payloads follow."""
_PART = struct.Struct("<QQ")
"""Of a payload: the place of its type in `_TYPES`, and its elements."""
_TYPES = (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int16, torch.int8)


class Kind(IntEnum):
    """What a message means. Workers send those up to `DONE`, servers those after it."""

    PUSH = 1
    """The payloads of a gradient, in the order of the buckets; one without elements: nothing is sent of its bucket."""
    PULL = 2
    """The worker wants x, to compute a gradient there: it waits until that cannot become too stale."""
    PULL_EXACT = 3
    """The same, uncompressed."""
    FETCH = 4
    """The worker wants x, uncompressed, and computes no gradient there."""
    LEAVE = 5
    """The worker computes no gradient until it pulls again: nobody waits for it meanwhile."""
    SAVE = 6
    """All workers and servers save a checkpoint together; or load one (LOAD)."""
    LOAD = 7
    DONE = 8
    """The worker will never come again."""
    MOVE = 9
    """The answer to PULL: payloads that x of the worker moves by."""
    EXACT = 10
    """The answer to PULL_EXACT and FETCH, and to a worker that comes for the first time: x itself, bucket by bucket, in the parameters' type."""


@dataclass
class Message:
    """`worker`: who sends it, or is answered. `number`: how many of the kind there were before, between these two. `numbers`: the worker's
    hyper-parameters, with PUSH; with the answer after one, the staleness with which its gradient was applied. `absent`: places of the parameters
    that had no gradient, with PUSH. `payloads`: flat tensors."""

    kind: Kind
    worker: int
    number: int = 0
    numbers: Sequence[float] = ()
    absent: Sequence[int] = ()
    payloads: Sequence[torch.Tensor] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads."""
        return sum(p.nbytes for p in self.payloads)

    def head(self) -> bytes:
        """Everything but the payloads' bytes, which follow it one after the other."""
        head = _HEAD.pack(_MAGIC, self.kind, self.worker, self.number, len(self.numbers), len(self.absent), len(self.payloads))
        body = struct.pack(f"<{len(self.numbers)}d{len(self.absent)}I", *self.numbers, *self.absent)
        return head + body + b"".join(_PART.pack(_TYPES.index(p.dtype), p.numel()) for p in self.payloads)

    @staticmethod
    def of_head(head: bytes, most: int) -> Message:
        """The message that `head` begins, with payloads of `most` bytes altogether at most, whose memory is allocated and not written yet.

        Raises `TransportError` for what is no head of this version, or of another length than it says.
        """
        try:
            magic, kind, worker, number, numbers, absent, payloads = _HEAD.unpack_from(head)
            length = _HEAD.size + 8 * numbers + 4 * absent + _PART.size * payloads
            if magic != _MAGIC or length != len(head):
                raise ValueError(f"{len(head)} bytes that begin with {magic!r}, {length} were expected")
            told = struct.unpack_from(f"<{numbers}d{absent}I", head, _HEAD.size)
            parts = [_PART.unpack_from(head, length - _PART.size * (payloads - i)) for i in range(payloads)]
            sizes = [(_TYPES[place], n) for place, n in parts]
            if (total := sum(dtype.itemsize * n for dtype, n in sizes)) > most:
                raise ValueError(f"payloads of {total} bytes, and there can be {most} at most")
            kind = Kind(kind)
        except (struct.error, ValueError, IndexError) as error:
            raise TransportError(
                f"asynchronous training: a message is damaged, or comes from a rank with another version or model: {error}."
            ) from error
        return Message(kind, worker, number, told[:numbers], told[numbers:], [torch.empty(n, dtype=dtype, device="cpu") for dtype, n in sizes])
