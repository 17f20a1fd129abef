"""Tables of segments, their pieces, and keys."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_ecsgd.kernels import all_finite, pack_bits, unpack_bits
from hvd_ecsgd.segments import Key, Segment, Segments
from tests.property.layouts import layouts

checked = settings(deadline=None, max_examples=100, derandomize=True)


@checked
@given(layout=layouts, n=st.integers(1, 9))
def test_pieces_partition_every_segment(layout: Segments, n: int) -> None:
    """The n pieces of a segment, in order, are the segment; but the last ones they are whole bytes when packed to bits."""
    pieces = [layout.piece(r, n) for r in range(n)]
    for i, segment in enumerate(layout):
        parts = [p.table[i] for p in pieces]
        assert [x for p in parts for x in range(p.start, p.stop)] == list(range(segment.start, segment.stop))
        assert {p.name for p in parts} == {segment.name}
        lengths = [p.numel for p in parts if p.numel]
        assert all(length == lengths[0] and length % 8 == 0 for length in lengths[:-1])
    if n > 1:
        assert all(p.piece == r for r, table in enumerate(pieces) for p in table)
    assert sum(p.numel for p in pieces) == layout.numel
    # No piece is more than 7 elements per segment above its share: the largest server holds about d/n.
    assert max(p.numel for p in pieces) <= layout.numel / n + 8 * len(layout)


@checked
@given(layout=layouts, n=st.integers(1, 5), data=st.data())
def test_a_compact_table_names_the_same_elements(layout: Segments, n: int, data: st.DataObject) -> None:
    piece = layout.piece(data.draw(st.integers(0, n - 1)), n)
    buffer = torch.arange(layout.numel, dtype=layout.dtype)
    compact = torch.cat([*piece.views(buffer), buffer[:0]])
    assert piece.compact.numel == piece.numel == compact.numel()
    for a, b in zip(piece.views(buffer), piece.compact.views(compact), strict=True):
        assert torch.equal(a, b)


@checked
@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**40), n=st.integers(1, 2**40))
def test_keys_are_functions_of_what_they_name(seed: int, step: int, n: int) -> None:
    """Same names, same numbers, within range; and a change of any name changes the draw."""
    segment = Segment("w", 0, 10)
    key = Key(seed, step)
    assert key.bits(segment) == Key(seed, step).bits(Segment("w", 5, 99))
    assert 0 <= key.below(segment, n) < n
    others = [Key(seed + 1, step), Key(seed, step + 1), Key(seed, step, 0), Key(seed, step, 1), Key(seed, step, None, "pull")]
    assert len({k.bits(segment) for k in [key, *others]}) == 6
    assert len({key.bits(segment), key.bits(Segment("v", 0, 10)), key.bits(Segment("w", 0, 10, (), 1)), key.bits(segment, "label")}) == 4


def test_keys_do_not_run_into_each_other() -> None:
    """Fields are told apart: neither 1|23 and 12|3, nor a name that looks like another field."""
    assert Key(1, 23).bits(Segment("w", 0, 1)) != Key(12, 3).bits(Segment("w", 0, 1))
    assert Key(0, 0).bits(Segment("a|b", 0, 1)) != Key(0, 0).bits(Segment("b", 0, 1), "a")


def test_generators_are_their_own() -> None:
    state = torch.get_rng_state()
    a, b = (torch.randn(4, generator=Key(0, step).generator(Segment("w", 0, 4))) for step in (0, 0))
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())


@checked
@given(bits=st.lists(st.booleans(), min_size=1, max_size=200))
def test_packing_is_numpys(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits))
    assert packed.numpy().tolist() == np.packbits(bits, bitorder="little").tolist()
    assert unpack_bits(packed, len(bits)).tolist() == bits


@checked
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_all_finite(numbers: list[float], dtype: torch.dtype) -> None:
    """Also when the sum of finite numbers overflows, or infinities cancel."""
    t = torch.tensor(numbers, dtype=dtype)
    assert all_finite(t) == bool(torch.isfinite(t).all())
