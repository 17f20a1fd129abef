"""Kernels for GPUs, in Triton. They take and give what the compiled ones for the CPU do; where Triton is missing the reference runs, in torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch

from ...errors import CompressionError
from ...segments import Segment, Segments
from ...verdicts import Verdict, doubt
from .. import reference
from . import tables
from .tables import ROWS, TILE

__all__ = ["Cuda", "available", "why_not"]

_LEAST = (3, 0)
"""Triton as of torch 2.4: fused multiply-adds, exact division, histograms and interleaving are in its language since then."""
_FEW = 1024
"""Programs of a launch that usually does nothing."""
_DIGITS = {torch.float32: (20, 9, 0), torch.float64: (52, 41, 30, 19, 8, 0)}
"""Where the digits of up to 11 bits begin that a magnitude's key (31 or 63 bits) is searched by."""


@lru_cache(maxsize=1)
def _loaded() -> tuple[ModuleType | None, str]:
    """(the loops, '') or (None, why not)."""
    try:
        import triton
    except ImportError as error:
        return None, f"Triton cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _LEAST:
        return None, f"Triton is {triton.__version__}, and {_LEAST[0]}.{_LEAST[1]} or newer is needed (torch 2.4 brings it)"
    from . import loops

    why = _why_nothing_is_launched(loops) if torch.cuda.is_available() else ""
    if why:
        warnings.warn(f"hvd-ecsgd runs without its kernels for GPUs, and slower: {why}", UserWarning, stacklevel=2)
    return (None, why) if why else (loops, "")


def _why_nothing_is_launched(loops: Any) -> str:
    """'' where a kernel can be compiled and launched on this thread's GPU: at a first launch Triton compiles a launcher, too, in C."""
    try:
        told = torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", torch.cuda.current_device()))
        loops.tell[(1,)](told)
        return "" if int(told) == 1 else "a kernel that was launched wrote nothing"
    except Exception as error:
        reason = " ".join(repr(error).split())[:300]
        return f"Triton cannot launch a kernel ({reason}). It needs a C compiler (gcc, clang, or CC names one) and the headers of Python."


def available() -> bool:
    """Whether the kernels can be used: Triton is there, new enough, and can launch one. Says once why not, where it cannot."""
    return _loaded()[0] is not None


def why_not() -> str:
    """Why they cannot; '' where they can."""
    return _loaded()[1]


