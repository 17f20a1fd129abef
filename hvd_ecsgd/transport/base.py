"""The Transport protocol: what an exchange may ask of a network. Implementations: `self_`, `simulated`, `horovod`, and `mpi_backend.transport`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

from ..errors import CompressionError

__all__ = ["Handle", "Ready", "Transport", "Workers", "check_transport", "direct", "workers_of"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """A started collective."""

    def done(self) -> bool:
        """True when `wait` would not block. May make progress, never blocks."""
        ...

    def wait(self) -> T_co:
        """Block until finished and return the result; safe to call again. Raises `TransportError` when the collective failed."""
        ...


class Ready(Generic[T]):
    """A handle that was finished from the start."""

    def __init__(self, value: T) -> None:
        self._value = value

    def done(self) -> bool:
        return True

    def wait(self) -> T:
        return self._value


@runtime_checkable
class Transport(Protocol):
    """Collectives over a private group of workers. It sums, never averages; every call carries a name.

    Calls return at once. On our own transports every rank must start the same collectives in the same order (names are checked where that is
    cheap, and appear in errors); on Horovod names are what matches them. A tensor handed over must not be written to until the handle is
    finished. Tensors are contiguous, on CPU or on the device the transport supports, and of any dtype. Results never depend on timing: sums
    are formed in the same order on every rank, so all ranks receive the same bits.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def divisor(self) -> int:
        """What the result of `allreduce_` is divided by for a mean: `size`, except where the network averages by itself."""
        ...

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        """Sum over ranks, in place; the result is `t`. fp16 and bf16 are summed in float32 and rounded once."""
        ...

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        """Everybody's tensor, by rank. First dimensions may differ; give `sizes` (first dimension by rank) when they are known, to save a round."""
        ...

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        """Rows `splits[r]` of `t` go to rank r; the result is what came, by rank. Give `received` (rows by rank) when known, to save a round."""
        ...

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        """Root's values, in place; the result is `t`."""
        ...


@runtime_checkable
class Workers(Transport, Protocol):
    """A transport among workers of several processes each: `rank` and `size` count workers, and every process of one calls it with the same bits.

    Processes of one worker have batches of their own, whose gradients they average before anything is compressed.
    """

    def average_inside_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        """The mean over the processes of this worker, in place, uncompressed; the result is `t`, the same bits on each of them."""
        ...


def check_transport(transport: object, who: str) -> None:
    """Raise `CompressionError` unless `transport` is one. A backend's module has functions of the same names."""
    if isinstance(transport, type) or not (isinstance(getattr(transport, "size", None), int) and hasattr(transport, "allreduce_")):
        raise CompressionError(
            f"{who}: transport must be mpi_backend.transport.MPITransport(), hvd_ecsgd.transport.torch_dist.TorchTransport(), another Transport, or "
            f"None for one process, got {transport!r:.100}."
        )


def workers_of(transport: Transport) -> Transport:
    """Between whom compressed gradients travel: the processes of `transport`, or where it has them the workers that those form."""
    found: Transport = getattr(transport, "workers", transport)
    return found


def widens(transport: Transport, t: torch.Tensor) -> bool:
    """Whether `allreduce_` would send `t` in a wider type, as its network adds in the type that it is given; alike on all ranks."""
    return bool(getattr(transport, "widens", lambda t: False)(t))


HALVES = (torch.float16, torch.bfloat16)


def sum_by_rank_(t: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """`t` ← the sum of the flat rows of its type, in their order; of 16-bit floats in float32, rounded once. The first row may be written to."""
    total = rows[0].float() if t.dtype in HALVES else rows[0]
    for row in rows[1:]:
        total += row
    return t.copy_(total.view(t.shape))


def direct(transport: Transport) -> Transport:
    """The same group, with an all-reduce that can be waited for at once: on unmodified Horovod not the one that carries `compress`'s result.

    For exchanges whose all-reduce is not the last thing they wait for. Sums are divided by this transport's `divisor`.
    """
    found: Transport = getattr(transport, "direct", transport)
    return found
