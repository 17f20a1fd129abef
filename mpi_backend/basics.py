"""Who this process is, and what this backend is made of."""

from __future__ import annotations

import torch

from .runtime import context

__all__ = [
    "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "is_homogeneous",
    "ccl_built", "check_extension", "cuda_built", "ddl_built", "gloo_built", "gloo_enabled", "mpi_built", "mpi_enabled", "mpi_threads_supported",
    "nccl_built", "rocm_built",
]  # fmt: skip


def rank() -> int:
    """The rank of this process, from 0."""
    return context().rank


def size() -> int:
    """The number of processes."""
    return context().size


def local_rank() -> int:
    """The rank of this process among those on its host."""
    return context().local_rank


def local_size() -> int:
    """The number of processes on this host."""
    return context().local_size


def cross_rank() -> int:
    """The rank of this host among those that have a process of this local rank."""
    return context().cross_rank


def cross_size() -> int:
    """The number of hosts that have a process of this local rank."""
    return context().cross_size


def is_homogeneous() -> bool:
    """Whether every host has the same number of processes."""
    return context().homogeneous


def mpi_threads_supported() -> bool:
    """Whether MPI runs with support for calls from several threads at once."""
    context()
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def mpi_built() -> bool:
    """True: this is MPI."""
    return True


def mpi_enabled() -> bool:
    """True: this is MPI."""
    return True


def gloo_built() -> bool:
    """False: nothing here uses Gloo."""
    return False


def gloo_enabled() -> bool:
    """False: nothing here uses Gloo."""
    return False


def nccl_built() -> int:
    """0: nothing here uses NCCL; CUDA tensors travel through MPI."""
    return 0


def ddl_built() -> bool:
    """False: nothing here uses DDL."""
    return False


def ccl_built() -> bool:
    """False: nothing here uses oneCCL."""
    return False


def check_extension(ext_name: str, ext_env_var: str, pkg_path: str, *args: str) -> None:
    """Raise ImportError where Horovod's extension `ext_name` has not been built. That of PyTorch is not needed here, others are not there."""
    if ext_name not in ("horovod.torch", "mpi_backend"):
        raise ImportError(f"Extension {ext_name} has not been built: mpi_backend is for PyTorch only. For other frameworks use Horovod itself.")


def cuda_built() -> bool:
    """Whether this PyTorch has CUDA, which is all that CUDA tensors need here."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether this PyTorch has ROCm, which is all that its tensors need here."""
    return torch.version.hip is not None
