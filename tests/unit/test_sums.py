"""What a compressor wants to know of its buffer is seen in the pass that accumulates, and changes no bit of what is sent and left."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hvd_ecsgd.compressors import Sign, Ternary, TopK
from hvd_ecsgd.exchange import AllGather, TwoPass
from hvd_ecsgd.kernels import Addition, native
from hvd_ecsgd.protocols import Accumulated, StepContext, Sums, Task, wanted
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.values import Result, Reversals
from tests.unit.test_kernels import compiled, library, same, table, values, variants

SIZES = [70, 0, 1, 333, 33_000]
ALL = [Sign(), Sign("l2"), Ternary(), Ternary("l1")]


def accumulated(compressor: Any, exchange: Any, n: int, kind: str, dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> Accumulated:
    segments = table(list(sizes), dtype)
    buffer = values("gaussian", segments.numel + 1, dtype, 1)[1:]
    gradients = [values(kind, size, dtype, i) for i, size in enumerate(sizes)]
    return Addition(segments, buffer, 0.7).accumulated_(gradients, gradients, wanted(compressor, exchange, segments, n))


def task_of(result: Accumulated, compressor: Any, segments: Segments) -> Task:
    return Task("w", segments, compressor, {}, StepContext(0, 0), result, Result(torch.empty(0)), Reversals(None))


@compiled
@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_one_pass_gives_the_bits_of_two(compressor: Any) -> None:
    """On every variant, of whole segments and of pieces; also where numbers are so large that the pass stops to look at all of them first."""
    for _, n, kind, dtype in itertools.product(variants(), (1, 3), ("gaussian", "heavy-tailed", "zeros", "denormal"), (torch.float32, torch.float64)):
        exchange = TwoPass() if n > 1 else AllGather()
        result = accumulated(compressor, exchange, n, kind, dtype)
        assert result.finite and result.sums is not None
        for part in result.sums.wanted.tables:
            two, one = result.buffer.clone(), result.buffer.clone()
            sums = result.sums.of(result.buffer, part)
            assert sums is not None
            payloads = compressor.extract_(two, part, Key(0, 0)), compressor.extract_by_sums_(one, part, Key(0, 0), sums)
            assert torch.equal(*payloads) and same(one, two), (n, kind, dtype)


@compiled
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
def test_threads_change_nothing(kind: str) -> None:
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        with native.forced(library):
            sums = accumulated(Ternary(), TwoPass(), 2, kind, torch.float32, [100_001, 5, 30_003]).sums
        assert sums is not None
        found.append([*sums.totals.tolist(), *sums.nonzero.tolist()])
    torch.set_num_threads(1)
    assert found[0] == found[1]


@dataclass(frozen=True)
class Halved(Sign):
    """A class of somebody's own, which says nothing of sums."""

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        buffer.mul_(0.5)
        return super().extract_(buffer, segments, key)


@dataclass(frozen=True)
class FirstOnly(AllGather):
    """An exchange that does not take all of the buffer."""

    def extracts(self, segments: Segments, size: int) -> Sequence[Segments]:
        return [replace(segments, table=segments.table[:1])]


@compiled
def test_sums_are_used_only_where_they_are_true() -> None:
    """Not of a buffer that was written to since, of another table, or by a class that brings its own extraction (each beside a control)."""
    with native.forced(library):
        result = accumulated(Sign(), AllGather(), 1, "gaussian", torch.float32)
        assert result.sums is not None
        segments = result.sums.wanted.tables[0]
        assert result.sums.of(result.buffer, segments) is not None and result.sums.of(result.buffer, segments.piece(0, 2)) is None
        spoilt = Sums(result.sums.wanted, result.sums.version, result.sums.totals * 2, result.sums.nonzero)
        scales = [task_of(replace(result, buffer=result.buffer.clone(), sums=s), Sign(), segments).extract_("gather") for s in (spoilt, None)]
        assert not torch.equal(*scales), "the sums that were told are used"
        result.buffer.mul_(1.0)
        assert result.sums.of(result.buffer, segments) is None
        for compressor, exchange in ((Halved(), AllGather()), (Sign(), FirstOnly()), (Sign(block=8), AllGather()), (TopK(), AllGather())):
            assert wanted(compressor, exchange, segments, 1) is None
        assert wanted(Sign(), AllGather(), segments, 1) is not None


def test_who_has_no_compiled_kernels_is_told_nothing() -> None:
    with native.forced(None):
        result = accumulated(Sign(), AllGather(), 1, "gaussian", torch.float32)
    assert result.finite and result.sums is None
