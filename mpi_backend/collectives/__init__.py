"""Horovod's torch collectives over MPI, a file an operation.

Calls are matched between ranks by name, as in Horovod: ranks may submit in different orders, and a collective runs when all ranks of the process
set have submitted it. Without a name it gets a number, so unnamed ones are matched in the order of their submission. Types, shapes and options
under one name must be equal; where they are not, every rank raises `MismatchError`, which says who sent what. What some rank never submits
is reported after a while (see `init`). Asynchronous functions return handles for `poll` and `synchronize`.

Tensors may be of any dense layout and on any device; NumPy arrays are taken for CPU tensors without a copy (in-place functions write to them).
Results are tensors. All functions raise ValueError before init(), for a process set that this rank is not in, for a name that is still being
processed, and for wrong arguments, before anything is sent.
"""

from __future__ import annotations

from .allgather import allgather, allgather_async, grouped_allgather, grouped_allgather_async
from .allreduce import (
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
)
from .alltoall import alltoall, alltoall_async
from .arguments import Adasum, Average, Max, Min, Product, Sum
from .broadcast import broadcast, broadcast_, broadcast_async, broadcast_async_
from .handles import barrier, poll, synchronize
from .reducescatter import grouped_reducescatter, grouped_reducescatter_async, reducescatter, reducescatter_async
from .sparse import sparse_allreduce_async

__all__ = [
    "Adasum", "Average", "Max", "Min", "Product", "Sum",
    "allreduce", "allreduce_", "allreduce_async", "allreduce_async_",
    "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_", "sparse_allreduce_async",
    "allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async",
    "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "alltoall", "alltoall_async",
    "reducescatter", "reducescatter_async", "grouped_reducescatter", "grouped_reducescatter_async",
    "barrier", "poll", "synchronize",
]  # fmt: skip
