"""The compiled kernels, by compressor. What they take and give is what the reference in the compressor's own file does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch

from ..errors import CompressionError
from ..protocols import Decoding, Extraction, Sums
from ..segments import Segments
from ..verdicts import Verdict
from . import cuda, library, reference
from .cuda import Cuda
from .library import Library

__all__ = ["Kernels", "LONGEST_BUCKET", "Native", "all_finite", "common_type", "cuda_for", "fingerprint", "forced", "kernels_for", "native_for",
           "native_library", "raise_versions", "writable"]  # fmt: skip

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_BUFFERS = (torch.float32, torch.float64)

Counts = np.ndarray
"""int64, one for each segment."""

Chosen = Callable[[torch.Tensor, torch.Tensor | None], None]
"""Writes the positions of entries that were chosen, as int32, and their values, which become zero, if they are to be taken: else None."""

LONGEST_BUCKET = 2**15
"""Of QSGD, that `extract_from_` takes."""


def _address(array: np.ndarray) -> int:
    address: int = array.ctypes.data
    return address


def _asked(sums: Sums | None) -> tuple[int, int, int, int]:
    """What kernels are told of sums that they are to write."""
    return (0, 0, 0, 0) if sums is None else (sums.wanted.squares, sums.wanted.counts, _address(sums.totals), _address(sums.nonzero))


class Native:
    """Kernels for one buffer (or result) on the CPU, of float32 or float64, and the table that it is cut by.

    Payloads are flat bytes, but for `Cast`. Raises `CompressionError` that names the parameter where a payload holds what cannot be.
    """

    def __init__(self, library: Library, buffer: torch.Tensor | None, segments: Segments, who: str) -> None:
        ranges = segments.ranges
        if buffer is not None and len(ranges) and int(ranges.sum(1).max()) > buffer.numel():
            raise CompressionError(f"{who}: the table of segments ends at element {int(ranges.sum(1).max())} of a buffer of {buffer.numel()}.")
        self._library, self._segments, self._who = library, segments, who
        self._threads = torch.get_num_threads()
        self._table = (_address(ranges), len(ranges))
        self._buffer = (_TYPES[segments.dtype], 0 if buffer is None else buffer.data_ptr(), *self._table)

    def _call(self, name: str, *arguments: object) -> int:
        result = self._library.call(name, *arguments, self._threads)
        if result < 0:
            segment = self._segments.table[-1 - result]
            raise reference.damaged_positions(segment, segment.numel, self._who)
        return result

    def sign_extract_(self, payload: torch.Tensor, l2: bool, block: int | None, sums: Sums | None = None) -> None:
        """`sums`: of the magnitudes, or `l2` their squares; where they are known the buffer is read once. Likewise of others."""
        self._call("sign_extract", *self._buffer, payload.data_ptr(), l2, block or 0, 0 if sums is None else _address(sums.totals))

    def ternary_extract_(self, payload: torch.Tensor, l2: bool, sums: Sums | None = None) -> None:
        known = (0, 0) if sums is None else (_address(sums.totals), _address(sums.nonzero))
        self._call("ternary_extract", *self._buffer, payload.data_ptr(), l2, *known)

    def qsgd_extract_(self, payload: torch.Tensor, keys: Sequence[int], levels: int, bucket: int, bits: int, largest: bool) -> None:
        """`keys`: of `draws`, one for each segment. `largest`: the norm is the largest magnitude, else ℓ2."""
        of = np.array(keys, np.uint64)
        self._call("qsgd_extract", *self._buffer, payload.data_ptr(), _address(of), levels, bucket, bits, largest)

    def natural_extract_(self, payload: torch.Tensor, keys: Sequence[int]) -> None:
        """`keys`: of `draws`, one for each segment."""
        of = np.array(keys, np.uint64)
        self._call("natural_extract", *self._buffer, payload.data_ptr(), _address(of))

    def decode_all_(self, decoding: Decoding, payloads: Sequence[torch.Tensor], alpha: float, add: bool, sums: Sums | None = None) -> None:
        """The buffer ← alpha·Σ of what the payloads, one or more, decode to, in their order; or, `add`, += that: the sum is made first, and what one
        alone decodes to is multiplied and added with one rounding. Writes the `sums` of what is then there."""
        table = np.array([p.data_ptr() for p in payloads], np.int64)
        given = (_address(table), len(payloads), alpha, add)
        self._call(f"{decoding.kernel}_decode", *self._buffer, *given, *_asked(sums), *decoding.settings)

    def cast_extract_(self, payload: torch.Tensor, limit: float) -> None:
        """`limit`: magnitudes beyond it are sent as that; inf for none. `payload`: float16 or bfloat16."""
        self._call("cast_extract", *self._buffer, payload.data_ptr(), payload.dtype == torch.bfloat16, limit)

    def cast_decode_(self, payload: torch.Tensor, alpha: float, add: bool) -> None:
        self._call("cast_decode", *self._buffer, payload.data_ptr(), payload.dtype == torch.bfloat16, alpha, add)

    def block_top_k_extract_(self, payload: torch.Tensor, block: int, k_full: int, k_last: Counts) -> None:
        """`k_last`: entries of each segment's last block when it is shorter than `block`, else 0."""
        self._call("block_top_k_extract", *self._buffer, payload.data_ptr(), block, k_full, _address(k_last))

    def block_top_k_decode_(self, payload: torch.Tensor, block: int, k_full: int, k_last: Counts, alpha: float, add: bool) -> None:
        self._call("block_top_k_decode", *self._buffer, payload.data_ptr(), block, k_full, _address(k_last), alpha, add)

    def accumulate_(
        self,
        momentum: torch.Tensor | None,
        displacement: torch.Tensor | None,
        gradients: Sequence[torch.Tensor],
        points: Sequence[torch.Tensor] | None,
        factors: np.ndarray,
        sums: Sums | None = None,
    ) -> bool:
        """See `Addition`; the tensors by segment are each of one type (`common_type`). False when a gradient is not finite. Writes the `sums` of the
        buffer."""
        flat = [0 if t is None else t.data_ptr() for t in (momentum, displacement)]
        tensors = [None if given is None else self._in_one_piece(given) for given in (gradients, points)]
        tables = [np.array([t.data_ptr() for t in given or ()], np.int64) for given in tensors]
        places = [(_TYPES[given[0].dtype], _address(table)) if given else (0, 0) for given, table in zip(tensors, tables, strict=True)]
        ranges = (0, 0) if sums is None else (_address(sums.wanted.ranges), len(sums.wanted.ranges))
        return bool(self._call("accumulate", *self._buffer, *flat, *places[0], *places[1], _address(factors), *ranges, *_asked(sums)))

    def extract_from_(self, gradients: Sequence[torch.Tensor], extraction: Extraction) -> bool:
        """What the compressor's `extract_` takes of a buffer that holds the gradients, which are all of one type (`common_type`), is written to the
        payload, without such a buffer. False when a gradient is not finite."""
        pieces = self._in_one_piece(gradients)
        table = np.array([t.data_ptr() for t in pieces], np.int64)
        given = [_address(a) if isinstance(a, np.ndarray) else a for a in extraction.arguments]
        places = (self._buffer[0], *self._table, _TYPES[pieces[0].dtype], _address(table), extraction.payload.data_ptr())
        return bool(self._call(f"{extraction.kernel}_extract_from", *places, *given))

    def shift_(self, parameters: Sequence[torch.Tensor], t: torch.Tensor | None = None, factor: float = 0.0) -> list[torch.Tensor]:
        """`parameters` ← the buffer + factor·t, and their `column_sums`; without `t` these alone."""
        sizes = [reference.column_sums_size(p) for p in parameters]
        sums = torch.zeros(sum(sizes), dtype=torch.int64, device="cpu")
        places = np.cumsum([0, *sizes], dtype=np.int64)
        addresses = np.array([p.data_ptr() for p in self._in_one_piece(parameters)], np.int64)
        buffer = self._buffer if t is not None else (self._buffer[0], 0, *self._table)
        of_t = 0 if t is None else t.data_ptr()
        self._call("shift", *buffer, of_t, factor, _address(addresses), sums.data_ptr(), _address(places))
        return list(torch.split(sums, sizes))

    def _in_one_piece(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A tensor by segment, in the order of its elements: contiguous ones as they are, others (channels_last) copied."""
        for segment, t in zip(self._segments, tensors, strict=True):
            if t.numel() != segment.numel:
                raise CompressionError(f"{self._who}: parameter '{segment.name}' has {segment.numel} elements, and {t.numel()} came for it.")
        return [t.contiguous() for t in tensors]

    # -- low rank: the segments are matrices M of rows[i] rows; P and Q are thin ones, row-major, one after the other -------------------------

    def low_rank_p(self, rows: Counts, a: int, q: torch.Tensor) -> torch.Tensor:
        """P = MQ, flat."""
        p = torch.empty(int(rows.sum()) * a, dtype=q.dtype, device="cpu")
        self._call("low_rank_p", *self._buffer, _address(rows), a, q.data_ptr(), p.data_ptr())
        return p

    def low_rank_q(self, rows: Counts, a: int, p: torch.Tensor) -> torch.Tensor:
        """Q = MᵀP, flat."""
        columns = int((self._segments.ranges[:, 1] // rows).sum())
        q = torch.empty(columns * a, dtype=p.dtype, device="cpu")
        self._call("low_rank_q", *self._buffer, _address(rows), a, p.data_ptr(), q.data_ptr())
        return q

    def low_rank_decode_(
        self, rows: Counts, a: int, p: torch.Tensor, q: torch.Tensor, kept: torch.Tensor | None, out: Sequence[torch.Tensor]
    ) -> None:
        """`out`, a tensor in one piece for each segment, ← PQᵀ, and M ← M − P·keptᵀ unless that is None."""
        left = None if kept is None else kept.data_ptr()
        addresses = np.array([t.data_ptr() for t in out], np.int64)
        self._call("low_rank_decode", *self._buffer, _address(rows), a, p.data_ptr(), q.data_ptr(), left, _address(addresses))

    # -- positions: int32 or uint32, ascending within each segment, one segment after the other ------------------------------------------

    def top_k(self, counts: Counts, positions: torch.Tensor, values: torch.Tensor) -> None:
        """`positions` ← those of each segment's counts[i] largest magnitudes, `values` ← these entries, which become zero. What they reached is
        remembered with the table: in the next step it says where to look, and nothing else."""
        expected = self._segments.once("top_k", counts.tobytes(), lambda: np.zeros((len(counts), 4), np.int64))  # see `Expected` of csrc/top_k.h
        self._call("top_k", *self._buffer, _address(counts), positions.data_ptr(), values.data_ptr(), _address(expected))

    def random_k(self, keys: Sequence[int], counts: Counts) -> torch.Tensor:
        """counts[i] positions (int32) of each segment, by Philox words from each of `keys`."""
        positions = torch.empty(int(counts.sum()), dtype=torch.int32, device="cpu")
        of = np.array(keys, np.uint64)
        self._call("random_k_positions", *self._table, _address(of), _address(counts), positions.data_ptr())
        return positions

    def threshold(self, keys: Sequence[int], sampled: Counts, ranks: Counts, take: bool) -> tuple[Counts, Chosen]:
        """(counts, what writes them) of entries that are no zeros and reach the ranks[i]-th largest of a sample. `take`: their values are to be
        written too, and some are taken out of the buffer already."""
        of, counts = np.array(keys, np.uint64), np.empty(len(keys), np.int64)
        notes = self._segments.scratch(torch.int64, 4 * int((-(-self._segments.ranges[:, 1] // 64)).sum()))  # see `Noted` of csrc/threshold.h
        self._call("threshold_choose", *self._buffer, *map(_address, (of, sampled, ranks, counts)), notes.data_ptr(), take)

        def write(positions: torch.Tensor, values: torch.Tensor | None) -> None:
            self._call("threshold_take", *self._buffer, notes.data_ptr(), positions.data_ptr(), 0 if values is None else values.data_ptr())

        return counts, write

    def take_(self, counts: Counts, positions: torch.Tensor, values: torch.Tensor) -> None:
        """`values` ← the entries at `positions`, which become zero."""
        self._call("positions_take", *self._buffer, _address(counts), positions.data_ptr(), values.data_ptr())

    def decode_at_(self, counts: Counts, positions: torch.Tensor, values: torch.Tensor, alpha: float, add: bool) -> None:
        """The entries at `positions` += alpha·values; or these, and zeros elsewhere."""
        given = min(positions.numel(), values.numel())
        self._call("positions_decode", *self._buffer, _address(counts), positions.data_ptr(), values.data_ptr(), alpha, add, given)

    def move_(self, counts: Counts, positions: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """The entries of `targets` at `positions` −= the buffer's, which become zero."""
        addresses = np.array([t.data_ptr() for t in self._in_one_piece(targets)], np.int64)
        self._call("positions_move", *self._buffer, _address(counts), positions.data_ptr(), _address(addresses))


def writable(tensors: Sequence[torch.Tensor], segments: Segments) -> bool:
    """By compiled kernels, as they are: of the segments' type, on their device, and in one piece."""
    return common_type(tensors, segments.device) == segments.dtype and all(t.is_contiguous() for t in tensors)


def raise_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Of tensors that a kernel has written, as every write does: autograd, and others who look at them, know by it. They are contiguous."""
    for t in tensors:
        t.detach().view(-1)[:0].zero_()


def common_type(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.dtype | None:
    """That of all of them, where compiled kernels can read them: strided, on this device."""
    types = {t.dtype if t.device == device and t.layout is torch.strided else None for t in tensors}
    kind = types.pop() if len(types) == 1 else None
    return kind if kind in _TYPES else None


Kernels = Native | Cuda

_library: Library | None = library.from_environment()
_on_gpus = os.environ.get("HVD_ECSGD_KERNELS") != "reference"
_interpreted = False


def native_library() -> Library | None:
    """The compiled kernels where they are used."""
    return _library


def native_for(buffer: torch.Tensor | None, segments: Segments, who: str) -> Native | None:
    """The compiled kernels for this buffer, or for what has a table alone; None where the reference is to run. `who` is named in errors."""
    if _library is None:
        library.say_what_is_missing()
        return None
    if segments.dtype not in _BUFFERS:
        return None
    if buffer is not None and (buffer.device.type != "cpu" or buffer.dtype != segments.dtype or not buffer.is_contiguous()):
        return None
    return Native(_library, buffer, segments, who)


def kernels_for(buffer: torch.Tensor | None, segments: Segments, who: str) -> Kernels | None:
    """As `native_for`, on a GPU too."""
    device = segments.device if buffer is None else buffer.device
    if device.type != "cuda" and not _interpreted:
        return native_for(buffer, segments, who)
    if not (_on_gpus and segments.dtype in _BUFFERS and cuda.available()):
        return None
    if buffer is not None and (buffer.dtype != segments.dtype or not buffer.is_contiguous()):
        return None
    return Cuda(buffer, segments, who)


def cuda_for(buffer: torch.Tensor, segments: Segments, who: str) -> Cuda | None:
    """The kernels for GPUs, where this is a buffer for them, of what is not compiled for the CPU."""
    return cast(Cuda, kernels_for(buffer, segments, who)) if buffer.device.type == "cuda" or _interpreted else None


def all_finite(t: torch.Tensor) -> Verdict:
    """True when no element of the floating-point `t` is inf or NaN. One pass over `t` without temporaries in the usual case."""
    if _library is None or t.device.type != "cpu" or t.dtype not in _TYPES or not t.is_contiguous():
        return reference.all_finite(t)
    return bool(_library.call("all_finite", _TYPES[t.dtype], t.data_ptr(), t.numel(), torch.get_num_threads()))


def fingerprint(t: torch.Tensor) -> torch.Tensor:
    """A 0-dim int64 of the bits of `t`, where `t` is: equal for equal bits, and another one when a single element differs (64 bits otherwise)."""
    if _library is None or t.device.type != "cpu" or not t.is_contiguous() or t.element_size() > 8:
        return reference.fingerprint(t)
    result = torch.empty((), dtype=torch.int64, device="cpu")
    _library.call("fingerprint", t.data_ptr(), t.numel(), t.element_size(), result.data_ptr(), torch.get_num_threads())
    return result


@contextmanager
def forced(kernels: Library | type[Cuda] | None) -> Iterator[None]:
    """For tests and benchmarks: these kernels in place of those that the environment chose; None for the reference. `Cuda` on the CPU is for Triton's
    interpreter (TRITON_INTERPRET=1 from the start of the process)."""
    global _library, _on_gpus, _interpreted
    before = _library, _on_gpus, _interpreted
    _on_gpus = _interpreted = kernels is Cuda
    _library = kernels if isinstance(kernels, Library) else None
    try:
        yield
    finally:
        _library, _on_gpus, _interpreted = before
