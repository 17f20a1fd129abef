"""Agreement before communication: every collective a user starts is compared between all ranks before its data travels."""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import DisagreementError
from hvd_ecsgd.transport.base import Handle

from .transport import MPITransport

__all__ = ["Negotiator", "Pending"]

T = TypeVar("T")
R = TypeVar("R")

_HEADER = struct.Struct("<QQ")  # hash of the whole request, rows
_RECORD = 256  # bytes: the header and as much of the request's text as fits


class Pending(Generic[T]):
    """The handle of a collective that was requested: first its record travels, then, if all ranks requested the same, its data."""

    def __init__(
        self,
        negotiator: Negotiator,
        number: int,
        record: Handle[list[torch.Tensor]],
        start: Callable[[list[int]], Handle[R]],
        finish: Callable[[R], T],
    ) -> None:
        self.number = number
        self._negotiator = negotiator
        self._record = record
        self._start = start
        self._finish: Callable[[Any], T] | None = finish
        self._handle: Handle[Any] | None = None
        self._result: T | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        """True when `wait` would not block. Makes progress, never blocks."""
        self._negotiator.advance()
        return self._error is not None or (self._handle is not None and self._handle.done())

    def wait(self) -> T:
        """Block until finished and return the result; safe to call again. Raises `DisagreementError` on every rank when requests differ."""
        if self._finish is not None and self._error is None:
            self._negotiator.advance(through=self.number)
        if self._finish is not None and self._error is None:
            assert self._handle is not None
            try:
                self._result = self._finish(self._handle.wait())
            except Exception as error:
                self._error = error
            self._finish = None
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by `finish`, whose type is T

    def ready(self) -> bool:
        """Whether every rank's record is here."""
        return self._record.done()

    def begin(self) -> None:
        """Compare the records and start the data's collective, or keep the error for `wait`."""
        try:
            self._handle = self._start(_compare(self._record.wait()))
        except Exception as error:
            self._error = error


class Negotiator:
    """Collectives requested in the same order on every rank, compared before they run; collective to create, like the transports it owns.

    Records travel on a transport of their own, at once; the data's collectives start in the order of the requests, each once its record and
    all before it have come and agree. That order is equal on all ranks, whatever the timing, and so is the decision not to start one. Waiting
    starts everything up to what is waited for, so nobody waits for ever, for the reason given at `MPITransport`. No one else may use
    `transport`: when data starts depends on timing, and would mix with others' calls differently on each rank.
    """

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        self._records = MPITransport(comm)
        self.transport = MPITransport(comm)
        self._submitted = 0
        self._waiting: deque[Pending[Any]] = deque()

    def automatic_name(self, kind: str) -> str:
        """A name for the next collective, which the user gave none; equal on all ranks as long as they request the same number of them."""
        return f"{kind}.noname.{self._submitted}"

    def submit(self, request: str, rows: int, start: Callable[[list[int]], Handle[R]], finish: Callable[[R], T]) -> Pending[T]:
        """Request a collective. `request` must be equal on every rank, `rows` (first dimension, or anything) need not.

        Once all agree, `start` is called with everybody's `rows`; `finish` makes the result of `wait` from that of the handle `start` returned.
        """
        text = request.encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        if len(text) > _RECORD - _HEADER.size:
            mark = f"… (its hash: {digest:016x})".encode()  # differences may lie beyond what fits
            text = text[: _RECORD - _HEADER.size - len(mark)] + mark
        record = bytearray(_HEADER.pack(digest, rows) + text).ljust(_RECORD, b"\0")
        handle = self._records.allgather(torch.frombuffer(record, dtype=torch.uint8), "record", [_RECORD] * self._records.size)
        pending = Pending(self, self._submitted, handle, start, finish)
        self._submitted += 1
        self._waiting.append(pending)
        self.advance()
        return pending

    def advance(self, through: int = -1) -> None:
        """Start the data of all requests whose turn has come, and, blocking, of those numbered up to `through`."""
        while self._waiting and (self._waiting[0].number <= through or self._waiting[0].ready()):
            self._waiting.popleft().begin()
        self.transport.progress()

    def close(self) -> None:
        """Complete what was requested and free the communicators; collective."""
        self.advance(through=self._submitted)
        self._records.close()
        self.transport.close()


def _compare(records: Sequence[torch.Tensor]) -> list[int]:
    """Everybody's rows, if all requests are equal."""
    ranks_of: dict[tuple[int, str], list[str]] = {}
    rows = []
    for rank, record in enumerate(records):
        raw = record.numpy().tobytes()
        digest, row = _HEADER.unpack_from(raw)
        ranks_of.setdefault((digest, raw[_HEADER.size :].rstrip(b"\0").decode(errors="replace")), []).append(str(rank))
        rows.append(row)
    if len(ranks_of) > 1:
        requests = "; ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {text}" for (_, text), ranks in ranks_of.items())
        raise DisagreementError(
            f"Ranks requested different collectives at the same point. {requests}. "
            "Every rank must call the same collectives in the same order, with equal names, dtypes, shapes and options."
        )
    return rows
