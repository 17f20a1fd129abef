"""A process group of torch.distributed as a transport. Imported only where it is used, since torch may be built without it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from ..errors import TransportError
from .base import HALVES, Handle, Ready, sum_by_rank_

__all__ = ["TorchTransport", "takes_gpus"]

T = TypeVar("T")

_AT_ONCE = 32 * 2**10
"""Bytes of a message that goes from everybody to everybody at once: gloo's rings take n − 1 rounds to gather, and twice as many to add. Among four
hosts such a message takes .4 to .5 of a ring's time at 1 Gbit/s; at 100 Mbit/s longer ones take more of it than rounds do."""


class _TorchHandle(Generic[T]):
    """`under_way`: of the transport, how many operations have begun, and how many of these were waited for. `sleeps`: `wait` takes no core."""

    def __init__(self, name: str, work: Any, finish: Callable[[], T], under_way: list[int], sleeps: bool) -> None:
        self._name, self._work, self._finish, self._under_way, self.sleeps = name, work, finish, under_way, sleeps
        under_way[0] += 1
        self._result: list[T] = []

    def done(self) -> bool:
        return bool(self._result) or bool(self._work.is_completed())

    def wait(self) -> T:
        if not self._result:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise TransportError(f"'{self._name}': torch.distributed failed, perhaps because another rank has ended: {error}") from error
            finally:
                self._under_way[1] += 1
            self._result.append(self._finish())
        return self._result[0]


class TorchTransport:
    """Collectives of groups of its own among the processes of `group` (torch.distributed's default group by default). Making one is collective among
    these.

    Tensors on the CPU travel over gloo, and those on a GPU over NCCL, where `group` has that for them (`takes_gpus`): on the device, in the order of
    the caller's stream. What is small and read by the host (sizes, what ranks tell each other) is on the CPU in either case. Groups cost connections
    and threads, so those of users that are gone are lent again (`lent`).
    On the CPU what is small goes from everybody to everybody at once, and is added here, in the order of ranks. Of the rest, what a collective cannot
    carry as it is (rows of different number, 16-bit sums) travels padded, or in float32, and the network says in which order it is added. (Exchanges
    add what has 16 bits in two collectives of their own, which carry it as it is: `exchange.base.added_`.)
    Raises `TransportError` when torch.distributed is not initialised, and for tensors of a GPU without NCCL, which gloo would copy without telling.
    """

    def __init__(self, group: Any = None) -> None:
        ranks = _ranks(group)
        # With local synchronization, else other sets of ranks would have to make them too.
        self._group: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._nccl: Any = dist.new_group(ranks, backend="nccl", use_local_synchronization=True) if takes_gpus(group) else None
        self._ranks: list[int] = dist.get_process_group_ranks(self._group)  # of the job, by those in here
        self.rank: int = dist.get_rank(self._group)
        self.size: int = len(ranks)
        self._user: Callable[[], object] = lambda: self
        self._under_way = [0, 0]  # two numbers, as one thread may begin what another waits for
        _open.add(self)
        _close_in_time()

    @classmethod
    def lent(cls, group: Any = None) -> TorchTransport:
        """One for `lend_to`, of a user that is gone on all ranks if there is such a one, or a new one. Collective.

        When a user is collected is a matter of memory management, so ranks ask each other which ones are gone.
        """
        members = _ranks(group)
        made = _made.setdefault(dist.group.WORLD, {}).setdefault(tuple(members), [])
        if made:
            gone = torch.tensor([t._user() is None for t in made], dtype=torch.uint8, device="cpu")
            for transport, everywhere in zip(made, torch.stack(made[0].allgather(gone, "lent", [len(made)] * len(members)).wait()).all(0).tolist()):
                if everywhere:
                    return transport
        made.append(cls(group))
        return made[-1]

    def lend_to(self, user: object) -> None:
        """`user` has this one while it lives."""
        self._user = weakref.ref(user)

    @property
    def divisor(self) -> int:
        return self.size

    def close(self) -> None:
        """Give the groups' connections and threads back. Nothing may be on its way. Collective. What is called afterwards raises `TransportError`."""
        _open.discard(self)
        groups, self._group, self._nccl = (self._group, self._nccl), None, None
        for group in groups:
            if group is not None:
                _destroy(group)

    def _group_for(self, t: torch.Tensor, name: str) -> Any:
        if self._group is None:
            raise TransportError(f"'{name}': this transport is closed; make a new one.")
        if t.device.type == "cpu":
            return self._group
        if self._nccl is None or t.device.type != "cuda":
            raise TransportError(
                f"'{name}': expected a tensor on the CPU, got one on {t.device}; exchanges over torch.distributed use gloo, and NCCL for GPUs where "
                "the process group has it: init_process_group('cpu:gloo,cuda:nccl')."
            )
        return self._nccl

    def allreduce_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        group = self._group_for(t, name)
        if t.numel() == 0:
            return Ready(t)
        if self._goes_at_once(t, t.nbytes):
            work, parts = self._to_everybody(_bytes(t), [t.nbytes] * self.size)
            return self._handle(name, group, work, lambda: sum_by_rank_(t, [part.view(t.dtype) for part in parts]))
        if not self.widens(t):
            return self._handle(name, group, dist.all_reduce(t, group=group, async_op=True), lambda: t)
        wide = t.float()
        return self._handle(name, group, dist.all_reduce(wide, group=group, async_op=True), lambda: t.copy_(wide))

    def widens(self, t: torch.Tensor) -> bool:
        """See `transport.base.widens`."""
        return t.dtype in HALVES and not self._goes_at_once(t, t.nbytes)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        group = self._group_for(t, name)
        rows = self._everybodys(t.shape[0]) if sizes is None else list(sizes)
        if len(rows) != self.size or rows[self.rank] != t.shape[0]:
            raise TransportError(f"all-gather '{name}': sizes {rows} must be {self.size} numbers, of which this rank's is {t.shape[0]}.")
        width = math.prod(t.shape[1:]) * t.element_size()  # as bytes: every type travels alike
        longest = max(rows) * width
        if longest == 0:
            return Ready([t.new_empty((n, *t.shape[1:])) for n in rows])
        if self._goes_at_once(t, longest):
            work, came = self._to_everybody(_bytes(t), [n * width for n in rows])
            return self._handle(name, group, work, lambda: [_rows(part, t) for part in came])
        sent = torch.empty(longest, dtype=torch.uint8, device=t.device) if len(set(rows)) > 1 else _bytes(t)
        if len(set(rows)) > 1:
            sent[: t.nbytes].copy_(_bytes(t))
        parts = [torch.empty_like(sent) for _ in rows]
        work = dist.all_gather(parts, sent, group=group, async_op=True)
        return self._handle(name, group, work, lambda: [_rows(part[: n * width], t) for part, n in zip(parts, rows, strict=True)])

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        group = self._group_for(t, name)
        if len(splits) != self.size or sum(splits) != t.shape[0]:
            raise TransportError(f"all-to-all '{name}': splits {list(splits)} must be {self.size} numbers that add up to {t.shape[0]} rows.")
        width = math.prod(t.shape[1:]) * t.element_size()
        rows = self._swapped(splits) if received is None else list(received)
        came = torch.empty(sum(rows) * width, dtype=torch.uint8, device=t.device)
        sizes = [width * n for n in rows]
        work = dist.all_to_all_single(came, _bytes(t), sizes, [width * n for n in splits], group=group, async_op=True)
        return self._handle(name, group, work, lambda: [_rows(part, t) for part in torch.split(came, sizes)])

    def broadcast_(self, t: torch.Tensor, root: int, name: str) -> Handle[torch.Tensor]:
        group = self._group_for(t, name)
        return self._handle(name, group, dist.broadcast(t, self._ranks[root], group=group, async_op=True), lambda: t)

    def _handle(self, name: str, group: Any, work: Any, finish: Callable[[], T]) -> Handle[T]:
        return _TorchHandle(name, work, finish, self._under_way, sleeps=group is self._group)

    def _goes_at_once(self, t: torch.Tensor, longest: int) -> bool:
        """Whether everybody sends all that they have to everybody, alike on all ranks. `longest`: bytes of the rank that has most."""
        return t.device.type == "cpu" and longest <= _AT_ONCE

    def _to_everybody(self, mine: torch.Tensor, sizes: Sequence[int]) -> tuple[Any, Sequence[torch.Tensor]]:
        """The same bytes to each rank, `sizes[r]` from rank r: the work, and what comes by it."""
        came = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        work = dist.all_to_all_single(came, mine.repeat(self.size), list(sizes), [mine.numel()] * self.size, group=self._group, async_op=True)
        return work, torch.split(came, list(sizes))

    def _everybodys(self, number: int) -> list[int]:
        return self._swapped([number] * self.size)

    def _swapped(self, numbers: Sequence[int]) -> list[int]:
        """One to each rank, one from each."""
        came = torch.empty(self.size, dtype=torch.int64, device="cpu")
        dist.all_to_all_single(came, torch.tensor(numbers, dtype=torch.int64, device="cpu"), group=self._group)
        return [int(n) for n in came]


