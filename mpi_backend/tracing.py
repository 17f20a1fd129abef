"""Keeping torch.compile out of what communicates: a trace would record one run, and compile each of its parts, threads and locks included."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

__all__ = ["untraced"]

P = ParamSpec("P")
T = TypeVar("T")


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, before which a compiled graph ends, and after which the next begins.

    `torch.compiler.disable` does that, but importing what it needs takes a second, which only scripts that compile should pay.
    """
    disabled: Callable[P, T] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo.eval_frame" not in sys.modules:
                return function(*args, **kwargs)
            disabled = cast("Callable[P, T]", torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    cast(Any, call)._torchdynamo_disable = True  # a graph that calls it ends here
    return call
