"""Stochastic rounding to equidistant levels of a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..arguments import check_choice, check_integer
from ..kernels import LONGEST_BUCKET, all_finite, cuda_for, kernels_for, pack_codes, uniform, unpack_codes
from ..protocols import Decoding, Extraction, Sums
from ..segments import Key, Segments, aligned
from ..verdicts import Verdict
from .base import CodePayload, contraction, n_rows, rows, warn_once

__all__ = ["QSGD"]


@dataclass(frozen=True)
class QSGD(CodePayload):
    """‖v‖·sign(v_j)·ξ_j per bucket of `bucket` consecutive entries: ξ_j is |v_j|/‖v‖ rounded at random, up or down, to a multiple of 1/s.

    s = `levels`; E C(v) = v. ‖v‖ is the bucket's ℓ2 norm (`"l2"`, the paper's) or largest magnitude (`"max"`, finer steps, as in the authors'
    experiments). A segment's last bucket may be shorter. Entries take 2 bits for s = 1, 4 for s ≤ 7, 8 for s ≤ 127.
    ω = min(d/s², √d/s), d the bucket's length, for both norms. Exactly, E‖C(v) − v‖² = Σ_j (‖v‖/s)²·f_j(1 − f_j), f_j the fractional part of
    s|v_j|/‖v‖; δ = 1 − that/‖v‖² is negative for coarse levels (Gaussian v, ℓ2, bucket 512: for s ≤ 9). Where the bound ω is 1 or more, error
    feedback warns: use none, which an unbiased compressor does not need.
    Payload (bytes): the norms of all buckets in the buffer's type, then each segment's codes level·sign + s, packed, the first in the lowest bits.
    Every rank rounds with randomness of its own, and decoding needs none. Alistarh et al. 2017.
    """

    _who = "qsgd"
    levels: int = 127
    bucket: int = 512
    norm: Literal["l2", "max"] = "l2"

    def __post_init__(self) -> None:
        check_integer(self.levels, "qsgd: levels", least=1, most=127)
        check_integer(self.bucket, "qsgd: bucket", least=1, most=2**31 - 1)
        check_choice(self.norm, "qsgd: norm", ("l2", "max"))

    @property
    def unbiased(self) -> bool:
        return True

    @property
    def bits(self) -> int:
        """Bits per entry."""
        return 2 if self.levels == 1 else 4 if self.levels <= 7 else 8

    def omega(self, d: int) -> float:
        """min(d/s², √d/s), where d is at most the bucket's length."""
        d = min(d, self.bucket)
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    def check_feedback(self) -> None:
        if self.omega(self.bucket) >= 1:
            warn_once(
                f"{self} with error feedback: its variance is bounded by ω = {self.omega(self.bucket):.3g} times ‖v‖² only, so δ(v) = 1 − ω may be "
                "negative, it is not a contraction in general and residuals may grow. It is unbiased: use no feedback, or more levels, or a smaller "
                "bucket."
            )

    def delta(self, v: torch.Tensor) -> float:
        """1 − Σ step²·f(1 − f)/‖v‖²; negative when levels are so coarse that rounding adds more than the vector itself."""
        left = 0.0
        for part in rows(v.detach().double(), self.bucket):
            norm = self._norms(part)
            fraction = torch.where(norm > 0, part.abs() / norm * self.levels, 0.0).frac()
            left += float(((norm / self.levels).square() * fraction * (1 - fraction)).sum())
        return contraction(v, left)

    def payload_size(self, segments: Segments) -> int:
        return aligned(self._n_norms(segments) * segments.dtype.itemsize + sum(self._n_bytes(s.numel) for s in segments))

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        payload = segments.payload(self.payload_size(segments))
        if native := kernels_for(buffer, segments, self._who):
            native.qsgd_extract_(payload, self._keys(segments, key), self.levels, self.bucket, self.bits, self.norm == "max")
            return payload
        norms, at = self._parts(payload, segments)
        i = 0
        for s, view in zip(segments, segments.views(buffer), strict=True):
            if s.numel == 0:
                continue
            # Uniform in [0, 1), then turned into the levels in place.
            levels = uniform(key.bits(s, "levels"), s.numel, buffer.dtype, buffer.device)
            for part, level in zip(rows(view, self.bucket), rows(levels, self.bucket), strict=True):
                norm = self._norms(part)
                norms[i : i + part.shape[0]] = norm.view(-1)
                i += part.shape[0]
                scaled = (part.abs() / torch.where(norm > 0, norm, 1.0)).mul_(self.levels)
                level.add_(scaled).floor_().clamp_(max=self.levels).nan_to_num_(0.0).copysign_(part)
                part.sub_(level * (norm / self.levels).nan_to_num(0.0, 0.0, 0.0))  # what has no finite norm stays whole
            codes = levels.add_(self.levels).to(torch.uint8)
            n_bytes = self._n_bytes(s.numel)
            payload[at : at + n_bytes] = codes if self.bits == 8 else pack_codes(codes, self.bits)
            at += n_bytes
        return payload

    def extraction(self, segments: Segments, key: Key) -> Extraction | None:
        if self.bucket > LONGEST_BUCKET:
            return None
        settings = (self.levels, self.bucket, self.bits, self.norm == "max")
        return Extraction("qsgd", segments.payload(self.payload_size(segments)), (np.array(self._keys(segments, key), np.uint64), *settings))

    def _keys(self, segments: Segments, key: Key) -> list[int]:
        return [key.bits(s, "levels") for s in segments]

    def decode_all_(
        self, out: torch.Tensor, payloads: Sequence[torch.Tensor], segments: Segments, alpha: float, *, add: bool, sums: Sums | None = None
    ) -> bool:
        return self.decode_all_by(Decoding("qsgd", (self.levels, self.bucket, self.bits)), out, payloads, segments, alpha, add, sums)

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        if self.decode_all_(out, [payload], segments, alpha, add=add):
            return
        if cuda := cuda_for(out, segments, self._who):
            return cuda.qsgd_decode_(payload, self.levels, self.bucket, self.bits, alpha, add)
        if not add:
            segments.zero_(out)
        norms, at = self._parts(payload, segments)
        i = 0
        for view in segments.views(out):
            packed = payload[at : at + self._n_bytes(view.numel())]
            at += packed.numel()
            codes = packed if self.bits == 8 else unpack_codes(packed, view.numel(), self.bits)
            levels = codes.to(out.dtype).sub_(self.levels)
            for part, level in zip(rows(view, self.bucket), rows(levels, self.bucket), strict=True):
                norm = norms[i : i + part.shape[0]].unsqueeze(1)
                part.add_(level.mul_(norm / self.levels), alpha=alpha)
                i += part.shape[0]

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        return all_finite(self._parts(payload, segments)[0])

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        return self._parts(payload, segments)[0][:1], math.nan

    def _norms(self, part: torch.Tensor) -> torch.Tensor:
        """A column: the norm of each row."""
        norms: torch.Tensor = torch.linalg.vector_norm(part, 2 if self.norm == "l2" else math.inf, dim=1, keepdim=True)
        return norms

    def _n_bytes(self, numel: int) -> int:
        return -(-numel * self.bits // 8)

    def _n_norms(self, segments: Segments) -> int:
        return sum(n_rows(s.numel, self.bucket) for s in segments)

    def _parts(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, int]:
        """The norms, as a view of the payload, and where the codes begin."""
        n_bytes = self._n_norms(segments) * segments.dtype.itemsize
        return payload[:n_bytes].view(segments.dtype), n_bytes
