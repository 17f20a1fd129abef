"""What the norms say of a method on this model, where it is worth a warning."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from ..core.method import Method
from ..protocols import Role

__all__ = ["Health"]

_SAMPLES = 5
"""That a verdict is of."""
_GROWTH = 1.5
"""How much a residual grows over them at least that is warned of."""
_PLENTY = 10.0
"""Steps' gradients in a residual below which nothing is said."""


class Health:
    """Looks at one record after the other. Each thing is said once of each param group."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._said: set[tuple[int, str]] = set()
        self._method: Method | None = None

    def look(self, method: Method, size: int, record: Mapping[str, Any]) -> Iterator[str]:
        """Texts that say what is wrong, and what to do. `size`: workers."""
        if method is not self._method:
            self._method = method
            self._seen.clear()
        for group in record["groups"]:
            if "gradient_norm" not in group:
                continue
            g, where = group["group"], f"param group {group['group']}"
            for name in ("relative_error", "residual_norm", "residual_to_gradient"):
                if name in group:
                    self._seen[g, name].append(group[name])
            if group["dense_bytes"]:  # what an all-reduce sends of each byte
                self._seen[g, "share"].append(2 * (size - 1) / size * group["payload_bytes"] / group["dense_bytes"])
            for kind, text in (("error", self._of_error(method, g, where)), ("residual", self._of_residual(method, g, where))):
                if text and (g, kind) not in self._said:
                    self._said.add((g, kind))
                    yield text

    def _full(self, group: int, name: str) -> list[float]:
        seen = self._seen[group, name]
        return list(seen) if len(seen) == _SAMPLES else []

    def _delta(self, group: int) -> float | None:
        errors = self._full(group, "relative_error")
        return 1 - sum(e * e for e in errors) / len(errors) if errors else None

    def _of_error(self, method: Method, group: int, where: str) -> str:
        delta = self._delta(group)
        if delta is None:
            return ""
        keeps = Role.RESIDUAL in method.slot_names
        measured = (
            f"over {_SAMPLES} samples {method.compressor} leaves {1 - delta:.2f} of the squared norm of what {where} gives it (δ = {delta:.2g})"
        )
        if keeps and delta < -1e-3:
            return (
                f"{measured}, more than was there: what is added back grows, and training diverges sooner or later. Take a compressor that "
                "contracts, such as top_k, random_block or one_bit; or an unbiased one without feedback."
            )
        if not keeps and method.compressor.unbiased and delta < -3:
            return (
                f"{measured}: the noise of compression is more than twice the gradient. Send more bits, or choose smaller buckets (qsgd: levels=, "
                "bucket=), or take a method with error feedback."
            )
        chosen = not (method.compressor.shared_key or method.compressor.lossless or method.compressor.unbiased)
        shares, waits = self._full(group, "share"), self._full(group, "residual_to_gradient")
        if not (chosen and keeps and shares and waits):
            return ""
        blind = min(1.0, sum(shares) / len(shares))
        if delta < blind and min(waits) > self._limit(method, blind):
            return (
                f"{measured}, and {waits[-1]:.3g} steps' gradients wait in the residual. A random block of as many bytes would leave "
                f"{1 - blind:.3f}: what the compressor looks for is not there in the gradients of this model, or is crowded out by what waits. Take "
                f"Compression.random_block({max(2, round(1 / blind))}), which costs next to nothing to compute, or power_sgd(); or send more."
            )
        return ""

    @staticmethod
    def _limit(method: Method, delta: float) -> float:
        """Steps' gradients that should not wait: with steady gradients ‖e‖ stays below 2·√(1−δ)/δ times ‖g‖, and momentum before C makes of each
        gradient up to ten."""
        return max(_PLENTY, 2 / delta) * (10 if method.feedback.takes.momentum else 1)

    def _of_residual(self, method: Method, group: int, where: str) -> str:
        norms, waits, delta = self._full(group, "residual_norm"), self._full(group, "residual_to_gradient"), self._delta(group)
        if not norms or not waits or any(b <= a for a, b in pairwise(norms)) or norms[-1] < _GROWTH * norms[0]:
            return ""
        limit = self._limit(method, delta if delta is not None and delta > 1e-3 else 1.0)
        if waits[-1] < limit:
            return ""
        return (
            f"the residual of {where} has grown in each of the last {_SAMPLES} samples, from {norms[0]:.3g} to {norms[-1]:.3g}, and holds "
            f"{waits[-1]:.3g} steps' gradients; it should stay below {limit:.3g}. What is held back comes too late to be of use. Send more (a "
            "smaller ratio, ratio_schedule=, fewer skips), lower the learning rate, begin without compression (warmup_steps=), or take "
            "double_squeeze()."
        )
