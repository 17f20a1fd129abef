"""A function in a process that is forked from the tests' own, and so has imported all that it needs: a fresh one would import torch for seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["forked"]


@contextlib.contextmanager
def forked(function: Callable[..., object], *arguments: Any) -> Iterator[Connection]:
    """This end of a connection to a process that runs `function(the other end, *arguments)`, which is killed on the way out. To receive from one
    that has ended raises EOFError. It has none of the threads here, and must not need more than one of torch's."""
    mine, its = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=function, args=(its, *arguments))
    process.start()
    its.close()
    try:
        yield mine
    finally:
        process.kill()
        process.join()
        mine.close()
