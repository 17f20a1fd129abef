"""Horovod's DistributedOptimizer over MPI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hvd_ecsgd import DistributedOptimizer as _DistributedOptimizer
from hvd_ecsgd.compression import AnyCompression, Compression

from . import runtime
from .collectives import Average, Sum

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: AnyCompression = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
) -> Any:
    """Wrap `optimizer` so that `step()` applies the mean (or sum) over all ranks of the gradients, compressed by `compression`.

    Takes Horovod's arguments in Horovod's order, without `process_set`. `compression` may be bound or not; every method of this project
    works here, those in update units included. `backward_passes_per_step`: gradients of so many backward passes are summed before the exchange.
    `gradient_predivide_factor`, `num_groups`, `groups` tune Horovod's fusion and order of scaling; buckets take their place, the mean is formed
    from unscaled numbers, and results do not depend on them: they are checked and have no further effect.
    `sparse_as_dense`: sparse gradients become dense before the exchange.

    Raises ValueError for an `op` other than Average and Sum; `CompressionError` (a ValueError) as `hvd_ecsgd.DistributedOptimizer` does.
    """
    if op not in (Average, Sum):
        raise ValueError(f"DistributedOptimizer(): op must be Average or Sum, got {op!r}.")
    if gradient_predivide_factor <= 0:
        raise ValueError(f"DistributedOptimizer(): gradient_predivide_factor must be positive, got {gradient_predivide_factor!r}.")
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("DistributedOptimizer(): gradient_predivide_factor goes with op=Average.")
    if num_groups < 0 or (isinstance(groups, int) and groups < 0):
        raise ValueError("DistributedOptimizer(): groups must be a non-negative integer or lists of parameters.")
    return _DistributedOptimizer(
        optimizer,
        named_parameters,
        compression,
        transport=runtime.new_transport(),
        backward_passes_per_step=backward_passes_per_step,
        sum_gradients=op == Sum,
        sparse_as_dense=sparse_as_dense,
    )
