"""What an argument must be: each check raises `CompressionError` of one form, "what must be expected, got value".

`what` names the argument ("top_k: k"), `expected` says in words what it may be. True and False are no numbers here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any

from .errors import CompressionError

__all__ = ["as_integer", "check_choice", "check_flag", "check_integer", "check_number", "check_ratio", "is_integer", "is_number"]


def is_integer(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """An `int` from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, within: Callable[[float], bool] = lambda number: True) -> bool:
    """A finite `int` or `float` that is `within`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and within(value)


def as_integer(value: Any) -> int | None:
    """The `int` that an integer of any library stands for; None for all else, True and False included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_integer(value: object, what: str, expected: str = "", *, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise unless `value` is an integer from `least` to `most`."""
    if not is_integer(value, least, most):
        raise _wrong(value, what, expected or f"an integer from {least} to {most}")


def check_number(value: object, what: str, expected: str, within: Callable[[float], bool]) -> None:
    """Raise unless `value` is a finite number that is `within`."""
    if not is_number(value, within):
        raise _wrong(value, what, expected)


def check_flag(value: object, what: str, expected: str = "True or False") -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise _wrong(value, what, expected)


def check_choice(value: object, what: str, choices: Collection[object]) -> None:
    """Raise unless `value` is one of the `choices`, and of their type."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise _wrong(value, what, " or ".join(map(repr, choices)))


def check_ratio(ratio: object, who: str) -> None:
    """Raise unless `ratio` (elements in ÷ elements sent) is a finite number ≥ 1."""
    if not is_number(ratio, lambda r: r >= 1):
        expected = "a finite number ≥ 1 (elements in ÷ elements sent)"
        raise CompressionError(f"{_wrong(ratio, f'{who}: ratio', expected)} To send 1 % of the elements write ratio=100.")


def _wrong(value: object, what: str, expected: str) -> CompressionError:
    return CompressionError(f"{what} must be {expected}, got {value!r:.100}.")
