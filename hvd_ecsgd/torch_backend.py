"""The part of Horovod's torch API that training scripts use, on torch.distributed: `import hvd_ecsgd.torch_backend as hvd`, started by torchrun.

Tensors on the CPU travel over gloo, and those on GPUs over NCCL where torch has it. `mpi_backend` has all of Horovod's API, on MPI.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from .compression import AnyCompression, Compression
from .errors import CompressionError, TransportError
from .optimizer import DistributedOptimizer as _DistributedOptimizer
from .transport.torch_dist import TorchTransport

__all__ = [
    "Average",
    "Compression",
    "DistributedOptimizer",
    "Sum",
    "allgather",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]

T = TypeVar("T")


class Operation(Enum):
    """What an all-reduce does."""

    AVERAGE = "Average"
    SUM = "Sum"


Average, Sum = Operation.AVERAGE, Operation.SUM

_PATIENCE = 600.0
"""Seconds."""
_network: TorchTransport | None = None
_began = False
"""`init` has initialised torch.distributed, and `shutdown` ends it."""


def init() -> None:
    """Join the job that torchrun has started (its variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without one, a job of one process.
    Ranks that torchrun starts again, as many or fewer or more, find each other, and not those before them.

    Where every process of a machine has a GPU of its own and torch has NCCL, tensors on it travel over that; call
    `torch.cuda.set_device(local_rank())`. Where the script has initialised torch.distributed already, among all of its processes. Nothing when it was
    called before.
    Raises `TransportError` when the other ranks have not come for ten minutes.
    """
    global _network, _began
    if _network is not None:
        return
    if not dist.is_initialized():
        _began = True
        atexit.register(_end_in_order, os.getpid())
        if "RANK" in os.environ:
            store, rank, size = next(rendezvous("env://"))
            dist.init_process_group(_backend(), store=_own_part(store, rank, size), rank=rank, world_size=size)
        else:
            dist.init_process_group(_backend(), store=HashStore(), rank=0, world_size=1)
    _network = TorchTransport()


def _backend() -> str:
    """NCCL takes no two processes on one GPU."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = torch.cuda.is_available() and dist.is_nccl_available() and processes <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if there else "gloo"


def _own_part(store: Any, rank: int, size: int) -> Any:
    """The part of `store` of the ranks that are here now.

    torchrun hands the same store to ranks that it starts again, where they would find addresses of those before them. Nothing in a process's
    environment tells all of its starts apart, so rank 0 draws a name, and gives it to whoever asks by a key that was never there before.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + _PATIENCE

    def wait(key: str, meanwhile: Callable[[], None] = lambda: None) -> str:
        while (found := _told(store, key)) is None:
            if time.monotonic() > deadline:
                raise TransportError(f"rank {rank} of {size} has waited {_PATIENCE} s for the others; see whether they all call hvd.init().")
            meanwhile()
            time.sleep(0.01)
        return found

    def answer() -> None:
        for other in range(1, size):
            if (asks := _told(store, f"asks {other}")) is not None:
                _tell(store, f"answer {asks}", mine)

    if rank == 0:
        name = mine
        for other in range(1, size):
            wait(f"{name} has {other}", answer)
    else:
        _tell(store, f"asks {rank}", mine)
        name = wait(f"answer {mine}")
        _tell(store, f"{name} has {rank}", "")
    return PrefixStore(name, store)


def _tell(store: Any, key: str, text: str) -> None:
    """Set it, so that `_told` finds it."""
    store.set(key, text)
    store.add(f"{key}: times", 1)


def _told(store: Any, key: str) -> str | None:
    """What was set, and None where that never was. It does not wait. torch 2.2 has no `Store.check`, and its `compare_set` crashes."""
    if store.add(f"{key}: times", 0) == 0:
        return None
    found: bytes = store.get(key)
    return found.decode()


def shutdown() -> None:
    """Leave the job. Collective."""
    global _network, _began
    if _network is not None:
        _network.close()
        if _began:
            dist.destroy_process_group()
    _network, _began = None, False


def _end_in_order(process: int) -> None:
    """Of `process`, not of those forked by it, where it ends without `shutdown`. One that ends by an error does not wait for what it has begun."""
    if os.getpid() == process and dist.is_initialized() and not hasattr(sys, "last_type"):
        shutdown()


def is_initialized() -> bool:
    """Between `init` and `shutdown`."""
    return _network is not None


def _connected() -> TorchTransport:
    if _network is None:
        raise TransportError("torch_backend has not been initialised; call hvd.init() first.")
    return _network


def rank() -> int:
    """This process's number in the job, from 0 on. Raises `TransportError` before `init`, as all below do."""
    return _connected().rank


def size() -> int:
    """How many processes the job has."""
    return _connected().size


def local_rank() -> int:
    """This process's number on its machine, as torchrun counts them."""
    _connected()
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many processes of the job are on this machine, as torchrun counts them."""
    _connected()
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: AnyCompression = Compression.none,
    backward_passes_per_step: int = 1,
    op: Operation = Average,
) -> Any:
    """Wrap `optimizer` so that `step()` applies the mean (or sum) of all ranks' gradients, compressed by `compression`, bound or not. Collective.

    As `hvd_ecsgd.DistributedOptimizer`, over a process group of its own. Raises ValueError for another `op`, and what that raises.
    """
    _check_op(op, "DistributedOptimizer()")
    _connected()
    transport = TorchTransport.lent()
    wrapped = _DistributedOptimizer(
        optimizer,
        named_parameters,
        compression,
        transport=transport,
        backward_passes_per_step=backward_passes_per_step,
        sum_gradients=op is Sum,
    )
    transport.lend_to(wrapped)
    return wrapped


# -- collectives ---------------------------------------------------------------------------------------------------------------------


def _check_op(op: object, what: str) -> None:
    if not isinstance(op, Operation):
        raise ValueError(f"{what}: op must be Average or Sum of torch_backend, got {op!r:.100}.")


def allreduce_(tensor: torch.Tensor, average: bool | None = None, name: str | None = None, op: Operation | None = None) -> torch.Tensor:
    """The mean (or sum) over ranks, in place. `average=False` is op=Sum. The mean of integers is rounded towards zero."""
    if average is not None and op is not None:
        raise ValueError("allreduce: average and op exclude each other; give op.")
    op = (Average if average in (None, True) else Sum) if op is None else op
    _check_op(op, "allreduce")
    flat = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
    _connected().allreduce_(flat, name or "allreduce").wait()
    if op is Average:
        flat.div_(size(), rounding_mode=None if flat.is_floating_point() else "trunc")
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat)
    return tensor


def allreduce(tensor: torch.Tensor, average: bool | None = None, name: str | None = None, op: Operation | None = None) -> torch.Tensor:
    """The mean (or sum) over ranks, as a new tensor."""
    return allreduce_(tensor.detach().clone(memory_format=torch.contiguous_format), average, name, op)


def allgather(tensor: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """Everybody's rows, by rank; the first dimension may differ."""
    return torch.cat(_connected().allgather(tensor.detach().contiguous(), name or "allgather").wait())


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Root's values, in place."""
    if not 0 <= root_rank < size():
        raise ValueError(f"broadcast: root_rank must be one of 0 … {size() - 1}, got {root_rank}.")
    values = tensor.detach().contiguous()
    _connected().broadcast_(values, root_rank, name or "broadcast").wait()
    if values.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(values)
    return tensor


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Root's values, as a new tensor."""
    return broadcast_(tensor.detach().clone(), root_rank, name)


def barrier() -> None:
    """Return when every rank has come here."""
    allreduce_(torch.zeros(1, dtype=torch.float32, device="cpu"), name="barrier")


def broadcast_object(obj: T, root_rank: int = 0, name: str | None = None) -> T:
    """Root's object on every rank, pickled; unpickling runs code, so this is for processes that trust each other."""
    objects: list[Any] = [obj]
    _connected()
    dist.broadcast_object_list(objects, src=root_rank)
    found: T = objects[0]
    return found


def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """The objects of all ranks, in rank order, pickled."""
    objects: list[Any] = [None] * size()
    dist.all_gather_object(objects, obj)
    return objects


def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, torch.Tensor]], root_rank: int = 0) -> None:
    """Copy root's values into all tensors of a dict (a module's `state_dict()`), or of (name, tensor) pairs.

    Raises `CompressionError` on every rank when ranks hold other names or shapes.
    """
    pairs = sorted(params.items()) if isinstance(params, Mapping) else list(params)
    tensors = [(name, p) for name, p in pairs if isinstance(p, torch.Tensor)]
    layouts = allgather_object([(name, tuple(p.shape), p.dtype) for name, p in tensors])
    for r, layout in enumerate(layouts):
        if layout != layouts[0]:
            mine, theirs = next((pair for pair in zip(layouts[0], layout) if pair[0] != pair[1]), (len(layouts[0]), len(layout)))
            raise CompressionError(f"broadcast_parameters: ranks hold different tensors: rank 0 has {mine}, rank {r} has {theirs}.")
    for name, p in tensors:
        broadcast_(p, root_rank, name)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0) -> None:
    """Make the state and options of all groups equal to root's."""
    state = broadcast_object(optimizer.state_dict(), root_rank)
    if rank() != root_rank:
        optimizer.load_state_dict(state)
