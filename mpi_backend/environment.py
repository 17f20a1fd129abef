"""Variables that users set: what is none of the values expected is an error, and not the default."""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["one_of", "seconds", "switch", "whole_number"]


def switch(variable: str, default: bool = True) -> bool:
    """0 or 1. Raises ValueError for anything else."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} is {value!r}; expected 0 (off) or 1 (on).")
    return value == "1" if value else default


def one_of(variable: str, default: str, expected: Sequence[str]) -> str:
    """One of the words `expected`. Raises ValueError for anything else."""
    value = os.environ.get(variable, "") or default
    if value not in expected:
        raise ValueError(f"{variable} is {value!r}; expected {' or '.join(expected)}.")
    return value


def seconds(variable: str, default: float, least: float = 0.0) -> float:
    """A number of seconds. Raises ValueError for anything else, and for fewer than `least`."""
    value = os.environ.get(variable, "")
    try:
        number = float(value) if value else default
    except ValueError:
        number = least - 1
    if not number >= least:
        raise ValueError(f"{variable} is {value!r}; expected a number of seconds{f', at least {least:g}' if least else ''}.")
    return number


def whole_number(variable: str, default: int, what: str) -> int:
    """Raises ValueError for anything else, which says `what` was expected."""
    value = os.environ.get(variable, "")
    if value and not value.isdecimal():
        raise ValueError(f"{variable} is {value!r}; expected {what}.")
    return int(value) if value else default
