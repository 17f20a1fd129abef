"""The k entries of largest magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import check_integer, check_ratio
from ..errors import CompressionError
from ..kernels import all_finite, check_positions, kernels_for, top_k_indices
from ..protocols import Places
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict
from .base import BytePayload, check_payload, kept

__all__ = ["TopK"]

_MAX_SEGMENT = 2**31


@dataclass(frozen=True)
class TopK(BytePayload):
    """k entries of largest magnitude of each segment, ties to the lowest index; δ ≥ k/d.

    k = max(1, ⌊d/ratio⌋), or the number given as `k`. Payload (bytes): the values of all segments in the buffer's type, then their
    positions within the segment as int32.
    """

    ratio: float = 100.0
    k: int | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "top_k")
        if self.k is not None:
            check_integer(self.k, "top_k: k", "an integer ≥ 1", least=1)

    def _k(self, numel: int) -> int:
        """A `k` larger than a segment keeps all of it: small parameters must not make a setting for large ones an error."""
        return kept(numel, self.ratio) if self.k is None else min(self.k, numel)

    def payload_size(self, segments: Segments) -> int:
        return aligned(sum(self._k(s.numel) for s in segments) * (segments.dtype.itemsize + 4))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        values, positions = self._parts(payload, segments)
        for s in segments:
            if s.numel >= _MAX_SEGMENT:
                raise CompressionError(
                    f"top_k: parameter '{s.name}' has {s.numel} elements; positions are sent as int32, so at most {_MAX_SEGMENT - 1} are supported."
                )
        if native := kernels_for(buffer, segments, "top_k"):
            native.top_k(self._counts(segments), positions, values)
            return payload
        at = 0
        for s, view in zip(segments, segments.views(buffer), strict=True):
            k = self._k(s.numel)
            if k == 0:
                continue
            chosen = top_k_indices(view, k)
            values[at : at + k] = view[chosen]
            positions[at : at + k] = chosen
            view[chosen] = 0
            at += k
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        check_payload(payload, torch.uint8, self.payload_size(segments), "top_k")
        values, positions = self._parts(payload, segments)
        if native := kernels_for(out, segments, "top_k"):
            return native.decode_at_(self._counts(segments), positions, values, alpha, add)
        if not add:
            segments.zero_(out)
        at = 0
        for s, view in zip(segments, segments.views(out), strict=True):
            k = self._k(s.numel)
            view.index_add_(0, check_positions(positions[at : at + k], s, "top_k"), values[at : at + k], alpha=alpha)
            at += k

    def places(self, payload: torch.Tensor, segments: Segments, key: Key) -> Places:
        return Places(self._counts(segments), self._parts(payload, segments)[1])

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(self._parts(payload, segments)[0])

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return self._parts(payload, segments)[0][:1], math.nan

    def _counts(self, segments: Segments) -> np.ndarray:
        return np.array([self._k(s.numel) for s in segments], np.int64)

    def _parts(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, positions): views of the payload."""
        total = sum(self._k(s.numel) for s in segments)
        width = segments.dtype.itemsize
        return payload[: total * width].view(segments.dtype), payload[total * width : total * (width + 4)].view(torch.int32)
