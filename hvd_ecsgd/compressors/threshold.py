"""Gradient dropping: everything above a threshold that a sample of the magnitudes gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CompressionError
from ..kernels import all_finite
from ..segments import Key, Segment, Segments, aligned
from .base import BytePayload, below, check_ratio, kept

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
    Payload (bytes): the number of entries of each segment as int32, padded to 8 bytes; the values of all segments in the buffer's type; their
    positions within the segment as int32. Aji, Heafield 2017 (without their optional 2-bit values).
    """

    ratio: float = 100.0
    sample: float = 0.01

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "threshold")
        if isinstance(self.sample, bool) or not isinstance(self.sample, (int, float)) or not 0 < self.sample <= 1:
            raise CompressionError(f"threshold: sample must be a share of the entries in (0, 1], such as 0.01, got {self.sample!r}.")

    def payload_size(self, segments: Segments) -> None:
        """It depends on the values."""
        return None

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        positions: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for s, view in zip(segments, segments.views(buffer), strict=True):
            if s.numel >= _MAX_SEGMENT:
                raise CompressionError(
                    f"threshold: parameter '{s.name}' has {s.numel} elements; positions are sent as int32, so at most {_MAX_SEGMENT - 1} are "
                    "supported."
                )
            chosen = self._chosen(view, s, key)
            positions.append(chosen)
            values.append(view[chosen])
            view[chosen] = 0
        total = sum(p.numel() for p in positions)
        head = aligned(4 * len(segments))
        payload = torch.zeros(aligned(head + total * (segments.dtype.itemsize + 4)), dtype=torch.uint8, device=buffer.device)
        payload[: 4 * len(segments)].view(torch.int32).copy_(torch.tensor([p.numel() for p in positions], dtype=torch.int32))
        sent, where, _ = self._parts(payload, segments)
        if total:
            torch.cat(values, out=sent)
            where.copy_(torch.cat(positions))
        return payload

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        values, positions, counts = self._parts(payload, segments)
        at = 0
        for count, view in zip(counts, segments.views(out), strict=True):
            view.index_add_(0, positions[at : at + count], values[at : at + count], alpha=alpha)
            at += count

    def finite(self, payload: torch.Tensor, segments: Segments) -> bool:
        return all_finite(self._parts(payload, segments)[0])

    def delta(self, v: torch.Tensor) -> float:
        """Σ v_i²·P(t ≤ |v_i|)/‖v‖²; the sample's j-th largest magnitude is at most a when fewer than j of its m entries exceed a."""
        magnitude = np.sort(v.detach().double().abs().cpu().numpy())
        d, m = magnitude.size, self._sampled(v.numel())
        norm = float((magnitude**2).sum())
        if norm == 0:
            return 1.0
        if m >= d:
            k = kept(d, self.ratio)
            return float((magnitude[magnitude >= magnitude[d - k]] ** 2).sum()) / norm
        j = self._rank(m)
        exceeding = (d - np.searchsorted(magnitude, magnitude, "right")) / d
        return float((magnitude**2 * (1.0 if j == m else _at_most(j - 1, m, exceeding))).sum()) / norm

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

    def _parts(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """(values, positions, counts): the tensors are views of the payload."""
        counts: list[int] = payload[: 4 * len(segments)].view(torch.int32).tolist()
        head, total, width = aligned(4 * len(segments)), sum(counts), segments.dtype.itemsize
        body = payload[head : head + total * (width + 4)]
        return body[: total * width].view(segments.dtype), body[total * width :].view(torch.int32), counts


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
