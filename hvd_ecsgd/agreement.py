"""How ranks find out that they differ: texts that all compare."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import torch

from .errors import DisagreementError
from .transport.base import Transport

__all__ = ["in_common_order", "packed_text", "raise_on_other_texts"]

T = TypeVar("T")

def packed_text(said: Mapping[str, Any]) -> torch.Tensor:
    """`said` as uint8, for an all-gather that ends in `raise_on_other_texts`."""
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(list(said.items())).encode(), 1)), dtype=torch.uint8)


def _unpacked(text: torch.Tensor) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(bytes(text.tolist()))))


def raise_on_other_texts(packed: Sequence[torch.Tensor]) -> None:
    """`packed`: by rank, what `packed_text` returned there; empty of a rank that has no say. `DisagreementError` with the first difference."""
    parts = {r: p for r, p in enumerate(packed) if p.numel()}
    lowest, first_part = next(iter(parts.items()))
    if all(torch.equal(p, first_part) for p in parts.values()):
        return
    texts = {r: _unpacked(p) for r, p in parts.items()}
    first = texts[lowest]
    for r, other in texts.items():
        for what in [*first, *(k for k in other if k not in first)]:
            if first.get(what) != other.get(what):
                raise DisagreementError(
                    f"ranks do not agree on {what}: rank {lowest} has {first.get(what, 'none')}, rank {r} has {other.get(what, 'none')}. "
                    "Every rank must bind the same model with the same settings (and load the same step)."
                )
    raise DisagreementError("ranks list their parameters in different orders; pass model.named_parameters() on every rank.")


def in_common_order(named: Sequence[tuple[str, T]], transport: Transport) -> list[tuple[str, T]]:
    """`named` in the order of rank 0, by which every rank then makes its buckets; as it is where ranks hold other names. Collective."""
    names = [name for name, _ in named]
    digest = torch.frombuffer(bytearray(blake2b(json.dumps(names).encode(), digest_size=16).digest()), dtype=torch.uint8)
    digests = transport.allgather(digest, "order", [16] * transport.size).wait()
    if all(torch.equal(d, digests[0]) for d in digests):
        return list(named)
    first = _unpacked(transport.allgather(packed_text(dict.fromkeys(names)), "order.names").wait()[0])
    mine = dict(named)
    return [(name, mine[name]) for name in first] if first.keys() == mine.keys() else list(named)
