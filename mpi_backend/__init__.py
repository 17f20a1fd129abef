"""MPI for distributed PyTorch training with Horovod's torch API, without Horovod: `import mpi_backend as hvd`.

Importing it does not initialise MPI; `init()` does.
"""

from __future__ import annotations

from typing import NoReturn

from . import compression as compression
from . import functions as functions
from . import mpi_ops as mpi_ops
from .asynchronous import AsyncDistributedOptimizer, CutoffDistributedOptimizer, is_serving
from .basics import (
    ccl_built,
    check_extension,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    is_homogeneous,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    rocm_built,
    size,
)
from .collectives import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    Sum,
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    poll,
    reducescatter,
    reducescatter_async,
    sparse_allreduce_async,
    synchronize,
)
from .compression import Compression
from .errors import HorovodInternalError, MismatchError, RankLostError
from .functions import allgather_object, broadcast_object, broadcast_optimizer_state, broadcast_parameters
from .lifecycle import init, shutdown, start_timeline, stop_timeline
from .optimizer import DistributedOptimizer, join
from .process_sets import ProcessSet, global_process_set
from .runtime import is_initialized
from .sets import add_process_set, remove_process_set
from .sync_batch_norm import SyncBatchNorm

__all__ = [
    "AsyncDistributedOptimizer", "CutoffDistributedOptimizer", "is_serving",
    "Compression", "DistributedOptimizer", "HorovodInternalError", "MismatchError", "RankLostError", "SyncBatchNorm",
    "init", "is_initialized", "shutdown", "start_timeline", "stop_timeline",
    "ProcessSet", "add_process_set", "global_process_set", "remove_process_set",
    "Adasum", "Average", "Max", "Min", "Product", "Sum",
    "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "is_homogeneous",
    "ccl_built", "check_extension", "cuda_built", "ddl_built", "gloo_built", "gloo_enabled", "mpi_built", "mpi_enabled", "mpi_threads_supported",
    "nccl_built", "rocm_built",
    "allreduce", "allreduce_", "allreduce_async", "allreduce_async_",
    "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_", "sparse_allreduce_async",
    "allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async", "alltoall", "alltoall_async",
    "broadcast", "broadcast_", "broadcast_async", "broadcast_async_",
    "reducescatter", "reducescatter_async", "grouped_reducescatter", "grouped_reducescatter_async",
    "barrier", "join", "poll", "synchronize",
    "allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters",
]  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    if name == "elastic":
        raise AttributeError(
            "mpi_backend has no elastic: no ranks can come while a job runs. It can go on without those that die (MPI_BACKEND_ON_FAILURE=shrink), "
            "and one that is queued again with another number of ranks: hvd_ecsgd.load_checkpoint."
        )
    raise AttributeError(f"module 'mpi_backend' has no attribute {name!r}")
