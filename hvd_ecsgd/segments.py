"""The unit of mathematics (segment), the table kernels take (segments), and the key all randomness is drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

__all__ = ["Key", "Segment", "Segments", "PAYLOAD_ALIGNMENT", "aligned"]

T = TypeVar("T")

_KINDS = 5
"""Types and sizes of scratch memory that a table keeps, at most: the gradients', payloads', a copy of either, and what a kernel notes."""

PAYLOAD_ALIGNMENT = 8
"""Byte payloads are padded to a multiple of this, so that the payloads of several ranks, one after the other, can be viewed as any dtype."""


def aligned(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment of payloads."""
    return -(-n_bytes // PAYLOAD_ALIGNMENT) * PAYLOAD_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter (or one piece of it), as the range `[start, start + numel)` of a flat buffer.

    `name` is the parameter's name and seeds its randomness; `piece` says which of a segment's pieces this is (two-pass), and seeds too.
    `shape` is the parameter's own shape, for methods that see matrices; a piece is 1-D. `offset` is the place of the first element in the
    model: the compressed parameters, one after the other, in the order they were bound.
    """

    name: str
    start: int
    numel: int
    shape: tuple[int, ...] = ()
    piece: int = 0
    offset: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Segments:
    """The segments of one flat buffer: one dtype, one device. Iterates over `Segment`s.

    `table` need not cover the buffer: `piece(r, n)` is a table over the *same* buffer that names only the r-th pieces. `model_numel`: elements
    of the model in which the segments have their offsets.
    """

    table: tuple[Segment, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    model_numel: int = 0

    @staticmethod
    def of(named: Sequence[tuple[str, torch.Tensor]], offsets: Mapping[str, int] | None = None, model_numel: int = 0) -> Segments:
        """Segments laid one after the other, in the order given, for tensors of one dtype and device. Without `offsets` they are the model."""
        table, start = [], 0
        for name, t in named:
            table.append(Segment(name, start, t.numel(), tuple(t.shape), offset=start if offsets is None else offsets[name]))
            start += t.numel()
        first = named[0][1]
        return Segments(tuple(table), first.dtype, first.device, start if offsets is None else model_numel)

    def __getstate__(self) -> dict[str, object]:
        """Without what is computed or kept: a copy has memory of its own."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def numel(self) -> int:
        """Elements named by the table."""
        return sum(s.numel for s in self.table)

    @cached_property
    def ranges(self) -> np.ndarray:
        """A row for each segment: start and numel (int64), as compiled kernels take them."""
        return np.array([(s.start, s.numel) for s in self.table], np.int64).reshape(-1, 2)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.table)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The segments of `buffer`, as 1-D views."""
        return [buffer[s.start : s.stop] for s in self.table]

    def shaped_views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The segments of `buffer`, as views of the parameters' shapes."""
        return [buffer[s.start : s.stop].view(s.shape) for s in self.table]

    def piece(self, r: int, n: int) -> Segments:
        """The r-th of n pieces of every segment, over the same buffer.

        All pieces but the last ones have ⌈numel/(8n)⌉·8 elements (whole bytes when packed to bits); the last may be shorter or empty: there is
        no padding inside.
        """
        if n == 1:
            return self
        return self._pieces(n)[r]

    def _pieces(self, n: int) -> tuple[Segments, ...]:
        cache: dict[int, tuple[Segments, ...]] = self.__dict__.setdefault("_piece_cache", {})
        if n not in cache:
            tables: list[list[Segment]] = [[] for _ in range(n)]
            for s in self.table:
                length = -(-s.numel // (8 * n)) * 8
                for r in range(n):
                    low, high = min(r * length, s.numel), min((r + 1) * length, s.numel)
                    tables[r].append(Segment(s.name, s.start + low, high - low, (high - low,), r, s.offset + low))
            cache[n] = tuple(replace(self, table=tuple(t)) for t in tables)
        return cache[n]

    @cached_property
    def compact(self) -> Segments:
        """The same segments laid one after the other in a buffer of their own, of `numel` elements."""
        table, start = [], 0
        for s in self.table:
            table.append(replace(s, start=start))
            start += s.numel
        return replace(self, table=tuple(table))

    @cached_property
    def in_order(self) -> bool:
        """They are laid one after the other, beginning at 0."""
        return self.table == self.compact.table

    def moved(self, shifts: tuple[int, ...]) -> Segments:
        """The same segments in another buffer, each so many elements later. What is remembered (`once`) is one for both."""

        def make() -> Segments:
            made = replace(self, table=tuple(replace(s, start=s.start + by) for s, by in zip(self.table, shifts, strict=True)))
            made.__dict__["_once"] = self.__dict__["_once"]
            return made

        return self.once("moved", shifts, make)

    def zero_(self, buffer: torch.Tensor) -> None:
        """The segments of `buffer` become zeros; what is outside of the table is not touched."""
        if self.numel == buffer.numel():
            buffer.zero_()
            return
        for view in self.views(buffer):
            view.zero_()

    def empty(self) -> torch.Tensor:
        """An uninitialised compact buffer."""
        return torch.empty(self.numel, dtype=self.dtype, device=self.device)

    def zeros(self) -> torch.Tensor:
        """A zero compact buffer."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def scratch(self, dtype: torch.dtype | None = None, numel: int | None = None) -> torch.Tensor:
        """An uninitialised compact buffer, of `dtype` or the segments', and of `numel` or the segments' elements. Its memory is taken again when
        nobody refers to it, or to a view of it, any more: what is made in every step costs no allocation then, nor the page faults of a large one."""
        kind = (self.dtype if dtype is None else dtype, self.numel if numel is None else numel)
        kinds: dict[object, list[tuple[torch.Tensor, StorageWeakRef]]] = self.__dict__.setdefault("_scratch", {})
        if kind not in kinds and len(kinds) == _KINDS:
            del kinds[next(iter(kinds))]  # that nobody has asked for the longest
        kept = kinds[kind] = kinds.pop(kind, [])
        i = next((i for i, (_, lent) in enumerate(kept) if lent.expired()), None)  # type: ignore[no-untyped-call]
        buffer = torch.empty(kind[1], dtype=kind[0], device=self.device) if i is None else kept.pop(i)[0]
        alias = from_dlpack(to_dlpack(buffer))  # a storage over the same memory, that lives as long as what is handed out
        kept[:] = [*kept[-1:], (buffer, StorageWeakRef(alias.untyped_storage()))]  # type: ignore[no-untyped-call]
        return alias

    def payload(self, n_bytes: int) -> torch.Tensor:
        """Zeros to write a payload of bytes into, in such memory; on a GPU from torch, which knows what other streams still read."""
        if self.device.type != "cpu":
            return torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)
        return self.scratch(torch.uint8, n_bytes).zero_()

    def uneven_payload(self, n_bytes: int) -> torch.Tensor:
        """The same for one that has another size in every step: a part of memory for up to the next power of two. On the CPU nothing is zeroed."""
        if self.device.type != "cpu":
            return self.payload(n_bytes)
        return self.scratch(torch.uint8, 1 << max(0, n_bytes - 1).bit_length())[:n_bytes]

    def once(self, kind: str, of: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns: made once, and remembered as long as nothing of this `kind` is asked for that is `of` something else."""
        made: dict[str, tuple[Hashable, T]] = self.__dict__.setdefault("_once", {})
        found = made.get(kind)
        if found is None or found[0] != of:
            found = made[kind] = (of, make())
        return found[1]


@dataclass(frozen=True, slots=True)
class Key:
    """Names one draw of randomness: (seed, step, stage[, rank]) and, from the segment, parameter name and piece.

    Counter-based: the same key gives the same numbers in any process and order, so a resumed or skipped step cannot bring ranks apart.
    `rank` is None for randomness shared by all ranks. `stage` tells the passes of an exchange apart. `size`, the number of workers, is no part
    of the draw.
    """

    seed: int
    step: int
    rank: int | None = None
    stage: str = ""
    size: int = 1

    def bits(self, segment: Segment, label: str = "") -> int:
        """64 uniform bits for this segment."""
        text = f"{self.seed}|{self.step}|{self.rank}|{self.stage}|{segment.piece}|{label}|{segment.name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def below(self, segment: Segment, n: int, label: str = "") -> int:
        """A uniform integer in [0, n)."""
        return (self.bits(segment, label) * n) >> 64

    def generator(self, segment: Segment, device: torch.device | str = "cpu", label: str = "") -> torch.Generator:
        """A torch generator of its own for many draws; the global generator is never touched."""
        return torch.Generator(device=device).manual_seed(self.bits(segment, label) >> 1)

    def words(self, segment: Segment, label: str = "") -> np.random.Philox:
        """A source of 64-bit words (`random_raw`) that are the same on every platform and in every version: for draws all ranks must share."""
        return np.random.Philox(key=self.bits(segment, label))
