"""Nested state goes through JSON and plain tensors and comes back as it was, whatever its keys are."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvd_ecsgd.core.trees import decode, encode
from hvd_ecsgd.errors import CheckpointError

TEXT = st.text(st.characters(), max_size=4) | st.sampled_from(["", "/", "a", "a/0", "~", "~0", "0", "1", "$tensor", "\ud800", "\ud83d\ude00"])
NUMBERS = st.booleans() | st.integers() | st.sampled_from([2**4000, -(2**1001)]) | st.floats() | st.complex_numbers()
SCALARS = hnp.scalar_dtypes().flatmap(hnp.from_dtype) | st.sampled_from([np.str_("a\0"), np.bytes_(b"a\0"), np.float64(math.nan)])
ARRAYS = hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
KINDS = [torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32, torch.int64, torch.bool]
TENSORS = st.builds(lambda kind, shape, n: (torch.arange(n, n + math.prod(shape)) % 5).view(shape).to(kind), st.sampled_from(KINDS),
                    hnp.array_shapes(min_dims=0, min_side=0, max_side=3), st.integers(0, 9))  # fmt: skip
KEYS = TEXT | st.integers(-2, 20) | st.none() | st.floats(allow_nan=False) | st.tuples(TEXT, st.integers(0, 2))
LEAVES = st.none() | NUMBERS | TEXT | st.binary() | st.binary().map(bytearray) | SCALARS | ARRAYS | TENSORS | TENSORS.map(torch.Tensor.conj)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=15,
)


def there_and_back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(encode(value, "", tensors), allow_nan=False))
    for name, t in tensors.items():
        assert name.encode() and not t.is_complex()
    return decode(tree, {name: t.clone() for name, t in tensors.items()}.__getitem__)


def same(a: Any, b: Any) -> bool:
    """Also in type, and in the bits of numbers; the order of keys counts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a, math.copysign(1, a)) == (b, math.copysign(1, b))
    return bool(a == b)


@given(TREES.map(lambda tree: {"the": tree}))
@settings(max_examples=300, deadline=None)
def test_state_comes_back_as_it_was(tree: Any) -> None:
    assert same(there_and_back(tree), tree)


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, TENSORS, min_size=1, max_size=3), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_no_two_places_meet(tree: Any) -> None:
    """Every tensor has a place of its own, though keys hold slashes, look like numbers, or like what others are written as."""
    tensors: dict[str, torch.Tensor] = {}
    encode(tree, "", tensors)
    assert len(tensors) == sum(map(len, tree.values()))


NESTED: list[Any] = []
NESTED.append(NESTED)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {math.nan: torch.ones(1), float("nan"): torch.ones(1)}}, r"'a/~nan': there are two values here that cannot be told apart"),
        ({"a": [{1, 2}]}, r"'a/0' is a builtins\.set, which cannot be saved"),
        ({"a": np.array([None])}, r"'a' is a numpy\.ndarray of object, which"),
        ({"a": np.ma.masked_array([1])}, r"'a' is a numpy\.ma"),
        ({"a": {frozenset(): 1}}, r"'a' has a key of type builtins\.frozenset"),
        ({"a": {torch.ones(1): 1}}, r"'a' has a key of type torch\.Tensor"),
        ({"a": {"b": torch.ones(1).to_sparse()}}, r"'a/b': a torch\.float32 tensor of layout torch\.sparse_coo on cpu cannot"),
        ({"a": {"b": torch.ones(1, device="meta")}}, r"'a/b': .* on meta cannot be saved"),
        ({"a": NESTED}, r"'a/0' is a list that holds itself"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encode(value, "", {})


def test_numbers_that_python_does_not_write_in_decimal() -> None:
    assert there_and_back([10**5000, -(10**5000)]) == [10**5000, -(10**5000)]


def test_a_kind_of_a_later_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\$ulid in what was saved"):
        decode({"a": [{"$ulid": 1}]}, {}.__getitem__)
