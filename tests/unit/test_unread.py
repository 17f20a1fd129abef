"""What is extracted from gradients of which nothing is kept has the bits of what is extracted from a copy of them, and no copy is made."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, GradientExchange
from hvd_ecsgd.compressors import QSGD, Cast, Sign
from hvd_ecsgd.exchange import AllGather
from hvd_ecsgd.feedback import NoFeedback
from hvd_ecsgd.kernels import Addition, Unread, native
from hvd_ecsgd.kernels.library import FILE, Library
from hvd_ecsgd.protocols import Accumulated, StepContext, Task, wanted
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.values import Part, Result, Reversals
from tests.unit.test_accumulate import PAIRS
from tests.unit.test_kernels import compiled, library, same, table, values, variants

COMPRESSORS = [Cast(), Cast(torch.bfloat16), Cast(saturate=True), QSGD(), QSGD(7, 16, "max"), QSGD(1, 5), QSGD(100, 2**15)]
SIZES = [70, 0, 1, 5000, 333]
KEY = Key(0, 3, 1)


def gradients_of(kind: str, dtype: torch.dtype, sizes: list[int] = SIZES) -> list[torch.Tensor]:
    """They begin anywhere."""
    return [values(kind, n + i % 3, torch.float32, i).to(dtype)[i % 3 :] for i, n in enumerate(sizes)]


def unread(segments: Segments, gradients: list[torch.Tensor]) -> Unread:
    return Unread(Addition(segments, torch.full((segments.numel,), float("nan"), dtype=segments.dtype), 0.0), gradients, [])


def task_of(accumulated: Accumulated, compressor: Any, segments: Segments) -> Task:
    return Task("w", segments, compressor, {}, StepContext(0, 0), accumulated, Result(segments.zeros()), Reversals(None))


@compiled
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_the_bits_are_those_of_a_copy(compressor: Any) -> None:
    """On every variant, of gradients of every type, and with large finite numbers; the buffer is not written, nor are the gradients."""
    for variant, (dtype, given), kind in itertools.product(variants(), PAIRS, ("gaussian", "heavy-tailed")):
        gradients, segments = [g.nan_to_num(0.0, 0.0, 0.0) for g in gradients_of(kind, given)], table(SIZES, dtype)
        before = [g.clone() for g in gradients]
        expected = compressor.extract_(torch.cat([g.to(dtype) for g in gradients]), segments, KEY)
        source, extraction = unread(segments, gradients), compressor.extraction(segments, KEY)
        assert source.waits and source.extract_(extraction) and source.finite and not source.waits
        assert same(extraction.payload, expected), (variant, dtype, given, kind)
        assert bool(source.buffer.isnan().all()) and all(map(torch.equal, gradients, before)), variant


@compiled
@pytest.mark.parametrize("compressor", [Cast(), QSGD()], ids=str)
def test_what_is_not_finite_is_told(compressor: Any) -> None:
    """The payload is then one of NaNs, as of a copy."""
    for variant, (dtype, given), bad in itertools.product(variants(), PAIRS, (float("inf"), float("nan"))):
        gradients, segments = gradients_of("gaussian", given), table(SIZES, dtype)
        gradients[3][-1] = bad
        source = unread(segments, gradients)
        task = task_of(source, compressor, segments)
        payload = task.extract_("gather")
        assert source.finite is False and task.poisoned and source.buffer.numel() == 0, variant
        assert compressor.finite(payload, segments) is False, variant


@compiled
def test_threads_change_nothing() -> None:
    found, sizes = [], [100_001, 70_003]
    for n in (1, 2):
        torch.set_num_threads(n)
        with native.forced(library):
            extraction = QSGD(7).extraction(table(sizes, torch.float32), KEY)
            assert extraction is not None
            assert unread(table(sizes, torch.float32), gradients_of("gaussian", torch.float32, sizes)).extract_(extraction)
        torch.set_num_threads(1)
        found.append(extraction.payload)
    assert torch.equal(*found)


@dataclass(frozen=True)
class Halved(Cast):
    """A class of somebody's own, which says nothing of gradients."""

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        buffer.mul_(0.5)
        return super().extract_(buffer, segments, key)


