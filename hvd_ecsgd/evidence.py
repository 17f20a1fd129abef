"""Which methods reach the accuracy of dense training, and how long they take: `Compression.auto` and the advisor both decide by it.

Found by benchmarks/time_to_accuracy.py, on digits and on a language model; docs/results/accuracy_curves.json has the losses, and a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["STEPS", "WORTH", "fastest"]

STEPS: Mapping[str, float] = {"none": 1.0, "fp16": 1.0, "power_sgd(2)": 1.25, "top_k(100)": 1.75}
"""By preset: so many times as many steps as dense training takes to the same accuracy, the mean over both, with a learning rate that suits each; less
than a fifth is noise. What is not here did not come there on the language model in twice as many as the dense run took in all."""
WORTH = 0.9
"""Compression is worth its while where training takes less than so much of the time of dense training."""


def fastest(seconds: Mapping[str, float], steps: Mapping[str, float], dense: str) -> str:
    """Of methods whose step takes so many `seconds`, and which take so many times as many `steps`, the one that is there first; `dense` where that
    saves too little."""
    taken = {name: seconds[name] * steps[name] for name in seconds if name in steps}
    best = min(taken, key=lambda name: taken[name])
    return best if taken[best] < WORTH * taken[dense] else dense
