"""All-reduce of sparse tensors: everybody's entries are gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import runtime
from ..process_sets import ProcessSet, global_process_set
from ..tracing import untraced
from .allgather import allgather_async, start_allgather
from .arguments import Average, Sum

if TYPE_CHECKING:
    from ..engine.pending import Pending

__all__ = ["sparse_allreduce_async"]


class _Sparse:
    """The handle of a sparse all-reduce: callable, as Horovod's, and good for `poll` and `synchronize`."""

    def __init__(self, indices: Pending[torch.Tensor], values: Pending[torch.Tensor], size: torch.Size, divisor: int) -> None:
        self._indices, self._values, self._size, self._divisor = indices, values, size, divisor

    def done(self) -> bool:
        return self._indices.done() and self._values.done()

    def wait(self) -> torch.Tensor:
        values = self._values.wait()
        values = values / self._divisor if self._divisor > 1 else values
        return torch.sparse_coo_tensor(self._indices.wait().t(), values, self._size, device=values.device, check_invariants=False)

    def __call__(self) -> torch.Tensor:
        return self.wait()


@untraced
def sparse_allreduce_async(tensor: torch.Tensor, name: str, op: int, process_set: ProcessSet = global_process_set) -> _Sparse:
    """Start to reduce a sparse COO tensor (Average or Sum): everybody's entries are gathered. Calling the handle gives the result, uncoalesced.

    Sizes must be equal on all ranks.
    """
    name = runtime.channel(process_set).named(name, "sparse_allreduce_async")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"sparse_allreduce_async {name!r}: expected a sparse COO tensor, got {type(tensor).__name__}.")
    if not isinstance(op, int) or op not in (Average, Sum):
        raise ValueError(f"sparse_allreduce_async {name!r}: op is {op!r:.100}; expected Average or Sum.")
    if tensor.layout != torch.sparse_coo:
        raise ValueError(f"sparse_allreduce_async {name!r}: expected a sparse COO tensor, not layout {tensor.layout}; use allreduce.")
    what = f"sparse_allreduce_async of size {tuple(tensor.size())}"  # which the entries do not tell: compared as a part of the request
    indices = start_allgather([tensor._indices().t()], f"{name}.indices", process_set, lambda gathered, rows: gathered[0], what)
    values = allgather_async(tensor._values(), f"{name}.values", process_set)
    return _Sparse(indices, values, tensor.size(), runtime.channel(process_set).size if op == Average else 1)
