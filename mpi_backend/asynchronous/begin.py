"""What the optimizers of this folder do when they are made, on all ranks together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from hvd_ecsgd.asynchronous.plan import check_rule
from hvd_ecsgd.core.method import Method
from hvd_ecsgd.core.talk import everyone, listed
from hvd_ecsgd.errors import CompressionError

# This imports mpi4py.MPI, which initialises MPI: only init() may do that.
if TYPE_CHECKING:
    from ..transport import MPITransport

__all__ = ["check_compression", "raise_together", "share_x", "told_of_parameters"]


def raise_together(transport: MPITransport, problem: Exception | None, what: str) -> None:
    """Raise what went wrong with `what` on this rank, or tell what did on another."""
    said = everyone(transport, "" if problem is None else str(problem), "asynchronous.begin")
    if problem is not None:
        raise problem
    if wrong := [r for r, text in enumerate(said) if text]:
        raise CompressionError(f"{what} has failed on {listed(wrong)}: {said[wrong[0]]}")


def check_compression(compression: object, what: str) -> None:
    """Raise `CompressionError` for a method that workers at different paces cannot use. Before it is bound: what is bound looks at later steps."""
    method = getattr(compression, "method", None)
    if isinstance(method, Method):
        check_rule(method, what)


def share_x(transport: MPITransport, parameters: Iterable[torch.nn.Parameter]) -> None:
    """All begin with the weights of rank 0."""
    for p in parameters:
        with torch.no_grad():
            x = p.detach().clone(memory_format=torch.contiguous_format)
            p.copy_(transport.broadcast_(x, 0, "asynchronous.x").wait())


def told_of_parameters(named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, list[int], str]]:
    """What must be equal of them on all ranks."""
    return [(name, list(p.shape), str(p.dtype)) for name, p in named]