_made: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], list[TorchTransport]]] = weakref.WeakKeyDictionary()
"""That were lent, by default group (a script may end one and begin another) and members."""
_open: weakref.WeakSet[TorchTransport] = weakref.WeakSet()
"""That were not closed."""


@functools.cache
def _close_in_time() -> None:
    """Have gloo's threads end before the interpreter does, once in a process.

    They let go of a tensor a moment after whoever waits for it goes on, and that takes the interpreter lock; a thread that asks for it when the
    interpreter ends is ended itself, within C++ that does not expect it, which aborts the process. They end with their group, when nothing holds that
    any more. (A finalizer, as those are run in the order opposite to that in which they are made: threads that use a transport end before it.)
    """
    weakref.finalize(_open, _let_go, os.getpid())


def _let_go(process: int) -> None:
    if os.getpid() != process:  # forked, and without such threads, for which the end of a group would wait: groups last longer than it
        for group in [*(transport._group for transport in _open), *([dist.group.WORLD] if dist.is_initialized() else [])]:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        return
    for transport in list(_open):
        begun, waited_for = transport._under_way
        if begun == waited_for:  # else its end would wait for other ranks, which may be gone
            group, transport._group = transport._group, None
            _destroy(group)


def _destroy(group: Any) -> None:
    with contextlib.suppress(ValueError):  # the script has destroyed all groups
        dist.destroy_process_group(group)


def takes_gpus(group: Any = None) -> bool:
    """Whether tensors of GPUs travel over NCCL among the processes of `group`, which torch.distributed has initialised."""
    return "cuda:nccl" in dist.get_backend_config(dist.group.WORLD if group is None else group)


def _ranks(group: Any) -> list[int]:
    if not dist.is_available() or not dist.is_initialized():
        raise TransportError("torch.distributed is not initialised; call torch.distributed.init_process_group() first.")
    found: list[int] = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    return found


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def _rows(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bytes as rows of the type and shape of `like`'s; a copy where they do not lie as that type must."""
    if data.storage_offset() % like.element_size():
        data = data.clone()
    return data.view(like.dtype).view(-1, *like.shape[1:]) if data.numel() else like.new_empty((0, *like.shape[1:]))
