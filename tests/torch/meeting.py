"""Ranks of mpirun as processes of torch.distributed: torchrun takes seconds to start itself."""

from __future__ import annotations

import atexit
import os

import torch.distributed as dist

__all__ = ["meet"]


def meet(file: str) -> tuple[int, int]:
    """Initialise torch.distributed among the ranks; `file` is where they meet. Returns rank and size.

    It ends with the process: gloo's threads, if they are still there when memory is taken down, now and then abort that.
    """
    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return rank, size
