"""In which order parameters go: rank 0's, on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import torch

from .talk import packed_text, unpacked
from .transport.base import Transport

__all__ = ["in_common_order"]

T = TypeVar("T")


def in_common_order(named: Sequence[tuple[str, T]], transport: Transport) -> list[tuple[str, T]]:
    """`named` in the order of rank 0, by which every rank then makes its buckets; as it is where ranks hold other names. Collective."""
    names = [name for name, _ in named]
    digest = torch.frombuffer(bytearray(blake2b(json.dumps(names).encode(), digest_size=16).digest()), dtype=torch.uint8)
    digests = transport.allgather(digest, "order", [16] * transport.size).wait()
    if all(torch.equal(d, digests[0]) for d in digests):
        return list(named)
    first = unpacked(transport.allgather(packed_text(dict.fromkeys(names)), "order.names").wait()[0])
    mine = dict(named)
    return [(name, mine[name]) for name in first] if first.keys() == mine.keys() else list(named)
