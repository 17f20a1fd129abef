"""Gradient dropping: everything above a threshold that a sample of the magnitudes gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import check_flag, check_number, check_ratio
from ..errors import CompressionError
from ..kernels import all_finite, check_positions, kernels_for, pack_codes, unpack_codes
from ..protocols import Places
from ..segments import PAYLOAD_ALIGNMENT, Key, Segment, Segments, aligned
from ..verdicts import Verdict
from .base import BytePayload, below, check_payload, kept

__all__ = ["Threshold"]

_MAX_SEGMENT = 2**31
_ABOVE = 16
"""Sampled magnitudes that are to lie above the threshold, at least; the number sent then varies by about ±25 %."""


@dataclass(frozen=True)
class Threshold(BytePayload):
    """The entries of each segment with |v| ≥ t, where t is the (1 − 1/ratio)-quantile of the magnitudes in a random sample of the segment.

    The sample has max(`sample`·d, 16·ratio) entries, drawn with replacement; when that is half of the segment or more, all entries are used
    and t is exact. About d/ratio entries are sent, at least one unless v = 0; zeros never, all entries when their magnitudes are equal.
    Selecting, so a contraction: δ is the sent entries' share of ‖v‖². No sorting and no exact count, hence cheaper than `TopK` on
    large segments, and a payload of variable size.
    `two_bits`: of each value only its sign is sent, and which of two magnitudes of the segment stands for it: the means of the chosen magnitudes that
    are at most, and above, their mean. What that leaves stays in the residual too; δ is then Σ (count of a class)·(its magnitude)²/‖v‖².
    Payload (bytes): the number of entries of each segment as int32, padded to 8 bytes; the values of all segments in the buffer's type; their
    positions within the segment as int32. With `two_bits` two magnitudes of each segment in the buffer's type; the positions; a code for each entry,
    4 to a byte, bit 0 = larger magnitude, bit 1 = negative.
    Aji, Heafield 2017; which two magnitudes is our choice.
    """

    ratio: float = 100.0
    sample: float = 0.01
    two_bits: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "threshold")
        check_number(self.sample, "threshold: sample", "a share of the entries in (0, 1], such as 0.01", lambda share: 0 < share <= 1)
        check_flag(self.two_bits, "threshold: two_bits")

    def payload_size(self, segments: Segments) -> None:
        """It depends on the values."""
        return None

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        for s in segments:
            if s.numel >= _MAX_SEGMENT:
                raise CompressionError(
                    f"threshold: parameter '{s.name}' has {s.numel} elements; positions are sent as int32, so at most {_MAX_SEGMENT - 1} are "
                    "supported."
                )
        native = kernels_for(buffer, segments, "threshold")
        if native and not self.two_bits:
            counted, write = native.threshold(*self._draws(segments, key), take=True)
            payload = self._empty_payload(counted.tolist(), segments)
            sent, where, _, _ = self._parts(payload, segments)
            write(where, sent)
            return payload
        positions = self._positions(buffer, segments, key)
        values: list[torch.Tensor] = []
        codes: list[torch.Tensor] = []
        for chosen, view in zip(positions, segments.views(buffer), strict=True):
            if self.two_bits:
                magnitudes, code = _two_magnitudes(view[chosen])
                values.append(magnitudes)
                codes.append(code)
                view.index_add_(0, chosen, _decoded(magnitudes.nan_to_num(0.0, 0.0, 0.0), code), alpha=-1)  # what has no finite mean stays whole
            else:
                values.append(view[chosen])
                view[chosen] = 0
        counts = [p.numel() for p in positions]
        payload = self._empty_payload(counts, segments)
        sent, where, packed, _ = self._parts(payload, segments)
        if values:
            torch.cat(values, out=sent)
            where.copy_(torch.cat(positions))
        if self.two_bits:
            packed.copy_(pack_codes(torch.cat([*codes, payload[:0]]), 2))
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        sent, positions, packed, counts = self._parts(payload, segments)
        native = kernels_for(out, segments, "threshold")
        if native and not self.two_bits:
            return native.decode_at_(np.array(counts, np.int64), positions, sent, alpha, add)
        if not add:
            segments.zero_(out)
        codes = unpack_codes(packed, sum(counts), 2) if self.two_bits else packed
        at = 0
        for i, (count, s, view) in enumerate(zip(counts, segments, segments.views(out), strict=True)):
            entries = slice(at, at + count)
            where = check_positions(positions[entries], s, "threshold")
            values = _decoded(sent[2 * i : 2 * i + 2], codes[entries]) if self.two_bits else sent[entries]
            view.index_add_(0, where, values, alpha=alpha)
            at += count

    def places(self, payload: torch.Tensor, segments: Segments, key: Key) -> Places:
        _, positions, _, counts = self._parts(payload, segments)
        return Places(np.array(counts, np.int64), positions)

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(self._parts(payload, segments)[0])

    def delta(self, v: torch.Tensor) -> float:
        """Σ v_i²·P(t ≤ |v_i|)/‖v‖²; the sample's j-th largest magnitude is at most a when fewer than j of its m entries exceed a. With `two_bits`
        the mean, over t, of what the two magnitudes hold."""
        magnitude = np.sort(v.detach().double().abs().cpu().numpy())
        d, m = magnitude.size, self._sampled(v.numel())
        norm = float((magnitude**2).sum())
        if norm == 0:
            return 1.0
        if m >= d and self.two_bits:
            return super().delta(v)
        if m >= d:
            k = kept(d, self.ratio)
            return float((magnitude[magnitude >= magnitude[d - k]] ** 2).sum()) / norm
        j = self._rank(m)
        exceeding = (d - np.searchsorted(magnitude, magnitude, "right")) / d
        at_most = np.ones(d) if j == m else _at_most(j - 1, m, exceeding)  # P(t ≤ |v_i|)
        if not self.two_bits:
            return float((magnitude**2 * at_most).sum()) / norm
        first = np.flatnonzero((np.diff(magnitude, prepend=-1.0) > 0) & (magnitude > 0))  # where each magnitude but 0 begins
        chance = np.diff(at_most[first], prepend=0.0)  # of t being that magnitude; a smaller t, 0, chooses the same entries as the smallest
        return float((chance * _held(magnitude, first)).sum()) / norm

    def _sampled(self, numel: int) -> int:
        """Size of the sample; `numel` for the exact quantile."""
        wanted = max(math.ceil(self.sample * numel), math.ceil(_ABOVE * self.ratio))
        return numel if 2 * wanted >= numel else wanted

    def _rank(self, m: int) -> int:
        """The threshold is the sample's entry of this rank, from the largest."""
        return max(1, int(m / self.ratio))

    def _chosen(self, view: torch.Tensor, s: Segment, key: Key) -> torch.Tensor:
        if s.numel == 0:
            return torch.empty(0, dtype=torch.int64, device=view.device)
        magnitude = view.abs()
        m = self._sampled(s.numel)
        if m == s.numel:
            j, sample = kept(m, self.ratio), magnitude
        else:
            drawn = below(key.words(s, "sample").random_raw(m), s.numel)
            j, sample = self._rank(m), magnitude[torch.from_numpy(drawn).to(view.device)]
        # Ratio 1: everything, not only what exceeds the smallest magnitude of the sample.
        t = torch.topk(sample, j, sorted=False).values.min() if j < m else sample.new_zeros(())
        chosen = (~(magnitude < t) & (view != 0)).nonzero().view(-1)  # a NaN is below nothing: always sent
        if not bool(torch.isfinite(t)):
            chosen = chosen[~torch.isfinite(view[chosen])][:1]  # one tells everybody; the step is undone anyway
        return chosen

    def _positions(self, buffer: torch.Tensor, segments: Segments, key: Key) -> list[torch.Tensor]:
        """What is chosen of each segment: ascending positions."""
        if native := kernels_for(buffer, segments, "threshold"):
            counts, write = native.threshold(*self._draws(segments, key), take=False)
            positions = torch.empty(int(counts.sum()), dtype=torch.int32, device=segments.device)
            write(positions, None)
            stops = np.cumsum(counts).tolist()
            return [positions[start:stop].long() for start, stop in zip([0, *stops], stops)]
        return [self._chosen(view, s, key) for s, view in zip(segments, segments.views(buffer), strict=True)]

    def _draws(self, segments: Segments, key: Key) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(Philox keys, sizes of the samples, ranks of the thresholds in them)."""
        sizes = [self._sampled(s.numel) for s in segments]
        ranks = [kept(m, self.ratio) if m == s.numel else self._rank(m) for m, s in zip(sizes, segments, strict=True)]
        return [key.bits(s, "sample") for s in segments], np.array(sizes, np.int64), np.array(ranks, np.int64)

    def _empty_payload(self, counts: list[int], segments: Segments) -> torch.Tensor:
        payload = segments.uneven_payload(self._n_bytes(counts, segments))
        payload[: aligned(4 * len(segments))] = 0
        payload[-PAYLOAD_ALIGNMENT:] = 0
        payload[: 4 * len(segments)].view(torch.int32).copy_(torch.tensor(counts, dtype=torch.int32, device="cpu"))
        return payload

    def _n_bytes(self, counts: list[int], segments: Segments) -> int:
        total, width = sum(counts), segments.dtype.itemsize
        body = 2 * len(segments) * width + 4 * total + -(-total // 4) if self.two_bits else total * (width + 4)
        return aligned(aligned(4 * len(segments)) + body)

    def _parts(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """(values or magnitudes, positions, packed codes, counts): the tensors are views of the payload."""
        check_payload(payload, torch.uint8, 4 * len(segments), "threshold")
        counts: list[int] = payload[: 4 * len(segments)].view(torch.int32).tolist()
        for count, s in zip(counts, segments, strict=True):
            if not 0 <= count <= s.numel:
                raise CompressionError(
                    f"threshold: a payload has {count} entries for parameter '{s.name}', which has {s.numel} elements: it was damaged on its way, or "
                    "comes from ranks with other settings."
                )
        check_payload(payload, torch.uint8, self._n_bytes(counts, segments), "threshold")
        total = sum(counts)
        start = aligned(4 * len(segments))
        middle = start + (2 * len(segments) if self.two_bits else total) * segments.dtype.itemsize
        stop = middle + 4 * total
        codes = payload[stop : stop + (-(-total // 4) if self.two_bits else 0)]
        return payload[start:middle].view(segments.dtype), payload[middle:stop].view(torch.int32), codes, counts


def _two_magnitudes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two magnitudes that stand for `values`, 0 for one of nothing; and each value's code."""
    magnitude = values.abs()
    large = magnitude > magnitude.mean()
    classes = [magnitude[~large], magnitude[large]]
    return torch.stack([c.mean() if c.numel() else c.new_zeros(()) for c in classes]), large.to(torch.uint8) + 2 * (values < 0).to(torch.uint8)


