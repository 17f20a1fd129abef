"""What ranks say to each other in words: texts over an all-gather, and errors on all ranks or on none."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import CheckpointError, CompressionError, DisagreementError
from ..transport.base import Transport

__all__ = [
    "STEP",
    "code_of",
    "doing_of",
    "everyone",
    "heard",
    "listed",
    "packed_text",
    "raise_if_apart",
    "raise_if_joined",
    "raise_on_other_texts",
    "spoken",
    "text_of",
    "together",
    "unpacked",
]


STEP = "a training step"
_DOING = ("", STEP, "save_checkpoint", "load_checkpoint", "switch", "at('virtual')", "discard", "Compression.auto")
"""What ranks do together, by code; first what a rank does that has joined, which is whatever the others do."""


def code_of(doing: str) -> int:
    """One byte for what a rank does."""
    return _DOING.index(doing)


def doing_of(code: int) -> str:
    """The inverse of `code_of`."""
    return _DOING[code]


def raise_if_apart(doing: Sequence[str]) -> None:
    """`doing`: by rank, what it does. Raises `DisagreementError` where a function that all call together was called on some ranks only; all ranks
    see the same."""
    ranks_of: dict[str, list[int]] = {}
    for rank, what in enumerate(doing):
        if what:
            ranks_of.setdefault(what, []).append(rank)
    if len(ranks_of) < 2:
        return
    called = [f"{what} was called on {listed(ranks)} only; call it on every rank." for what, ranks in ranks_of.items() if what != STEP]
    steps = [f"Meanwhile {STEP} began on {listed(ranks)}." for what, ranks in ranks_of.items() if what == STEP]
    raise DisagreementError(" ".join([*called, *steps]))


def raise_if_joined(what: str, doing: Sequence[str]) -> None:
    """`doing`: as in `raise_if_apart`. Raises `CompressionError` where some ranks have joined, which will not come to the function `what`."""
    joined = [r for r, doing_there in enumerate(doing) if not doing_there]
    if joined:
        raise CompressionError(
            f"{what} needs all workers, and {', '.join(map(str, joined))} (by rank) joined: they have no more batches. Do it after join()."
        )


def spoken(said: Any) -> torch.Tensor:
    """`said`, of which JSON has a word for everything, as uint8."""
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def heard(spoken: torch.Tensor) -> Any:
    """The inverse of `spoken`."""
    return json.loads(spoken.numpy().tobytes())


def everyone(transport: Transport, said: Any, name: str) -> list[Any]:
    """What every rank said (see `spoken`), by rank. Collective."""
    return [heard(part) for part in transport.allgather(spoken(said), name).wait()]


@contextlib.contextmanager
def together(transport: Transport, name: str) -> Iterator[None]:
    """What goes wrong inside on any rank is a `CheckpointError` on all of them, which says on which. Collective."""
    problem, cause = "", None
    try:
        yield
    except Exception as error:
        problem, cause = text_of(error), error
    problems = everyone(transport, problem, name)
    if any(problems):
        different = dict.fromkeys(p for p in problems if p)
        lines = [f"{text} ({listed([r for r, p in enumerate(problems) if p == text])})" for text in different]
        raise CheckpointError("\n".join(lines)) from cause


def text_of(error: Exception) -> str:
    """In words that another rank can be told."""
    if isinstance(error, CompressionError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'checkpoint'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"


def listed(ranks: Sequence[int]) -> str:
    """As "rank 1", or "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def packed_text(said: Mapping[str, Any]) -> torch.Tensor:
    """`said` as uint8, for an all-gather that ends in `raise_on_other_texts`."""
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(list(said.items())).encode(), 1)), dtype=torch.uint8)


def unpacked(text: torch.Tensor) -> dict[str, Any]:
    """The inverse of `packed_text`."""
    return dict(json.loads(zlib.decompress(text.numpy().tobytes())))


def raise_on_other_texts(packed: Sequence[torch.Tensor]) -> None:
    """`packed`: by rank, what `packed_text` returned there; empty of a rank that has no say. `DisagreementError` with the first difference."""
    parts = {r: p for r, p in enumerate(packed) if p.numel()}
    lowest, first_part = next(iter(parts.items()))
    if all(torch.equal(p, first_part) for p in parts.values()):
        return
    texts = {r: unpacked(p) for r, p in parts.items()}
    first = texts[lowest]
    for r, other in texts.items():
        for what in [*first, *(k for k in other if k not in first)]:
            if first.get(what) != other.get(what):
                raise DisagreementError(
                    f"ranks do not agree on {what}: rank {lowest} has {first.get(what, 'none')}, rank {r} has {other.get(what, 'none')}. "
                    "Every rank must bind the same model with the same settings (and load the same step)."
                )
    raise DisagreementError("ranks list their parameters in different orders; pass model.named_parameters() on every rank.")
