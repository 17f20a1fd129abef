"""The one table of methods, and the one of compressors. A new algorithm is one line here; what holds for all of them is then tested on it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import torch

from hvd_ecsgd import Compression, double_squeeze_comparison, exponential_ratios
from hvd_ecsgd.compressors import (
    QSGD,
    BlockTopK,
    Cast,
    GlobalRandomBlock,
    Identity,
    Natural,
    RandomBlock,
    RandomK,
    Rounding,
    Sign,
    Ternary,
    Threshold,
    TopK,
)
from hvd_ecsgd.exchange import AllGather, AllReduce, Bernoulli, CompSkip, Every, NormBased, PowerSGD, SkipAllReduce, TwoPass
from hvd_ecsgd.feedback import DistEFSGD, ErrorFeedback, GradientSquares, Hutchinson, LocalMomentum, Matrix, MemSGD, Product

__all__ = ["CASES", "COMPRESSORS", "COVERING", "KINDS", "PAIRS", "SWITCHES", "Case", "CompressorCase"]
__all__ += ["bound_method", "by_name", "compressor_cases", "covering", "ids", "rows_that_cover", "traits"]


@dataclass(frozen=True)
class Case:
    """A method as a user would write it, and what it promises.

    The part of `name` before a hyphen is the preset.
    """

    name: str
    make: Callable[[], Any]
    slots: float = 1.0
    """State elements ÷ elements of compressed parameters, with one worker; `server_slots` comes on top, divided by n."""
    server_slots: float = 0.0
    central: bool = False
    """Rank 0 holds all of `server_slots`."""
    exact: bool = True
    """n = 2 real workers give the bits of the simulation. False: Horovod sums this payload in half precision."""
    conserves: bool = True
    """What is not sent is kept somewhere: the η-ratio invariant (docs/algorithms.md §2), or z's (§3), holds to rounding."""
    draws: bool = False
    """Results depend on the step number: by randomness (and the parameter's name), or by a schedule."""
    saves: bool = True
    """Sends fewer bytes than a dense exchange. False: a dense all-reduce of the error goes with every step, or models travel whole."""
    momentum: float = 0.9
    """Of the SGD that the tests train it with. 0: the method refuses any."""
    converges: float = 0.15
    """The training loss of `tests.problems` falls below this share of what it was, in 40 steps."""

    def __str__(self) -> str:
        return self.name


ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
"""Compress everything."""


class _Scaled(dict[str, torch.Tensor]):
    """.3 on the diagonal, for the compressed parameter of `tests.problems.mlp`, whatever its prefix, and those of 40 × 40 elsewhere."""

    def __missing__(self, name: str) -> torch.Tensor:
        return _scaled(1280 if name.endswith("0.weight") else 1600)


@functools.cache
def _scaled(n: int) -> torch.Tensor:
    return 0.3 * torch.eye(n, dtype=torch.float32, device="cpu")


def _product(vectors: Any) -> Any:
    return {name: 0.3 * v + 1e-4 * v.sum() for name, v in vectors.items()}


