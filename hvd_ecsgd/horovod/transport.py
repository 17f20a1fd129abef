"""Unmodified Horovod as a transport, and the part of it that travels in Horovod's own all-reduce.

Horovod is imported inside functions only: importing this module needs torch alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from ..errors import CompressionError, TransportError
from ..transport import Handle, Ready
from .waiting import sleep_until_done

__all__ = ["HorovodTransport", "SlotHandle", "SlotTransport", "horovod_is_running"]

T = TypeVar("T")


def horovod_is_running() -> bool:
    """True when this process has initialised `horovod.torch`."""
    hvd: Any = sys.modules.get("horovod.torch")
    return hvd is not None and bool(hvd.is_initialized())


def _refuse_bfloat16(t: torch.Tensor, name: str) -> None:
    if t.dtype == torch.bfloat16:
        raise CompressionError(
            f"'{name}': Horovod cannot all-reduce bfloat16. Use Compression.bf16(), or exchange=TwoPass(server_feedback=False) or AllGather() with "
            "this compressor, which send its bytes."
        )


def _wired(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What Horovod's all-gather and all-to-all can carry of `t`: bfloat16, which they do not know, as bytes; and how many rows one row becomes."""
    if t.dtype != torch.bfloat16:
        return t, 1
    return t.reshape(-1).view(torch.uint8), t.element_size() * math.prod(t.shape[1:])


def _parts(wire: Any, rows: Sequence[int], like: torch.Tensor) -> list[torch.Tensor]:
    """`wire` cut in parts of so many rows, as the type that went in."""
    parts = list(wire.split(list(rows)))
    return parts if like.dtype == wire.dtype else [p.view(like.dtype).view(-1, *like.shape[1:]) for p in parts]


class _HorovodHandle(Generic[T]):
    def __init__(self, hvd: Any, started: Any, finish: Callable[[Any], T]) -> None:
        self._hvd, self._started, self._finish = hvd, started, finish
        self._result: list[T] = []

    def done(self) -> bool:
        return bool(self._result) or bool(self._hvd.poll(self._started))

    def wait(self) -> T:
        if not self._result:  # Horovod forgets a handle once it was synchronised
            sleep_until_done(self._hvd, self._started)
            self._result.append(self._finish(self._hvd.synchronize(self._started)))
        return self._result[0]


class HorovodTransport:
    """Collectives of `horovod.torch`, matched by name (which `rename` gives a prefix), so ranks may start them in different orders.

    `process_set`: a `horovod.torch.ProcessSet`; all processes by default.
    """

    def __init__(self, process_set: Any = None) -> None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise TransportError(
                "Horovod's torch API cannot be imported, and this compression object was called through Horovod's compress(). "
                "Install it (launch/install_horovod.sh), or use `import mpi_backend as hvd`, which needs no Horovod."
            ) from error
        if not hvd.is_initialized():
            raise TransportError("Horovod is not initialised; call hvd.init() before training.")
        self._hvd = hvd
        self._prefix = "hvd_ecsgd"
        self._set = hvd.global_process_set if process_set is None else process_set
        self._options = {"process_set": self._set}
        self.rank: int = self._set.rank()
        self.size: int = self._set.size()

    def rename(self, prefix: str) -> None:
        """What names begin with from now on: something of one's own, that is equal on all ranks."""
        self._prefix = prefix

    @property
    def divisor(self) -> int:
        return self.size

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        _refuse_bfloat16(t, name)
        handle = self._hvd.allreduce_async_(t, name=f"{self._prefix}.{name}", op=self._hvd.Sum, **self._options)
        return _HorovodHandle(self._hvd, handle, lambda result: t)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        wire, width = _wired(t)
        data = self._hvd.allgather_async(wire, name=f"{self._prefix}.{name}", **self._options)
        if sizes is not None:
            known = [width * n for n in sizes]
            return _HorovodHandle(self._hvd, data, lambda result: _parts(result, known, t))
        mine = torch.tensor([wire.shape[0]], dtype=torch.int64, device="cpu")
        rows = self._hvd.allgather_async(mine, name=f"{self._prefix}.{name}.rows", **self._options)
        return _HorovodHandle(self._hvd, data, lambda result: _parts(result, self._hvd.synchronize(rows).tolist(), t))

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        if len(splits) != self.size or sum(splits) != t.shape[0]:
            raise TransportError(f"all-to-all '{name}': splits {list(splits)} must be {self.size} numbers that add up to {t.shape[0]} rows.")
        wire, width = _wired(t)
        rows = torch.tensor([width * n for n in splits], dtype=torch.int32, device="cpu")
        handle = self._hvd.alltoall_async(wire, splits=rows, name=f"{self._prefix}.{name}", **self._options)
        return _HorovodHandle(self._hvd, handle, lambda result: _parts(result[0], result[1].tolist(), t))

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        ranks = getattr(self._set, "ranks", None)  # Horovod wants the global rank, also in a process set
        handle = self._hvd.broadcast_async_(t, ranks[root] if ranks else root, name=f"{self._prefix}.{name}", **self._options)
        return _HorovodHandle(self._hvd, handle, lambda result: t)


class SlotHandle(Ready[torch.Tensor]):
    """A payload that waits for Horovod's own all-reduce; `wait` gives what `decompress` was handed."""

    waits_elsewhere = True
    """Horovod itself waits, so how long that took is not known here."""

    def __init__(self, payload: torch.Tensor) -> None:
        super().__init__(payload)
        self.payload = payload
        self.arrived = False

    def arrive(self, reduced: torch.Tensor) -> None:
        self._value = reduced
        self.arrived = True

    def done(self) -> bool:
        return self.arrived

    def wait(self) -> torch.Tensor:
        if not self.arrived:
            raise TransportError("internal: a payload in Horovod's all-reduce was asked for before decompress() got it.")
        return super().wait()


class SlotTransport(HorovodTransport):
    """As `HorovodTransport`, but an all-reduce is left to Horovod: its payload is what `compress` returns.

    Horovod applies the operation the user chose (Average, Sum), so nothing is divided here. `direct` is the same group without that:
    for what Horovod's own all-reduce cannot carry.
    """

    def __init__(self, process_set: Any = None) -> None:
        super().__init__(process_set)
        self.direct = HorovodTransport(process_set)

    def rename(self, prefix: str) -> None:
        super().rename(prefix)
        self.direct.rename(prefix)

    @property
    def divisor(self) -> int:
        return 1

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        _refuse_bfloat16(t, name)
        return SlotHandle(t)
