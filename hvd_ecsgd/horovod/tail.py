"""The last elements of every payload, by which all ranks see that some have other settings, or cannot take the step.

They are four bits of a hash of settings and step, as zeros and ones, and a one. After the reduction a bit that is neither 0 nor that of the one
differed somewhere; the one tells what Horovod multiplied by (1 for Average, n for Sum). Sums of zeros and ones are exact, also in half precision.
"""

from __future__ import annotations

import math

import torch

from ..errors import DisagreementError

__all__ = ["with_tail", "without_tail"]

_BITS = 4
_LENGTH = _BITS + 1


def with_tail(payload: torch.Tensor, settings: int, refuses: bool) -> torch.Tensor:
    """A copy of the 1-D `payload`, of a floating-point type, and the tail. `settings`: the hash. Who `refuses` the step is heard by every rank."""
    tail = [float("nan") if refuses else float(settings >> i & 1) for i in range(_BITS)] + [1.0]
    return torch.cat([payload, torch.tensor(tail, dtype=payload.dtype, device=payload.device)])


def without_tail(reduced: torch.Tensor, name: str, size: int) -> tuple[torch.Tensor, float, bool]:
    """The payload's sum over `size` ranks as Horovod scaled it, that factor × n, and whether some rank refuses the step.

    Raises `DisagreementError`, on every rank, when a bit differed anywhere.
    """
    *bits, factor = reduced[-_LENGTH:].tolist()
    refused = all(math.isnan(bit) for bit in bits)
    # n ranks, one of which differs: a bit's share is 1/n or 1 - 1/n.
    if not refused and (not factor or not all(min(abs(bit / factor), abs(bit / factor - 1)) <= 0.4 / size for bit in bits)):
        raise DisagreementError(
            f"parameter '{name}': ranks compressed with different settings or at different steps, or froze it on some ranks only (seen by every "
            "rank). Use the same Compression arguments everywhere, load the same step's state, and freeze the same parameters on every rank."
        )
    return reduced[:-_LENGTH], float(factor), refused