CASES: tuple[Case, ...] = (
    Case("none", lambda: Compression.none, slots=0),
    Case("fp16", lambda: Compression.fp16, slots=0, exact=False, conserves=False),
    Case("fp16-feedback", lambda: Compression.fp16(error_feedback=True), exact=False, conserves=False),
    Case("random_block", lambda: Compression.random_block(8), draws=True),
    Case("random_block-everything", lambda: Compression.random_block(4, seed=7, **ALL), draws=True),
    Case("random_block-no_feedback", lambda: Compression.random_block(8, error_feedback=False), slots=0, conserves=False, draws=True, converges=0.35),
    Case("random_block-all_gather", lambda: Compression(RandomBlock(8), ErrorFeedback(), AllGather()), draws=True),
    Case("top_k", lambda: Compression.top_k(10)),
    Case("top_k-k", lambda: Compression.top_k(k=20, **ALL)),
    Case("top_k-no_feedback", lambda: Compression.top_k(10, error_feedback=False), slots=0, conserves=False, converges=0.35),
    Case("top_k-local_momentum", lambda: Compression(TopK(10), LocalMomentum(0.0), AllGather()), slots=2),
    Case("top_k-warmup-schedule", lambda: Compression.top_k(10, warmup_steps=2, ratio_schedule=[(2, 2), (4, 5), (7, 10)]), draws=True),
    Case("random_block-schedule", lambda: Compression.random_block(8, ratio_schedule=exponential_ratios(8, 3, 3, first=2), **ALL), draws=True),
    Case("one_bit", lambda: Compression.one_bit()),
    Case("one_bit-everything", lambda: Compression.one_bit(**ALL)),
    Case("one_bit-l2", lambda: Compression.one_bit("l2")),
    Case("one_bit-no_feedback", lambda: Compression.one_bit(error_feedback=False), slots=0, conserves=False, converges=0.35),
    Case("double_squeeze", lambda: Compression.double_squeeze(), server_slots=1),
    Case("double_squeeze-everything", lambda: Compression.double_squeeze(**ALL), server_slots=1),
    Case("double_squeeze-top_k-random_block", lambda: Compression.double_squeeze(TopK(5), RandomBlock(4)), server_slots=1, draws=True),
    Case("double_squeeze-mem_sgd", lambda: double_squeeze_comparison(TopK(5))["mem_sgd"]),
    Case("double_squeeze-worker_only", lambda: double_squeeze_comparison()["worker_only"], conserves=False, converges=0.35),
    Case("double_squeeze-uncompensated", lambda: double_squeeze_comparison()["uncompensated"], slots=0, conserves=False, converges=0.35),
    Case("double_squeeze-local_momentum", lambda: Compression(Sign(), LocalMomentum(0.0), TwoPass()), slots=2, server_slots=1),
    Case("double_squeeze-central", lambda: Compression.double_squeeze(central=True, **ALL), server_slots=1, central=True),
    Case(
        "double_squeeze-central-threshold-global_random_block",
        lambda: Compression.double_squeeze(Threshold(5), GlobalRandomBlock(4, 32), central=True),
        server_slots=1,
        central=True,
        draws=True,
    ),
    Case("double_squeeze-warmup", lambda: Compression.double_squeeze(warmup_steps=3, **ALL), server_slots=1, draws=True),
    Case("bf16", lambda: Compression.bf16, slots=0, conserves=False),
    Case("bf16-feedback", lambda: Compression.bf16(error_feedback=True), server_slots=1),
    Case("global_random_block", lambda: Compression.global_random_block(8, 64), draws=True),
    Case("global_random_block-everything", lambda: Compression.global_random_block(4, 32, **ALL), draws=True, converges=0.3),
    Case("global_random_block-double_squeeze", lambda: Compression.double_squeeze(GlobalRandomBlock(4, 32)), server_slots=1, draws=True),
    Case("random_k", lambda: Compression.random_k(8), draws=True),
    Case("random_k-unbiased", lambda: Compression.random_k(4, unbiased=True), slots=0, conserves=False, draws=True, converges=0.3),
    Case("random_k-double_squeeze-everything", lambda: Compression.double_squeeze(RandomK(4), **ALL), server_slots=1, draws=True, converges=0.2),
    Case("top_k-block", lambda: Compression.top_k(10, block=64)),
    Case("threshold", lambda: Compression.threshold(10), draws=True),
    Case("threshold-double_squeeze-everything", lambda: Compression.double_squeeze(Threshold(5), **ALL), server_slots=1, draws=True),
    Case("threshold-two_bits", lambda: Compression.threshold(5, two_bits=True), draws=True),
    Case("one_bit-block", lambda: Compression.one_bit(block=100)),
    Case("ternary", lambda: Compression.ternary()),
    Case("ternary-double_squeeze", lambda: Compression.double_squeeze(Ternary("l2")), server_slots=1),
    Case("qsgd", lambda: Compression.qsgd(), slots=0, conserves=False, draws=True),
    Case("qsgd-4_bits", lambda: Compression.qsgd(7, 64, "max"), slots=0, conserves=False, draws=True, converges=0.3),
    Case("qsgd-feedback-double_squeeze", lambda: Compression.double_squeeze(QSGD(15, 64, "max"), **ALL), server_slots=1, draws=True),
    Case("unbiased", lambda: Compression.unbiased(QSGD(15, 64)), slots=0, conserves=False, draws=True, converges=0.3),
    Case("natural", lambda: Compression.natural(), slots=0, conserves=False, draws=True),
    Case("natural-feedback", lambda: Compression.natural(error_feedback=True), draws=True),
    Case("dist_ef_sgd", lambda: Compression.dist_ef_sgd(), slots=2, server_slots=1),
    Case("dist_ef_sgd-everything", lambda: Compression.dist_ef_sgd(TopK(5), Sign(), **ALL), slots=2, server_slots=1),
    Case("comp_skip", lambda: Compression.comp_skip(), slots=2, server_slots=1),
    Case(
        "comp_skip-drawn-everything",
        lambda: Compression.comp_skip(Bernoulli(0.7), Bernoulli(0.7), **ALL),
        slots=2,
        server_slots=1,
        draws=True,
    ),
    Case("comp_skip-norm", lambda: Compression.comp_skip(NormBased(), NormBased()), slots=2, server_slots=1),
    Case(
        "comp_skip-all_reduce",
        lambda: Compression(RandomBlock(8), DistEFSGD(), SkipAllReduce(Bernoulli(0.7, cap=2)), **ALL),
        slots=2,
        draws=True,
        converges=0.3,
    ),
    Case("hessian_aided", lambda: Compression.hessian_aided(), slots=2, conserves=False, saves=False),
    Case("hessian_aided-matrix", lambda: Compression.hessian_aided(Matrix(_Scaled()), TopK(10)), conserves=False),
    Case("hessian_aided-local_matrix", lambda: Compression.hessian_aided(Matrix(_Scaled(), local=True)), slots=2, conserves=False, saves=False),
    Case("hessian_aided-product", lambda: Compression.hessian_aided(Product(_product)), slots=2, conserves=False, saves=False),
    Case(
        "hessian_aided-product-random_block",
        lambda: Compression.hessian_aided(Product(_product, local=False), RandomBlock(8)),
        slots=2,
        conserves=False,
        draws=True,
    ),
    Case("hessian_aided-hutchinson", lambda: Compression.hessian_aided(Hutchinson(_product, 0.9)), slots=2, conserves=False, draws=True, saves=False),
    Case(
        "hessian_aided-squares-double_squeeze",
        lambda: Compression.hessian_aided(GradientSquares(16.0), TopK(5), TwoPass()),
        slots=2,
        server_slots=1,
        conserves=False,
        saves=False,
    ),
    Case("cser", lambda: Compression.cser(RandomBlock(8), RandomBlock(2), 5), slots=3, draws=True),
    Case("butterfly", lambda: Compression.butterfly(period=5), slots=3, draws=True, saves=False),
    Case("butterfly-everything", lambda: Compression.butterfly(Sign(), 5, **ALL), slots=3, draws=True),
    Case("cser-everything", lambda: Compression.cser(Sign(), TopK(2), 3, **ALL), slots=3, draws=True),
    Case("power_sgd", lambda: Compression.power_sgd(), draws=True),
    Case("power_sgd-own-everything", lambda: Compression.power_sgd(4, residual="own", **ALL), draws=True),
    Case("power_sgd-no_feedback", lambda: Compression.power_sgd(8, error_feedback=False), slots=0, conserves=False, draws=True),
    Case("power_sgd-local_momentum", lambda: Compression(Identity(), LocalMomentum(0.3), PowerSGD(2), **ALL), slots=3, draws=True),
    Case("topk_sgd", lambda: Compression.topk_sgd(10), momentum=0, converges=0.5),
    Case("topk_sgd-block-everything", lambda: Compression.topk_sgd(8, block=64, **ALL), momentum=0, converges=0.5),
    Case("topk_sgd-double_squeeze", lambda: Compression(TopK(5), MemSGD(), TwoPass()), server_slots=1, momentum=0, converges=0.5),
    Case("pef", lambda: Compression.pef(8), slots=2, draws=True),
    Case("local_momentum", lambda: Compression.local_momentum(8), slots=2, draws=True),
    Case("local_momentum-dense", lambda: Compression(Identity(), LocalMomentum(0.0), AllReduce()), slots=2),
    Case("detached", lambda: Compression.detached(8), slots=3, draws=True),
    # Eight exchanges of an eighth in the 40 steps of the test.
    Case("detached-local_steps", lambda: Compression.detached(8, period=5, **ALL), slots=4, draws=True, converges=0.35),
    Case("detached-local_steps-average_errors", lambda: Compression.detached(4, 1.0, period=5, average_errors=5), slots=4, draws=True),
    Case("detached-step_ahead-everything", lambda: Compression.detached(8, 1.0, **ALL), slots=3, draws=True),
    Case(
        "detached-warmup-schedule",
        lambda: Compression.detached(8, warmup_steps=2, ratio_schedule=[(0, 4), (7, 8)], **ALL),
        slots=3,
        draws=True,
    ),
    Case("detached-top_k", lambda: Compression(TopK(10), LocalMomentum(0.3), AllGather()), slots=3),
)


