"""The checks of `hvd_ecsgd.arguments`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import CompressionError
from hvd_ecsgd.arguments import as_integer, check_choice, check_flag, check_integer, check_number, check_ratio

NAN, INF = float("nan"), float("inf")

# the check → what it takes, what it refuses, and what it says that it expected
CHECKS: dict[str, tuple[Callable[[Any], None], list[Any], list[Any], str]] = {
    "integer": (lambda v: check_integer(v, "it", "whole"), [0, -1, 2**70], [True, 1.0, "1", None, np.int64(1), NAN], "whole"),
    "in a range": (lambda v: check_integer(v, "it", least=1, most=3), [1, 3], [0, 4, False, True], "an integer from 1 to 3"),
    "number": (
        lambda v: check_number(v, "it", "positive", lambda n: n > 0),
        [1, 0.5],
        [0, -1.0, NAN, INF, True, "1", None, torch.ones(1)],
        "positive",
    ),
    "flag": (lambda v: check_flag(v, "it"), [True, False], [0, 1, None, "no", np.True_], "True or False"),
    "choice": (lambda v: check_choice(v, "it", (8, 16)), [8, 16], [9, 8.0, "8", None, [8], np.arange(2)], "8 or 16"),
    "ratio": (lambda v: check_ratio(v, "x"), [1, 64.5], [0.99, 0, -4, NAN, INF, True, "64", None], "≥ 1"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_taken_and_what_is_refused(name: str) -> None:
    check, right, wrong, expected = CHECKS[name]
    for value in right:
        check(value)
    for value in wrong:
        with pytest.raises(CompressionError, match=rf"must be .*{expected}.*, got {re.escape(repr(value))[:100]}"):
            check(value)


def test_integers_of_other_libraries() -> None:
    assert [as_integer(v) for v in (3, np.int32(3), torch.tensor(3))] == [3, 3, 3]
    assert [as_integer(v) for v in (True, 3.0, np.float32(3), torch.tensor(3.0), "3", None)] == [None] * 6
