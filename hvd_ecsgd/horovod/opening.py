"""How all that ranks do together begins on an unmodified Horovod: with a small all-reduce that says by rank what each does.

It is no all-gather, as ranks that have joined (`hvd.join`) take part in all-reduces only, with zeros.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from typing import Any

import torch

from ..core.talk import code_of, doing_of
from ..errors import TransportError
from ..transport import Handle, Transport

__all__ = ["SILENCE", "Opening", "await_others"]

SILENCE = 20.0
"""Seconds of waiting for the other ranks after which the waiting is explained."""


class Opening:
    """Starts when it is made, and costs four bytes for each rank. `doing`: a training step, or the function that was called."""

    def __init__(self, transport: Transport, doing: str) -> None:
        codes = torch.zeros(transport.size, dtype=torch.int32, device="cpu")
        codes[transport.rank] = code_of(doing)
        self.said = transport.allreduce_(codes, "opening")

    def doing(self) -> list[str]:
        """What every rank does, by rank; "" of those that have joined. Waits for them."""
        return [doing_of(code) for code in self.said.wait().tolist()]


def await_others(handle: Handle[Any], what: str, rank: int) -> None:
    """Wait for the ranks that have not called the function `what` yet; say so after `SILENCE`.

    Raises `TransportError` after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, if that is set; and what Horovod raises when another rank ends, with `what`.
    """
    began, explained, limit = time.monotonic(), False, _limit()
    while not handle.done():
        time.sleep(0.001)
        waited = time.monotonic() - began
        if limit and waited > limit:
            raise TransportError(
                f"{what} was called on rank {rank}, and for {limit:g} s (HOROVOD_STALL_SHUTDOWN_TIME_SECONDS) not on every other rank; call it on "
                "every rank."
            )
        if waited > SILENCE and not explained:
            explained = True
            warnings.warn(
                f"rank {rank} has waited {SILENCE:g} s for other ranks to call {what}, too. If they are not merely late: call it on every rank.",
                UserWarning,
                stacklevel=2,
            )
    try:
        handle.wait()
    except RuntimeError as error:
        raise type(error)(f"{what} (call it on every rank): {error}") from error


def _limit() -> float:
    """In seconds; 0 for none, also where Horovod cannot read it."""
    with contextlib.suppress(ValueError):
        return float(os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", ""))
    return 0.0