SWITCHES: dict[int, Callable[[], Compression]] = {
    0: lambda: Compression.double_squeeze(TopK(5), Sign()),
    2: lambda: Compression.top_k(10),
    3: lambda: Compression.double_squeeze(central=True),
    4: lambda: Compression.double_squeeze(RandomBlock(4)),
    5: lambda: Compression(Identity(), ErrorFeedback(), AllReduce()),
    6: lambda: Compression(TopK(10), ErrorFeedback(), CompSkip(Every(2), Every(2, offset=1), Sign())),
    7: lambda: Compression.random_block(8, ratio_schedule=[(0, 2), (8, 4)]),
}
"""A training that changes its method at these steps: every kind of exchange, after every other kind of state."""


def bound_method(case: Case) -> Any:
    """The `Method` behind a case: compressor, feedback, exchange."""
    made = case.make()
    return (made if isinstance(made, Compression) else made()).method


def by_name(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def traits(case: Case) -> set[tuple[Any, ...]]:
    """What a backend could treat in a way of its own: the pair of feedback and exchange, each part with its settings (but numbers that only say how
    much), and what is promised."""
    method = bound_method(case)
    found: set[tuple[Any, ...]] = {
        ("preset", case.name.split("-")[0]),
        ("feedback × exchange", type(method.feedback), type(method.exchange)),
        ("compressor", type(method.compressor)),
        ("exact, momentum, central", case.exact, bool(case.momentum), case.central),
    }
    for part in (method, method.feedback, method.exchange):
        for field in fields(part):
            value = getattr(part, field.name)
            if type(value).__module__.startswith("hvd_ecsgd"):
                found.add((type(part), field.name, type(value)))
            elif value != field.default and not isinstance(value, float):
                found.add((type(part), field.name, "set"))
    return found


def covering(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Some of them that together have all their traits, and none of which can be left out; of those that would do, the ones further up."""
    kept = {case: traits(case) for case in cases}
    counts = Counter(chain.from_iterable(kept.values()))
    for case in reversed(tuple(kept)):
        if all(counts[trait] > 1 for trait in kept[case]):
            counts.subtract(kept.pop(case))
    return tuple(kept)


def rows_that_cover(cases: Iterable[Case] | None = None) -> list[Any]:
    """For `pytest.mark.parametrize`: those of the given rows (all by default) that cover them, and the others with --full only."""
    import pytest  # ranks import this module, and have no use for it

    rows = tuple(CASES if cases is None else cases)
    kept = covering(rows)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.full) for case in rows]


def ids(case: Any) -> str:
    """For `pytest.mark.parametrize(..., ids=ids)`."""
    return str(case)


@dataclass(frozen=True)
class CompressorCase:
    """A compressor and its contraction: ‖C(v) − v‖² ≤ leaves(v)·‖v‖² for one segment v, leaves = 1 − δ."""

    name: str
    compressor: Any
    leaves: Callable[[np.ndarray], float]
    selects: bool = True
    """Sends some entries as they are, and no others."""
    sees_everything: bool = True
    """Every entry has a part in the payload, or could have had one: a NaN anywhere is noticed."""
    on_average: bool = False
    """The contraction is the mean over draws."""

    def __str__(self) -> str:
        return self.name


def _l1_share(v: np.ndarray) -> float:
    """‖v‖₁/(√d·‖v‖₂), 1 of a zero vector."""
    norm = np.linalg.norm(v)
    return float(np.abs(v).sum() / (np.sqrt(v.size) * norm)) if norm else 1.0


_DESCRIBED = (
    CompressorCase("identity", Identity(), lambda v: 0.0),
    CompressorCase("cast", Cast(), lambda v: 2.0**-22, selects=False),
    CompressorCase("random_block-3", RandomBlock(3), lambda v: 1 - max(1, v.size // 3) / v.size, sees_everything=False, on_average=True),
    CompressorCase("random_block-1", RandomBlock(1), lambda v: 0.0),
    CompressorCase("top_k-ratio", TopK(4), lambda v: 1 - max(1, v.size // 4) / v.size),
    CompressorCase("top_k-k", TopK(k=3), lambda v: 1 - min(3, v.size) / v.size),
    CompressorCase("sign-l1", Sign("l1"), lambda v: 1 - _l1_share(v) ** 2, selects=False),
    CompressorCase("sign-l2", Sign("l2"), lambda v: 2 - 2 * _l1_share(v), selects=False),
    CompressorCase("cast-bf16", Cast(torch.bfloat16), lambda v: 2.0**-16, selects=False),
    CompressorCase("global_random_block", GlobalRandomBlock(3, 7), lambda v: 1.0, sees_everything=False),
    CompressorCase("random_k-3", RandomK(3), lambda v: 1.0, sees_everything=False),
    CompressorCase("random_k-1", RandomK(1), lambda v: 0.0),
    CompressorCase("random_k-unbiased", RandomK(3, unbiased=True), lambda v: max(1.0, (v.size / max(1, v.size // 3) - 1) ** 2), False, False),
    CompressorCase("threshold", Threshold(4), lambda v: 1 - max(1, v.size // 4) / v.size),
    CompressorCase("threshold-two_bits", Threshold(4, two_bits=True), lambda v: 1.0, selects=False),
    CompressorCase("block_top_k", BlockTopK(4, 16), lambda v: 1 - 1 / 7),
    CompressorCase("rounding", Rounding(0.25, 32), lambda v: 1.0, selects=False),
    CompressorCase("rounding-16_bits", Rounding(), lambda v: 1.0, selects=False),
    CompressorCase("sign-blocks", Sign("l1", 8), lambda v: 1.0, selects=False),
    CompressorCase("ternary-l1", Ternary("l1"), lambda v: 1 - _l1_share(v[v != 0]) ** 2, selects=False),
    CompressorCase("ternary-l2", Ternary("l2"), lambda v: 2 - 2 * _l1_share(v[v != 0]), selects=False),
    CompressorCase("qsgd-2_bits", QSGD(1, 16), lambda v: min(v.size, 16), selects=False),
    CompressorCase("qsgd-4_bits-max", QSGD(7, 16, "max"), lambda v: min(v.size, 16) / 49, selects=False),
    CompressorCase("qsgd-8_bits", QSGD(), lambda v: v.size / 127**2, selects=False),
    CompressorCase("natural", Natural(), lambda v: 1 / 4, selects=False),
)


def compressor_cases(cases: Iterable[Case]) -> tuple[CompressorCase, ...]:
    """Those of the table above, and for every other class that a method compresses with, a case that promises what its `delta` does."""
    used = {type(c): c for case in cases for c in (bound_method(case).compressor, getattr(bound_method(case).exchange, "server_compressor", None))}
    described = {type(None), *(type(c.compressor) for c in _DESCRIBED)}
    more = [(kind.__name__, c) for kind, c in used.items() if kind not in described]
    return (*_DESCRIBED, *(CompressorCase(name, c, lambda v, c=c: 1 - c.delta(torch.from_numpy(v)), False, False) for name, c in more))  # type: ignore[misc]


COMPRESSORS = compressor_cases(CASES)

COVERING = covering(CASES)
"""What slow tests take, on real ranks, and in one process of what the core does (`rows_that_cover`); --full takes all. State, purity, conservation,
and training in one process and on two ranks of MPI take every row always."""


def first_of(kind: Callable[[Case], object]) -> tuple[Case, ...]:
    """Of each kind, the first of `COVERING`."""
    firsts = {kind(case): case for case in reversed(COVERING)}.values()
    return tuple(case for case in COVERING if case in firsts)


KINDS = first_of(lambda case: (type(bound_method(case).exchange), case.exact))
"""Of every kind of exchange, and of payloads in half precision: what the slowest tests take."""

PAIRS = first_of(lambda case: (type(bound_method(case).exchange), case.exact, bound_method(case).feedback.takes))
"""The same for every pair of such a kind and of what a rule takes over from the optimizer: what slow tests of saved state take, whose parts are the
exchange's and the rule's, and which in one process every row is put to always; and Horovod on three ranks, after all that cover on two."""
