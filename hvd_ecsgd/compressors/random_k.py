"""Random positions that all workers share, so that payloads line up and ride an ordinary all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import check_flag, check_ratio
from ..errors import CompressionError
from ..kernels import Kernels, kernels_for
from ..protocols import Places
from ..segments import Key, Segment, Segments
from .base import FloatPayload, check_payload, distinct_below, kept

__all__ = ["RandomK"]

_MAX_SEGMENT = 2**32
_LABEL = "positions"


@dataclass(frozen=True)
class RandomK(FloatPayload):
    """k = max(1, ⌊d/ratio⌋) distinct positions of each segment, every subset equally likely, the same on all workers.

    Unscaled (default): δ = k/d in expectation, and error feedback sends the rest later. `unbiased=True` multiplies what is sent by d/k: E C(v) =
    v, ω = d/k − 1, and δ = 2 − d/k is negative for k < d/2: residuals grow without bound, so it is refused with error feedback.
    Payload: the values in ascending position, all segments one after the other; positions are drawn again from (seed, step, parameter name, piece)
    and not sent. Stich, Cordonnier, Jaggi 2018; Wangni et al. 2018.
    """

    ratio: float = 64.0
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "random_k")
        check_flag(self.unbiased, "random_k: unbiased")

    @property
    def summable(self) -> bool:
        return True

    @property
    def shared_key(self) -> bool:
        return True

    def check_feedback(self) -> None:
        if self.unbiased:
            raise CompressionError(
                f"{self} multiplies what it sends by d/k, and with error feedback that diverges (δ = 2 − d/k). Use unbiased=False, which needs "
                "the feedback, or no feedback: error_feedback=False, feedback=NoFeedback(), TwoPass(server_feedback=False)."
            )

    def delta(self, v: torch.Tensor) -> float:
        """k/d; with `unbiased` 2 − d/k, negative for k < d/2."""
        if not bool(v.any()):
            return 1.0
        share = kept(v.numel(), self.ratio) / v.numel()
        return 2.0 - 1.0 / share if self.unbiased else share

    def omega(self, d: int) -> float:
        """d/k − 1 (with `unbiased`)."""
        return d / kept(d, self.ratio) - 1.0

    def payload_size(self, segments: Segments) -> int:
        return sum(kept(s.numel, self.ratio) for s in segments)

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = torch.empty(self.payload_size(segments), dtype=buffer.dtype, device=buffer.device)
        if not self.unbiased and (native := kernels_for(buffer, segments, "random_k")):
            native.take_(*self._drawn(native, segments, key), payload)
            return payload
        at = 0
        for s, view in zip(segments, segments.views(buffer), strict=True):
            positions = self._positions(s, key, buffer.device)
            part = payload[at : at + positions.numel()]
            torch.index_select(view, 0, positions, out=part)
            if self.unbiased and positions.numel() < s.numel:
                part.mul_(s.numel / positions.numel())
                view.index_add_(0, positions, part, alpha=-1.0)
            else:
                view.index_fill_(0, positions, 0.0)
            at += positions.numel()
        return payload

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        check_payload(payload, segments.dtype, self.payload_size(segments), "random_k")
        if native := kernels_for(out, segments, "random_k"):
            return native.decode_at_(*self._drawn(native, segments, key), payload, alpha, add)
        if not add:
            segments.zero_(out)
        at = 0
        for s, view in zip(segments, segments.views(out), strict=True):
            positions = self._positions(s, key, out.device)
            view.index_add_(0, positions, payload[at : at + positions.numel()], alpha=alpha)
            at += positions.numel()

    def places(self, payload: torch.Tensor, segments: Segments, key: Key) -> Places:
        if native := kernels_for(None, segments, "random_k"):
            return Places(*self._drawn(native, segments, key))
        positions = [self._positions(s, key, segments.device) for s in segments]
        return Places(self._counts(segments), torch.cat(positions).to(torch.int32))

    def _drawn(self, native: Kernels, segments: Segments, key: Key) -> tuple[np.ndarray, torch.Tensor]:
        """(counts, positions) of all segments: what is extracted, and where it is decoded in the same step, are one draw."""

        def drawn() -> tuple[np.ndarray, torch.Tensor]:
            counts = self._counts(segments)
            return counts, native.random_k(self._keys(segments, key), counts)

        return segments.once("random_k", (self, key), drawn)

    def _positions(self, s: Segment, key: Key, device: torch.device) -> torch.Tensor:
        _check_size(s)
        return torch.from_numpy(distinct_below(key, s, s.numel, kept(s.numel, self.ratio), _LABEL)).to(device)

    def _counts(self, segments: Segments) -> np.ndarray:
        return np.array([kept(s.numel, self.ratio) for s in segments], np.int64)

    def _keys(self, segments: Segments, key: Key) -> list[int]:
        for s in segments:
            _check_size(s)
        return [key.bits(s, _LABEL) for s in segments]


def _check_size(s: Segment) -> None:
    if s.numel >= _MAX_SEGMENT:
        raise CompressionError(f"random_k: parameter '{s.name}' has {s.numel} elements; at most {_MAX_SEGMENT - 1} are supported.")