class Counted(Library):
    def __init__(self) -> None:
        super().__init__(FILE)
        self.called: list[str] = []

    def call(self, name: str, *arguments: Any) -> int:
        self.called.append(name)
        return super().call(name, *arguments)


@compiled
@pytest.mark.parametrize(
    "compressor, pieces, copied",
    [(Cast(), 1, False), (QSGD(), 1, False), (Halved(), 1, True), (Cast(), 2, True), (QSGD(bucket=2**15 + 1), 1, True), (Sign(), 1, True)],
    ids=str,
)
def test_others_extract_from_a_copy(compressor: Any, pieces: int, copied: bool) -> None:
    """A class that brings its own extraction, pieces of the buffer, buckets longer than a part, compressors that cannot."""
    counted, segments = Counted(), table(SIZES, torch.float32)
    with native.forced(counted):
        task_of(unread(segments, gradients_of("gaussian", torch.float32)), compressor, segments).extract_("gather", segments.piece(0, pieces))
    assert ("accumulate" in counted.called) == copied and any(name.endswith("_extract_from") for name in counted.called) != copied


@compiled
def test_a_rule_that_does_not_copy_is_heard() -> None:
    """What it makes of the gradients is what is extracted."""

    class Half(NoFeedback):
        def addition(self, part: Part, ctx: StepContext) -> Addition:
            return Addition(part.segments, part.segments.scratch(), 0.0, gradient=0.5)

    segments, gradients = table(SIZES, torch.float32), gradients_of("gaussian", torch.float32)
    with native.forced(library):
        result = Half().accumulate_(Part({}, gradients, segments), gradients, StepContext(0, 0))  # type: ignore[arg-type]
        payload = task_of(result, Cast(), segments).extract_("reduce")
    assert torch.equal(payload, (0.5 * torch.cat(gradients)).half())


@compiled
def test_gradients_are_read_before_results_are_written() -> None:
    """As these may be where they are; whoever looks at the buffer finds them in it."""
    asked: list[Callable[[Task], object]] = [lambda t: t.result(), lambda t: t.accumulated.settle(), lambda t: t.poisoned, lambda t: t.buffer]
    with native.forced(library):
        for ask in asked:
            gradients, segments = gradients_of("gaussian", torch.float32), table(SIZES, torch.float32)
            task = task_of(unread(segments, gradients), Cast(), segments)
            ask(task)
            expected = torch.cat(gradients)
            for g in gradients:
                g.zero_()
            assert torch.equal(task.buffer, expected) and task.accumulated.finite


@compiled
def test_sums_that_are_wanted_are_still_told() -> None:
    segments, gradients = table(SIZES, torch.float32), gradients_of("gaussian", torch.float32)
    with native.forced(library):
        part = Part({}, gradients, segments, wanted=wanted(Sign(), AllGather(), segments, 1))  # type: ignore[arg-type]
        result = NoFeedback().accumulate_(part, gradients, StepContext(0, 0))
    assert not result.waits and result.sums is not None


@compiled
def test_methods_without_feedback_make_no_copy() -> None:
    """And those with feedback, which keep a buffer, accumulate."""
    for method, copies in ((Compression.fp16(), False), (Compression.qsgd(), False), (Compression.fp16(error_feedback=True), True)):
        counted = Counted()
        with native.forced(counted):
            exchange = GradientExchange([("w", torch.nn.Parameter(torch.zeros(60, 50)))], method)
            means = exchange.reduce({"w": torch.ones(60, 50)})
        torch.testing.assert_close(means["w"], torch.ones(60, 50), rtol=0.5, atol=0.5)
        assert ("accumulate" in counted.called) == copies, method


def extract_everything() -> None:
    """Under sanitizers."""
    for compressor, (dtype, given), bad in itertools.product(COMPRESSORS, PAIRS, (1.0, float("inf"))):
        sizes = [*SIZES, 40_000]
        gradients, segments = gradients_of("gaussian", given, sizes), table(sizes, dtype)
        gradients[-1][-5] = bad
        assert unread(segments, gradients).extract_(compressor.extraction(segments, KEY)) == (bad == 1.0)
