"""Positions that all ranks draw alike, and the blocks of the whole model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_ecsgd.compressors import (
    GlobalRandomBlock,
)
from hvd_ecsgd.compressors.base import distinct_below
from hvd_ecsgd.segments import Key, Segment, Segments
from tests.property.operators import checked, keys, seeds, table

# -- shared random positions -----------------------------------------------------------------------------------------------------

HERE = Segment("w", 0, 0)


@checked
@given(n=st.integers(1, 3000), share=st.floats(0, 1), seed=seeds)
def test_positions_are_distinct_and_ascending(n: int, share: float, seed: int) -> None:
    k = round(share * n)
    chosen = distinct_below(Key(seed, 0), HERE, n, k, "")
    assert chosen.size == k
    assert k == 0 or (chosen.min() >= 0 and chosen.max() < n)
    assert (np.diff(chosen) > 0).all()


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_subset_is_equally_likely(k: int) -> None:
    """χ² over all subsets of six, six standard deviations; k = 4 takes the way by the complement."""
    subsets = {c: i for i, c in enumerate(itertools.combinations(range(6), k))}
    counts = np.bincount([subsets[tuple(distinct_below(key, HERE, 6, k, "").tolist())] for key in keys(12_000)], minlength=len(subsets))
    degrees = len(subsets) - 1
    assert chi_square(counts) < degrees + 6 * math.sqrt(2 * degrees)
    without_the_last = counts.copy()
    without_the_last[-1] = 0
    assert chi_square(without_the_last) > degrees + 6 * math.sqrt(2 * degrees), "control: one subset never comes"


def test_positions_are_the_same_everywhere() -> None:
    """Fixed numbers: another platform or version that draws other positions would silently average different entries."""
    assert distinct_below(Key(1, 2), Segment("layer.weight", 0, 0), 1_000_000, 5, "positions").tolist() == POSITIONS
    assert distinct_below(Key(1, 3), Segment("layer.weight", 0, 0), 1_000_000, 5, "positions").tolist() != POSITIONS


POSITIONS = [288687, 405998, 431800, 552191, 914854]


# -- global random block ---------------------------------------------------------------------------------------------------------


def chosen_places(compressor: Any, segments: Segments, key: Key) -> set[int]:
    """Places in the model that a table's payload covers."""
    buffer = torch.ones(max((s.stop for s in segments), default=0))
    compressor.extract_(buffer, segments, key)
    return {s.offset + i for s in segments for i in range(s.numel) if buffer[s.start + i] == 0}


@checked
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), blocks=st.integers(1, 50), ratio=st.floats(1, 20), n=st.integers(1, 4), seed=seeds)
def test_places_do_not_depend_on_buckets_or_pieces(sizes: list[int], blocks: int, ratio: float, n: int, seed: int) -> None:
    """The same places of the model from one table, from a table for each parameter, in any order, and from pieces."""
    ratio = min(ratio, blocks)
    compressor, key, d = GlobalRandomBlock(ratio, blocks), Key(seed, 0), sum(sizes)
    whole = table(*sizes, dtype=torch.float32)
    reference = chosen_places(compressor, whole, key)
    named = [(s.name, torch.empty(s.numel)) for s in whole]
    offsets = {s.name: s.offset for s in whole}
    alone = [chosen_places(compressor, Segments.of([pair], offsets, d), key) for pair in named]
    assert set().union(*alone) == reference
    assert chosen_places(compressor, Segments.of(named[::-1], offsets, d), key) == reference
    assert set().union(*(chosen_places(compressor, whole.piece(r, n), key) for r in range(n))) == reference
    cut = min(blocks, d)
    picked = max(1, int(cut / ratio)) if d else 0
    borders = [i * d // cut for i in range(cut + 1)] if d else [0]
    full = [i for i, (low, high) in enumerate(itertools.pairwise(borders)) if set(range(low, high)) <= reference]
    assert len(full) == picked
    assert len(reference) == sum(borders[i + 1] - borders[i] for i in full)


def test_without_the_place_in_the_model_it_would_depend_on_buckets() -> None:
    """Control: each parameter as a model of its own."""
    compressor, key = GlobalRandomBlock(4, 16), Key(0, 0)
    whole = table(40, 40, dtype=torch.float32)
    own = [chosen_places(compressor, Segments.of([(s.name, torch.empty(s.numel))]), key) for s in whole]
    assert own[0] | {40 + i for i in own[1]} != chosen_places(compressor, whole, key)


def test_a_parameter_without_a_block_still_sends_one_element() -> None:
    """Payload sizes change from step to step, are equal for equal keys, and are never zero; every block comes equally often."""
    compressor, d = GlobalRandomBlock(8, 16), 160
    first = Segments.of([("a", torch.empty(16))], {"a": 16}, d)
    sizes = [compressor.extract_(torch.ones(16), first, key).numel() for key in keys(400)]
    assert set(sizes) == {1, 3, 5, 7, 11, 13, 15}
    assert min(sizes) == 1
    assert compressor.payload_size(first) is None
    counts = np.zeros(16)
    for key in keys(2000):
        for place in chosen_places(compressor, table(d, dtype=torch.float32), key):
            counts[place // 10] += 0.1
    assert chi_square(counts) < 15 + 6 * math.sqrt(30)
