"""How large a step may be with stale and compressed gradients."""

from __future__ import annotations

import math

from ..arguments import check_integer, check_number
from ..compressors.base import check_unbiased
from ..protocols import UnbiasedCompressor

__all__ = ["alpha_of", "delay_limit", "suggested_step_size"]


def alpha_of(compressor: UnbiasedCompressor, d: int) -> float:
    """α of E‖C(v)‖² ≤ α‖v‖² for every v of `d` elements: 1 + ω. Raises `CompressionError` for a compressor that is not unbiased."""
    check_unbiased(compressor, "alpha_of")
    check_integer(d, "d", "a number of elements ≥ 1", least=1)
    return 1.0 + compressor.omega(d)


def suggested_step_size(alpha: float, tau: int, L: float) -> float:
    """η = 1/(L(α/2 + τ)) for x ← x − η·Σ_i C(∇f_i(x_{k−τ_i})), C unbiased with E‖C(v)‖² ≤ `alpha`·‖v‖², τ_i ≤ `tau` updates; `L` of f = Σ_i f_i.

    A measured rule, ours: at or below the mean-square limit on quadratics for τ ≤ 15 and α ≤ 1024 in everything tried, and equal to it at τ = 0.
    For a mean over n workers in place of the sum, L is the mean's, and η that of the mean. Raises `CompressionError` for α < 1, τ < 0, L ≤ 0.
    """
    check_number(alpha, "alpha", "a finite number ≥ 1 (1 + ω of the compressor)", lambda a: a >= 1)
    check_integer(tau, "tau", "a number of updates ≥ 0", least=0)
    check_number(L, "L", "a finite number > 0", lambda value: value > 0)
    return 1.0 / (L * (alpha / 2 + tau))


def delay_limit(tau: int, L: float, *, varying: bool = False) -> float:
    """The largest stable η on quadratics with uncompressed gradients (α = 1) that are `tau` updates old: 2 sin(π/(2(2τ+1)))/L.

    `varying`: of any age from 0 to `tau`, by turns, (3/2 + 1/(2(τ+1)))/((τ+1)·L). Raises `CompressionError` for τ < 0 and L ≤ 0.
    """
    check_integer(tau, "tau", "a number of updates ≥ 0", least=0)
    check_number(L, "L", "a finite number > 0", lambda value: value > 0)
    return (1.5 + 0.5 / (tau + 1)) / ((tau + 1) * L) if varying else 2 * math.sin(math.pi / (2 * (2 * tau + 1))) / L