def _decoded(magnitudes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    values = magnitudes[(codes & 1).long()]
    return torch.where(codes >= 2, -values, values)


def _held(magnitude: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Σ (count of a class)·(its mean)² when the entries from `first` on are chosen of the ascending `magnitude`: ‖C(v)‖², also ‖v‖² − ‖v − C(v)‖²."""
    above = np.append(np.cumsum(magnitude[::-1])[::-1], 0.0)  # sums of the entries from here on
    n = magnitude.size
    split = np.searchsorted(magnitude, above[first] / (n - first), "right")
    held: np.ndarray = (above[first] - above[split]) ** 2 / np.maximum(split - first, 1) + above[split] ** 2 / np.maximum(n - split, 1)
    return held


def _at_most(j: int, m: int, p: np.ndarray) -> np.ndarray:
    """P(X ≤ j) for X ~ Binomial(m, p). Beyond ten standard deviations and 40, 0 or 1."""
    result = np.where(m * p < j, 1.0, 0.0)
    near = np.abs(m * p - j) < 40 + 10 * np.sqrt(m * p * (1 - p))
    p, where = np.unique(p[near], return_inverse=True)
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(np.maximum(p, 1e-300)), np.log1p(-p)
    total = np.zeros_like(p)
    for i in range(j + 1):
        log_choose = math.lgamma(m + 1) - math.lgamma(i + 1) - math.lgamma(m - i + 1)
        total += np.exp(log_choose + i * log_p + (m - i) * log_q)
    result[near] = np.minimum(total, 1.0)[where]
    return result
