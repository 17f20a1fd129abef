"""The rows of the table of methods that stand for all of them where tests are slow."""

from __future__ import annotations

import pytest

from hvd_ecsgd import Compression
from tests.cases import CASES, COVERING, KINDS, PAIRS, Case, bound_method, covering, ids, traits

EVERYTHING = set().union(*map(traits, CASES))


def test_the_covering_rows_have_every_trait_of_every_method() -> None:
    assert set().union(*map(traits, COVERING)) == EVERYTHING
    assert [c for c in CASES if c in COVERING] == list(COVERING)
    assert len(COVERING) < 0.7 * len(CASES)


@pytest.mark.parametrize("case", COVERING, ids=ids)
def test_none_of_them_can_be_left_out(case: Case) -> None:
    assert set().union(*(traits(c) for c in COVERING if c is not case)) < EVERYTHING


def test_a_new_kind_of_method_joins_them() -> None:
    """Control: and another number in a kind that is there does not."""
    new, more = Case("new", lambda: Compression.top_k(10)), Case("top_k-another", lambda: Compression.top_k(11))
    assert covering([*CASES, new]) == (*COVERING, new)
    assert covering([*CASES, more]) == COVERING


def test_pairs_have_every_exchange_with_every_rule_that_goes_with_it() -> None:
    """What the slowest tests take is among them."""

    def pair(case: Case) -> tuple[object, ...]:
        method = bound_method(case)
        return type(method.exchange), case.exact, method.feedback.takes

    assert {pair(case) for case in PAIRS} == {pair(case) for case in CASES} and len(PAIRS) == len({pair(case) for case in PAIRS})
    assert set(KINDS) <= set(PAIRS) <= set(COVERING)
