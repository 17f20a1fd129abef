"""How strongly to compress at which step: schedules of the compression ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ..arguments import check_integer, check_ratio, is_integer
from ..errors import CompressionError
from ..protocols import Compressor

__all__ = ["Ratios", "at_step", "check_ratios", "exponential_ratios"]

Ratios = tuple[tuple[int, float], ...]
"""(step, ratio) pairs: from this step on, this ratio. Steps ascend. Plain numbers, so ranks can compare them."""


def check_ratios(compressor: Compressor, schedule: Sequence[tuple[int, float]], warmup_steps: int) -> Ratios:
    """`schedule` as tuples. Raises `CompressionError` unless steps are integers that ascend, the first at most `warmup_steps`, and `compressor` has
    a ratio."""
    pairs: list[tuple[int, float]] = []
    entries: Any = schedule
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in entries):
        raise CompressionError(f"ratio_schedule: expected a list of (step, ratio) pairs such as [(0, 4), (500, 64)], got {entries!r}.")
    for step, ratio in entries:
        before = pairs[-1][0] if pairs else -1
        if not is_integer(step, before + 1):
            raise CompressionError(f"ratio_schedule: steps must be integers ≥ 0 that ascend, got {step!r} after {[s for s, _ in pairs]}.")
        check_ratio(ratio, "ratio_schedule")
        pairs.append((step, float(ratio)))
    settings: Any = compressor
    if pairs and (not any(f.name == "ratio" for f in fields(settings)) or getattr(compressor, "k", None) is not None):
        raise CompressionError(f"ratio_schedule: {compressor} has no ratio that could change; use a compressor with ratio=….")
    if pairs and pairs[0][0] > warmup_steps:
        raise CompressionError(
            f"ratio_schedule: its first step is {pairs[0][0]}, which leaves steps from {warmup_steps} on without a ratio; begin with "
            f"({warmup_steps}, …), or set warmup_steps={pairs[0][0]} for uncompressed steps before it."
        )
    return tuple(pairs)


def at_step(compressor: Compressor, schedule: Sequence[tuple[int, float]], step: int) -> Compressor:
    """`compressor` with the ratio that `schedule` has for `step`."""
    if not schedule:
        return compressor
    ratio = next(ratio for first, ratio in reversed(schedule) if first <= step)
    settings: Any = compressor
    changed: Compressor = replace(settings, ratio=ratio)
    return changed


def exponential_ratios(ratio: float, stage_steps: int, stages: int = 5, first: float = 4.0, start: int = 0) -> Ratios:
    """A warm-up from `first` to `ratio` in `stages` stages of `stage_steps` steps, from `start` on, each stage's ratio the same multiple of the last.

    Deep gradient compression (Lin et al. 2018, section 3.3) raises the sparsity over four epochs: 75, 93.75, 98.4375, 99.6, 99.9 %, that is
    `exponential_ratios(1000, steps_per_epoch)`: 4, 16, 63, 251, 1000.
    """
    check_ratio(ratio, "exponential_ratios")
    check_ratio(first, "exponential_ratios")
    check_integer(stage_steps, "exponential_ratios: stage_steps", least=1, most=2**62)
    check_integer(stages, "exponential_ratios: stages", least=1, most=10_000)
    check_integer(start, "exponential_ratios: start", "a step, an integer ≥ 0", least=0)
    if stages == 1:
        return ((start, float(ratio)),)
    growth = (ratio / first) ** (1 / (stages - 1))
    return tuple((start + i * stage_steps, float(ratio) if i == stages - 1 else first * growth**i) for i in range(stages))