class Cuda:
    """`Native`'s kernels for a buffer (or result) on a GPU, of float32 or float64, and the table that it is cut by. Not there: products of thin
    matrices, and the largest entries of blocks.

    What is computed stays on the device, and nobody waits for it, but for `threshold`, whose result has a size. Whether gradients were finite is a
    `Verdict`, and positions of a payload that do not ascend are a `doubt`.
    """

    def __init__(self, buffer: torch.Tensor | None, segments: Segments, who: str) -> None:
        ranges = segments.ranges
        if buffer is not None and len(ranges) and int(ranges.sum(1).max()) > buffer.numel():
            raise CompressionError(f"{who}: the table of segments ends at element {int(ranges.sum(1).max())} of a buffer of {buffer.numel()}.")
        self._given, self._segments, self._who = buffer, segments, who
        self._device = segments.device if buffer is None else buffer.device

    # -- launching ----------------------------------------------------------------------------------------------------------------------------------

    def _run(self, name: str, programs: int, *arguments: object, B: int | None = TILE, **constants: object) -> None:
        if programs == 0:
            return
        kernel = getattr(_loaded()[0], name)
        sizes = {} if B is None else {"B": B}
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():  # a launch goes to the thread's GPU
            kernel[(programs,)](*arguments, **sizes, **constants, num_warps=8, enable_fp_fusion=False)

    @property
    def _buffer(self) -> torch.Tensor:
        assert self._given is not None
        return self._given

    def _tiles(self, bits: int = 8, width: int = 0, size: int = TILE) -> torch.Tensor:
        make: Callable[[], torch.Tensor] = lambda: tables.tiles_of(self._segments.ranges, size, self._device, bits, width)  # noqa: E731
        return tables.kept(self._segments, ("tiles", self._device, bits, width, size), make)

    @property
    def _ranges(self) -> torch.Tensor:
        return tables.ranges_on_device(self._segments, self._device)

    def _number(self, value: float) -> torch.Tensor:
        """As float64 on the device, as Triton would make float32 of it."""
        return torch.full((1,), value, dtype=torch.float64, device=self._device)

    def _upload(self, numbers: np.ndarray | Sequence[int]) -> torch.Tensor:
        return tables.upload(numbers, self._device)

    def _keys(self, keys: Sequence[int]) -> torch.Tensor:
        return self._upload(np.array(keys, np.uint64).view(np.int64))

    # -- scales -------------------------------------------------------------------------------------------------------------------------------------

    def _scales(self, out: torch.Tensor, norm: int, width: int = 0, divide: bool = True, count: bool = False) -> None:
        """out ← the scale of each row of `width` elements (0: of each segment)."""

        if 0 < width <= TILE:  # several rows to a program
            place = ("short rows", self._device, width, divide)
            short = tables.kept(self._segments, place, lambda: self._upload(_rows_of(self._segments.ranges, width, divide)))
            wide = 1 << (width - 1).bit_length()
            constants = {"NORM": norm, "DIVIDE": divide, "WIDE": wide, "ROWS": TILE // wide}
            self._run("short_rows", -(-len(short) * wide // TILE), self._buffer, short, out, len(short), B=None, **constants)
            return

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            rows = _rows_of(self._segments.ranges, width, divide) if width else self._segments.ranges
            many = -(-rows[:, 1] // TILE)
            places = np.ascontiguousarray(np.stack([np.cumsum(many) - many, many, rows[:, 1]], 1), np.int64)
            return tables.tiles_of(rows, TILE, self._device), self._upload(places)

        tiles, rows = tables.kept(self._segments, ("rows", self._device, width, divide), make)
        partial = torch.empty(len(tiles), dtype=torch.float64, device=self._device)
        counts = torch.empty(len(tiles) if count else 0, dtype=torch.int32, device=self._device)
        self._run("sums", len(tiles), self._buffer, tiles, partial, counts, NORM=norm, COUNT=count)
        self._run("scales", len(rows), partial, counts, rows, out, NORM=norm, DIVIDE=divide, COUNT=count, B=1024)

    def _split(self, payload: torch.Tensor, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales, and the codes behind them."""
        n_bytes = scales * self._segments.dtype.itemsize
        return payload[:n_bytes].view(self._segments.dtype), payload[n_bytes:]

    def _n_rows(self, width: int, least: int) -> int:
        return sum(max(least, -(-s.numel // width)) if width else 1 for s in self._segments)

    def sign_extract_(self, payload: torch.Tensor, l2: bool, block: int | None) -> None:
        width = block or 0
        scales, codes = self._split(payload, self._n_rows(width, 1))
        self._scales(scales, int(l2), width)
        tiles = self._tiles(1, width)
        self._run("sign_extract", len(tiles), self._buffer, tiles, scales, codes, WIDTH=width)

    def sign_decode_(self, payload: torch.Tensor, block: int | None, alpha: float, add: bool) -> None:
        width = block or 0
        scales, codes = self._split(payload, self._n_rows(width, 1))
        tiles = self._tiles(1, width)
        self._run("sign_decode", len(tiles), self._buffer, tiles, scales, codes, self._number(alpha), WIDTH=width, ADD=add)

    def ternary_extract_(self, payload: torch.Tensor, l2: bool) -> None:
        scales, codes = self._split(payload, len(self._segments))
        self._scales(scales, int(l2), count=True)
        tiles = self._tiles(2)
        self._run("ternary_extract", len(tiles), self._buffer, tiles, scales, codes)

    def ternary_decode_(self, payload: torch.Tensor, alpha: float, add: bool) -> None:
        scales, codes = self._split(payload, len(self._segments))
        tiles = self._tiles(2)
        self._run("ternary_decode", len(tiles), self._buffer, tiles, scales, codes, self._number(alpha), ADD=add)

    def qsgd_extract_(self, payload: torch.Tensor, keys: Sequence[int], levels: int, bucket: int, bits: int, largest: bool) -> None:
        """`keys`: of `draws`, one for each segment. `largest`: the norm is the largest magnitude, else ℓ2."""
        norms, codes = self._split(payload, self._n_rows(bucket, 0))
        self._scales(norms, 2 if largest else 1, bucket, divide=False)
        tiles = self._bucket_tiles(bits, bucket)
        constants = {"LEVELS": levels, "WIDTH": bucket, "BITS": bits, "P": 8 // bits}
        self._run("qsgd_extract", len(tiles), self._buffer, tiles, norms, codes, self._keys(keys), **constants)

    def qsgd_decode_(self, payload: torch.Tensor, levels: int, bucket: int, bits: int, alpha: float, add: bool) -> None:
        norms, codes = self._split(payload, self._n_rows(bucket, 0))
        tiles = self._bucket_tiles(bits, bucket)
        constants = {"LEVELS": levels, "WIDTH": bucket, "BITS": bits, "P": 8 // bits}
        self._run("qsgd_decode", len(tiles), self._buffer, tiles, norms, codes, self._number(alpha), ADD=add, **constants)

    def _bucket_tiles(self, bits: int, bucket: int) -> torch.Tensor:
        """An empty segment has no bucket."""

        def make() -> torch.Tensor:
            many = -(-self._segments.ranges[:, 1] // bucket)
            return tables.tiles_of(self._segments.ranges, TILE, self._device, bits, rows=np.cumsum(many) - many)

        return tables.kept(self._segments, ("buckets", self._device, bits, bucket), make)

    def natural_extract_(self, payload: torch.Tensor, keys: Sequence[int]) -> None:
        """`keys`: of `draws`, one for each segment."""
        tiles, n = self._tiles(1), self._segments.numel
        self._run("natural_extract", len(tiles), self._buffer, tiles, payload[:n], payload[n:], self._keys(keys))

    def natural_decode_(self, payload: torch.Tensor, alpha: float, add: bool) -> None:
        tiles, n = self._tiles(1), self._segments.numel
        self._run("natural_decode", len(tiles), self._buffer, tiles, payload[:n], payload[n:], self._number(alpha), ADD=add)

    def cast_extract_(self, payload: torch.Tensor, limit: float) -> None:
        """`limit`: magnitudes beyond it are sent as that; inf for none. `payload`: float16 or bfloat16."""
        tiles, brain = self._tiles(), payload.dtype == torch.bfloat16
        self._run("cast_extract", len(tiles), self._buffer, tiles, payload.view(torch.int16), self._number(limit), BRAIN=brain)

    def cast_decode_(self, payload: torch.Tensor, alpha: float, add: bool) -> None:
        tiles, brain = self._tiles(), payload.dtype == torch.bfloat16
        self._run("cast_decode", len(tiles), self._buffer, tiles, payload.view(torch.int16), self._number(alpha), BRAIN=brain, ADD=add)

    # -- the feedback rules' ------------------------------------------------------------------------------------------------------------------------

    def accumulate_(
        self,
        momentum: torch.Tensor | None,
        displacement: torch.Tensor | None,
        gradients: Sequence[torch.Tensor],
        points: Sequence[torch.Tensor] | None,
        factors: np.ndarray,
    ) -> Verdict:
        """See `Addition`; the tensors by segment are each of one type (`common_type`). False, on the device, when a gradient is not finite.

        One pass: a tile of gradients is looked at before it is written. Where one reaches 2¹⁶, or is not finite, its tile waits until all were looked
        at; then the rest is added, or what was added is taken away again. The device decides, in two further launches, which do nothing otherwise.
        """
        loops, tiles = _loaded()[0], self._tiles()
        if not len(tiles):
            return True
        given, at = self._in_one_piece(gradients), None if points is None else self._in_one_piece(points)
        places = self._pointers(given), self._pointers(at or given)
        kinds = {"G": _type_of(loops, given[0].dtype), "X": _type_of(loops, (at or given)[0].dtype)}
        has = {"HAS_M": momentum is not None, "HAS_D": displacement is not None, "HAS_X": points is not None}
        has |= {"CARRY": bool(factors[0] != 0), "GRADIENT": bool(factors[1] != 0)}
        done = torch.empty(len(tiles), dtype=torch.int32, device=self._device)
        flags = torch.zeros(2, dtype=torch.int32, device=self._device)
        e = self._buffer
        m, d = (e if t is None else t for t in (momentum, displacement))  # not read
        by = self._upload(factors)
        state, few = (e, m, d, tiles, *places, by, done, flags), min(len(tiles), _FEW)
        self._run("accumulate", len(tiles), *state, **kinds, **has)
        self._run("look", few, tiles, places[0], done, flags, len(tiles), G=kinds["G"])
        self._run("settle", few, *state, len(tiles), **kinds, **has, MU=bool(factors[3] != 0))
        return flags[1] == 0

    def shift_(self, parameters: Sequence[torch.Tensor], t: torch.Tensor | None = None, factor: float = 0.0) -> list[torch.Tensor]:
        """`parameters` ← the buffer + factor·t, and their `column_sums`; without `t` these alone."""
        given, tiles = self._in_one_piece(parameters), self._tiles()
        if t is not None:
            self._run("shift", len(tiles), self._pointers(given), tiles, self._buffer, t, self._number(factor))
        return [reference.column_sums(p) for p in given]

    def _in_one_piece(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A tensor by segment, in the order of its elements: contiguous ones as they are, others (channels_last) copied."""
        for segment, t in zip(self._segments, tensors, strict=True):
            if t.numel() != segment.numel:
                raise CompressionError(f"{self._who}: parameter '{segment.name}' has {segment.numel} elements, and {t.numel()} came for it.")
        return [t.contiguous() for t in tensors]

    def _pointers(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._upload(np.array([t.data_ptr() for t in tensors], np.int64))

    # -- blocks: one of each segment, counts[i] elements from firsts[i] on, going round at its end; one after the other in the payload ---------------

    def _blocks(self, counts: np.ndarray) -> torch.Tensor:
        def make() -> torch.Tensor:
            return tables.tiles_of(np.ascontiguousarray(np.stack([np.cumsum(counts) - counts, counts], 1)), TILE, self._device)

        return tables.kept(self._segments, ("blocks", self._device, counts.tobytes()), make)

    def take_blocks_(self, counts: np.ndarray, firsts: np.ndarray, payload: torch.Tensor) -> None:
        """`payload` ← the entries of the blocks, which become zero."""
        tiles = self._blocks(counts)
        self._run("take_blocks", len(tiles), self._buffer, self._ranges, self._upload(firsts), tiles, payload)

    def decode_blocks_(self, counts: np.ndarray, firsts: np.ndarray, payload: torch.Tensor, alpha: float, add: bool) -> None:
        """The entries of the blocks += alpha·payload; or these, and zeros elsewhere."""
        tiles = self._blocks(counts)
        if not add:
            self._segments.zero_(self._buffer)
        self._run("add_blocks", len(tiles), self._buffer, self._ranges, self._upload(firsts), tiles, payload, self._number(alpha))

    # -- positions: int32 or uint32, ascending within each segment, one segment after the other -----------------------------------------------------

    def _kth_largest(self, buffer: torch.Tensor, segments: Segments, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys of the ranks[i]-th largest magnitudes of the segments, how many of those equal to it are among the ranks[i] largest)."""
        n, many = len(segments), Cuda(buffer, segments, self._who)._tiles(size=ROWS)
        prefixes, left = torch.zeros(n, dtype=torch.int64, device=self._device), ranks.clone()
        above = 31 if segments.dtype == torch.float32 else 63
        for shift in _DIGITS[segments.dtype]:
            counts = torch.zeros(n, 2048, dtype=torch.int32, device=self._device)
            constants = {"ABOVE": above, "SHIFT": shift, "MASK": (1 << above - shift) - 1, "FIRST": above in (31, 63)}
            self._run("histogram", len(many), buffer, many, prefixes, counts, **constants)
            self._run("select", n, counts, prefixes, left, WIDTH=above - shift, B=None)
            above = shift
        return prefixes, left

    def _above(self, limits: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(of each tile: entries chosen, entries that equal the limit in tiles before it; the limits and the room). Chosen are entries above the
        segment's limit, and the first `room` that equal it."""
        tiles = self._tiles()
        above, equal = (torch.empty(len(tiles), dtype=torch.int64, device=self._device) for _ in range(2))
        self._run("count_above", len(tiles), self._buffer, tiles, limits, above, equal)
        of = tiles[:, 3]
        before = equal.cumsum(0) - equal
        before = before - before[self._first_tiles][of]
        return above + torch.minimum((room[of] - before).clamp_(min=0), equal), before, limits, room

    @property
    def _first_tiles(self) -> torch.Tensor:
        """Of each segment; any for an empty one."""

        def make() -> torch.Tensor:
            many = -(-self._segments.ranges[:, 1] // TILE)
            return self._upload(np.minimum(np.cumsum(many) - many, max(0, int(many.sum()) - 1)))

        return tables.kept(self._segments, ("first", self._device), make)

    def _write(self, found: tuple[torch.Tensor, ...], positions: torch.Tensor) -> None:
        (chosen, before, limits, room), tiles = found, self._tiles()
        first = chosen.cumsum(0) - chosen
        self._run("write_above", len(tiles), self._buffer, tiles, limits, room, before, first, positions)

    def top_k(self, counts: np.ndarray, positions: torch.Tensor, values: torch.Tensor) -> None:
        """`positions` ← those of each segment's counts[i] largest magnitudes, `values` ← these entries, which become zero."""
        self._write(self._above(*self._kth_largest(self._buffer, self._segments, self._upload(counts))), positions)
        self.take_(counts, positions, values)

    def random_k(self, keys: Sequence[int], counts: np.ndarray) -> torch.Tensor:
        """counts[i] positions (int32) of each segment, by Philox words from each of `keys`. Nothing is read back.

        The set is the first counts[i] different ones of the words, or where that is more than half of the segment, all but so many first ones. So
        many are drawn that some would be missing with a probability below 10⁻²⁰.
        """
        numels = self._segments.ranges[:, 1]
        inverted = 2 * counts > numels
        wanted = np.where(inverted, numels - counts, counts)
        drawn = np.array([_enough(int(k), int(n)) for k, n in zip(wanted, numels)], np.int64)
        device, n = self._device, len(numels)
        starts = np.cumsum(drawn) - drawn
        words = torch.empty(int(drawn.sum()), dtype=torch.int64, device=device)
        tiles = tables.kept(
            self._segments,
            ("draws", device, drawn.tobytes()),
            lambda: tables.tiles_of(np.ascontiguousarray(np.stack([starts, drawn], 1)), TILE, device),
        )
        self._run("draw_below", len(tiles), self._ranges, tiles, self._keys(keys), words)
        ordered, order = torch.sort(words, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        in_turn = torch.empty_like(ordered).scatter_(0, order, first.to(torch.int64))  # 1 where a word comes for the first time
        rank = in_turn.cumsum(0)
        segment = ordered >> 32
        at = self._upload(starts)
        before = torch.cat([rank.new_zeros(1), rank])[at]
        chosen = first & (rank[order] - before[segment] <= self._upload(wanted)[segment])
        plain = self._upload((~inverted).astype(np.int64))[segment] > 0
        result = torch.empty(int(counts.sum()) + 1, dtype=torch.int32, device=device)  # what is not chosen goes to the last place
        if not inverted.any():
            place = torch.where(chosen, chosen.cumsum(0) - 1, len(result) - 1)
            return result.scatter_(0, place, (ordered & 0xFFFFFFFF).to(torch.int32))[:-1]
        # Whole segments are marked: those of which more than half is taken, with what is not.
        sizes = np.where(inverted, numels, 0)
        base = np.cumsum(sizes) - sizes
        total = int(sizes.sum())
        marked = torch.ones(total + 1, dtype=torch.bool, device=device)
        marked.scatter_(0, torch.where(chosen & ~plain, self._upload(base)[segment] + (ordered & 0xFFFFFFFF), total), False)
        offsets = self._upload(np.cumsum(counts) - counts)
        taken = chosen & plain
        counted = taken.cumsum(0) - 1
        skipped = torch.cat([counted.new_zeros(1), counted + 1])[at]  # of segments before
        place = torch.where(taken, offsets[segment] + counted - skipped[segment], len(result) - 1)
        result.scatter_(0, place, (ordered & 0xFFFFFFFF).to(torch.int32))
        of = torch.repeat_interleave(torch.arange(n, dtype=torch.int64, device=device), self._upload(sizes), output_size=total)
        counted = marked[:-1].cumsum(0) - 1
        skipped = torch.cat([counted.new_zeros(1), counted + 1])[self._upload(base)]
        place = torch.where(marked[:-1], offsets[of] + counted - skipped[of], len(result) - 1)
        within = torch.arange(total, dtype=torch.int64, device=device) - self._upload(base)[of]
        return result.scatter_(0, place, within.to(torch.int32))[:-1]

    def threshold(
        self, keys: Sequence[int], sampled: np.ndarray, ranks: np.ndarray, take: bool
    ) -> tuple[np.ndarray, Callable[[torch.Tensor, torch.Tensor | None], None]]:
        """(counts, what writes positions, and values if it is to `take` them) of entries that are no zeros and reach the ranks[i]-th largest of a
        sample. The counts are read: a size."""
        device, numels, n = self._device, self._segments.ranges[:, 1], len(keys)
        starts = np.cumsum(sampled) - sampled
        ranges = np.ascontiguousarray(np.stack([starts, sampled], 1))
        drawn = torch.empty(int(sampled.sum()), dtype=self._segments.dtype, device=device)
        whole = (sampled == numels).astype(np.int64)
        make: Callable[[], tuple[Segments, torch.Tensor]] = lambda: (  # noqa: E731
            Segments(tuple(Segment("", *row) for row in ranges.tolist()), self._segments.dtype, device),
            tables.tiles_of(ranges, TILE, device, rows=whole),
        )
        segments, tiles = tables.kept(self._segments, ("sample", device, sampled.tobytes()), make)
        self._run("sample", len(tiles), self._buffer, self._ranges, tiles, self._keys(keys), drawn)
        t, _ = self._kth_largest(drawn, segments, self._upload(np.minimum(ranks, sampled)))
        t = torch.where(self._upload((ranks >= sampled).astype(np.int64)) > 0, 0, t)
        # A NaN is the largest magnitude of a sample, and makes of the threshold one.
        nan = torch.zeros(n, dtype=torch.int64, device=device).index_add_(0, self._numbers(sampled), drawn.isnan().to(torch.int64)) > 0
        inf = 0x7F800000 if drawn.dtype == torch.float32 else 0x7FF0000000000000
        infinite = (t == inf) | (nan & (t > 0))
        # Reaching t is to be above t − 1. One that is not finite tells everybody; the step is undone anyway.
        found = self._above(torch.where(infinite, inf, t.clamp(min=1) - 1), infinite.to(torch.int64))
        counts = torch.zeros(n, dtype=torch.int64, device=device).index_add_(0, self._tiles()[:, 3], found[0])
        host: np.ndarray = counts.cpu().numpy()

        def write(positions: torch.Tensor, values: torch.Tensor | None) -> None:
            self._write(found, positions)
            if take and values is not None:
                self.take_(host, positions, values)

        return host, write

    def _entries(self, counts: np.ndarray, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(positions, their segments, the table)."""
        return positions, self._numbers(counts), self._ranges

    def _numbers(self, counts: np.ndarray) -> torch.Tensor:
        """int32: counts[i] times i."""
        numbers = torch.arange(len(counts), dtype=torch.int32, device=self._device)
        return torch.repeat_interleave(numbers, self._upload(counts), output_size=int(counts.sum()))

    def _at(self, name: str, n: int, *arguments: object) -> None:
        self._run(name, -(-n // 1024), *arguments, n, B=1024)

    def _check(self, entries: tuple[torch.Tensor, ...], n: int) -> None:
        wrong = torch.full((1,), len(self._segments), dtype=torch.int64, device=self._device)
        self._at("check", n, *entries, wrong)

        def error() -> CompressionError:
            segment = self._segments.table[int(wrong)]
            return reference.damaged_positions(segment, segment.numel, self._who)

        doubt(wrong < len(self._segments), error)

    def take_(self, counts: np.ndarray, positions: torch.Tensor, values: torch.Tensor) -> None:
        """`values` ← the entries at `positions`, which become zero."""
        self._at("take", int(counts.sum()), self._buffer, *self._entries(counts, positions), values)

    def decode_at_(self, counts: np.ndarray, positions: torch.Tensor, values: torch.Tensor, alpha: float, add: bool) -> None:
        """The entries at `positions` += alpha·values; or these, and zeros elsewhere."""
        n, entries = int(counts.sum()), self._entries(counts, positions)
        if min(positions.numel(), values.numel()) < n:
            raise CompressionError(f"{self._who}: a payload has {min(positions.numel(), values.numel())} entries, and {n} were expected.")
        self._check(entries, n)
        if not add:
            self._segments.zero_(self._buffer)
        self._at("add_at", n, self._buffer, *entries, values, self._number(alpha))

    def move_(self, counts: np.ndarray, positions: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """The entries of `targets` at `positions` −= the buffer's, which become zero."""
        entries = self._entries(counts, positions)
        self._at("move", int(counts.sum()), self._buffer, *entries, self._pointers(self._in_one_piece(targets)))


def _type_of(loops: ModuleType | None, dtype: torch.dtype) -> Any:
    language = cast(Any, loops).tl
    return {torch.float32: language.float32, torch.float64: language.float64, torch.float16: language.float16, torch.bfloat16: language.bfloat16}[
        dtype
    ]


def _rows_of(ranges: np.ndarray, width: int, least: bool) -> np.ndarray:
    """(start, numel) of each row of `width` elements; with `least` one, which is empty, of an empty segment."""
    many = np.maximum(int(least), -(-ranges[:, 1] // width))
    of = np.repeat(np.arange(len(ranges)), many)
    begin = (np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)) * width
    return np.ascontiguousarray(np.stack([ranges[of, 0] + begin, np.minimum(width, ranges[of, 1] - begin)], 1), np.int64)


def _enough(k: int, n: int) -> int:
    """Draws below n of which k are different, k ≤ n/2, but for a probability below 10⁻²⁰."""
    if k == 0:
        return 0
    mean = -n * math.log1p(-k / n)
    return int(mean + 14 * math.sqrt(mean) + 100)
