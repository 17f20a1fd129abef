"""Another number of workers: what n workers have not applied yet, cut anew for m.

Results are means over workers, so what the old residuals are still worth is mean_i e_i. Think of a cake of which n workers hold an n-th each, and
cut it again in m: of L = lcm(n, m) thin slices old worker i holds slices i·L/n … and new worker j gets slices j·L/m …, and its residual is the mean
over its slices of their old owners' residuals. So mean_j e'_j = mean_i e_i: exactly where m is a multiple of n (every e'_j is a copy), and otherwise
to one rounding of each element. No element grows, and all new workers carry alike. Worker momentum enters updates in the same way and is cut so too.

What is equal on the old workers (weights, x, momentum after the exchange) is copied. What servers keep of their pieces is put together and cut in the
new pieces, without arithmetic. Counters that do not fit another number of workers start again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..core.bucket import Bucket, part_of
from ..core.state import MethodState
from ..protocols import State

__all__ = ["Done", "Leaf", "in_words", "merge", "recut", "resized_state", "shares"]

Done = dict[str, list[str]]
"""What was done → the slots that it was done to."""


@dataclass(frozen=True)
class Leaf:
    """A saved tensor, or what is made of one, that is read when it is needed. `digest` is equal for equal bits, type and shape."""

    digest: str
    load: Callable[[], Any]

    def then(self, make: Callable[[torch.Tensor], Any]) -> Leaf:
        """What `make` makes of it."""
        return Leaf(self.digest, lambda: make(self.load()))


def shares(rank: int, size: int, saved_size: int) -> dict[int, int]:
    """Old worker → how many of its slices the new worker `rank` of `size` gets."""
    slices = math.lcm(size, saved_size)
    owners = [s * saved_size // slices for s in range(rank * slices // size, (rank + 1) * slices // size)]
    return {owner: owners.count(owner) for owner in dict.fromkeys(owners)}


def recut(values: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """The weighted mean, formed in float64 and rounded once."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        total.add_(value, alpha=weight)
    return total.div_(sum(weights)).to(values[0].dtype)


def merge(trees: Sequence[Any], weights: Sequence[int]) -> Any:
    """One tree of several workers' trees: equal tensors are copied, floating-point ones are recut, and all else is the first one's."""
    first = trees[0]
    if isinstance(first, Leaf):
        if len({t.digest for t in trees}) == 1:
            return first.load()
        values = [t.load() for t in trees]
        alike = all(isinstance(v, torch.Tensor) for v in values) and len({(v.shape, v.dtype) for v in values}) == 1
        return recut(values, weights) if alike and values[0].is_floating_point() else values[0]
    if isinstance(first, Mapping):
        return {k: merge([t[k] for t in trees] if all(k in t for t in trees) else [first[k]], weights) for k in first}
    if isinstance(first, list) and len({len(t) for t in trees}) == 1:
        return [merge(items, weights) for items in zip(*trees)]
    return first


def resized_state(layout: MethodState, saved: Callable[[int], Mapping[str, Any]], saved_size: int) -> tuple[dict[str, Any], Done]:
    """The compression state of `layout`'s rank made from those of `saved_size` old ranks, and what was done.

    `saved(r)`: what `state_dict` returned on old rank r, with `Leaf`s for tensors; only those that are needed are asked for.
    """
    rank, size = layout.rank, layout.size
    weights = shares(rank, size, saved_size)
    olds = [saved(r) for r in weights]
    if not isinstance(olds[0].get("parameters"), Mapping):
        return dict(olds[0]), {}  # prepare_load will say what is wrong with it
    done: dict[str, set[str]] = {"cut anew": set(), "put together and cut in new pieces": set(), "started again": set(), "copied": set()}
    parameters: dict[str, dict[str, Any]] = {}
    for bucket in layout.buckets:
        cut = _Pieces(bucket, rank, size, saved_size)
        for i, segment in enumerate(bucket.segments):
            entries = [old["parameters"][segment.name] for old in olds if segment.name in old["parameters"]]
            if len(entries) < len(olds):
                continue  # nothing was sent for it
            entry = parameters[segment.name] = {}
            for slot, value in entries[0].items():
                if slot in cut.fresh and cut.fresh[slot].dim() == 1 and cut.piecewise:
                    entry[slot] = cut.assemble(i, partial(_tensor, saved, segment.name, slot))
                    done["put together and cut in new pieces"].add(slot)
                    continue
                entry[slot] = merge([e[slot] for e in entries], list(weights.values()))
                if not isinstance(value, Leaf):
                    continue
                same = len({e[slot].digest for e in entries}) == 1
                fresh = cut.part(slot, i) if slot in cut.fresh else None
                if fresh is not None and not (same and fresh.numel() == entry[slot].numel()):
                    entry[slot] = fresh
                    done["started again"].add(slot)
                else:
                    done["copied" if same else "cut anew"].add(slot)
    state = {**olds[0], "rank": rank, "size": size, "parameters": parameters, "with_state": list(parameters)}
    return state, {what: sorted(slots) for what, slots in done.items()}


def in_words(done: Iterable[Done]) -> list[str]:
    """What was done on all ranks. What is copied on some and cut anew or started again on others is more than copied."""
    found: dict[str, set[str]] = {}
    for one in done:
        for what, slots in one.items():
            found.setdefault(what, set()).update(slots)
    found.get("copied", set()).difference_update(*(slots for what, slots in found.items() if what != "copied"))
    return [f"{what}: {', '.join(sorted(slots))}" for what, slots in found.items() if slots]


def _tensor(saved: Callable[[int], Mapping[str, Any]], name: str, slot: str, r: int) -> torch.Tensor:
    t: torch.Tensor = saved(r)["parameters"][name][slot].load()
    return t


class _Pieces:
    """Where the exchange's state of one bucket lay on the old ranks, and lies now."""

    def __init__(self, bucket: Bucket, rank: int, size: int, saved_size: int) -> None:
        exchange, segments = bucket.method.exchange, bucket.segments
        self.fresh: State = bucket.new_exchange_state(rank, size)
        self.now = exchange.state_segments(segments, rank, size)
        self.before = [exchange.state_segments(segments, r, saved_size) for r in range(saved_size)]
        self.piecewise = len({tuple((s.offset, s.numel) for s in table) for table in [self.now, *self.before]}) > 1

    def part(self, slot: str, i: int) -> torch.Tensor:
        return part_of(self.fresh[slot], i, self.now.table[i])

    def assemble(self, i: int, old: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """This rank's new piece of the i-th segment, from the old ranks' pieces that overlap it."""
        mine = self.now.table[i]
        result = torch.zeros(mine.numel, dtype=self.now.dtype, device=self.now.device)
        for r, table in enumerate(self.before):
            piece = table.table[i]
            low, high = max(mine.offset, piece.offset), min(mine.offset + mine.numel, piece.offset + piece.numel)
            if low < high:
                result[low - mine.offset : high - mine.offset] = old(r).reshape(-1)[low - piece.offset : high - piece.offset]
        return result
