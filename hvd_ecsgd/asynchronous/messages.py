"""What workers and servers tell each other: a head of a few bytes, and the payloads of the buckets, which travel as they are."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from ..errors import TransportError
from ..transport.checksums import checksum_of

__all__ = ["Kind", "Message"]

_MAGIC = b"hvdb"
_HEAD = struct.Struct("<4sBxxxIQIIIQ")
"""Magic, kind, worker, number, how many numbers, absent parameters and payloads follow, and the payloads' checksum."""
_END = struct.Struct("<I")
"""At the end of the head: the CRC of what is before it."""
_PART = struct.Struct("<QQ")
"""Of a payload: the place of its type in `_TYPES`, and its elements."""
_TYPES = (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int16, torch.int8)


class Kind(IntEnum):
    """What a message means. Workers send those up to `LOST`, servers those after it."""

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
    LOST = 9
    """Workers that live have agreed that others (`absent`) have died: whatever comes of those later is too late."""
    MOVE = 10
    """The answer to PULL: payloads that x of the worker moves by."""
    EXACT = 11
    """The answer to PULL_EXACT and FETCH, and to a worker that comes for the first time: x itself, bucket by bucket, in the parameters' type."""


@dataclass
class Message:
    """`worker`: who sends it, or is answered. `number`: how many of the kind there were before, between these two. `numbers`: the worker's
    hyper-parameters, with PUSH; with the answer after one, the staleness with which its gradient was applied. `absent`: places of the parameters
    that had no gradient, with PUSH; workers that have died, with LOST. `payloads`: flat tensors. `sent`: of a message that has come, the checksum of
    what was sent as payloads."""

    kind: Kind
    worker: int
    number: int = 0
    numbers: Sequence[float] = ()
    absent: Sequence[int] = ()
    payloads: Sequence[torch.Tensor] = ()
    sent: int | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads."""
        return sum(p.nbytes for p in self.payloads)

    def head(self) -> bytes:
        """Everything but the payloads' bytes, which follow it one after the other."""
        counts = len(self.numbers), len(self.absent), len(self.payloads)
        head = _HEAD.pack(_MAGIC, self.kind, self.worker, self.number, *counts, checksum_of(self.payloads))
        head += struct.pack(f"<{len(self.numbers)}d{len(self.absent)}I", *self.numbers, *self.absent)
        head += b"".join(_PART.pack(_TYPES.index(p.dtype), p.numel()) for p in self.payloads)
        return head + _END.pack(zlib.crc32(head))

    def check(self, sender: int) -> None:
        """Raise `TransportError`, which names the rank that sent it, unless the payloads that came are those that were sent."""
        if self.sent is not None and self.sent != checksum_of(self.payloads):
            raise TransportError(
                f"asynchronous training: the payloads of a {self.kind.name} of rank {sender} have changed on their way, as their checksum says: the "
                "network, or the memory of a machine, is faulty. Go on from the last checkpoint."
            )

    @staticmethod
    def of_head(head: bytes, most: int) -> Message:
        """The message that `head` begins, with payloads of `most` bytes altogether at most, whose memory is allocated and not written yet.

        Raises `TransportError` for what is no head of this version, or of another length than it says.
        """
        try:
            magic, kind, worker, number, numbers, absent, payloads, sent = _HEAD.unpack_from(head)
            length = _HEAD.size + 8 * numbers + 4 * absent + _PART.size * payloads
            if magic != _MAGIC or length + _END.size != len(head):
                raise ValueError(f"{len(head)} bytes that begin with {magic!r}, {length + _END.size} were expected")
            if _END.unpack_from(head, length)[0] != zlib.crc32(head[:length]):
                raise ValueError("its head has changed on its way, as its checksum says")
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
        empty = [torch.empty(n, dtype=dtype, device="cpu") for dtype, n in sizes]
        return Message(kind, worker, number, told[:numbers], told[numbers:], empty, sent)
