"""A `Transport` over MPI. Importing this package imports `mpi4py.MPI`, which initialises MPI; `import mpi_backend` alone does not import it."""

from __future__ import annotations

from .collectives import MPITransport, ReduceOp
from .link import Link, User
from .lost import agree, look_on, may_be_lost, without_ulfm
from .memory import cuda_aware
from .messages import are_checked
from .nodes import NodesTransport, node_ranks, nodes_of
from .reduction import forced_algorithm

__all__ = [
    "Link", "MPITransport", "NodesTransport", "ReduceOp", "User",
    "agree", "are_checked", "cuda_aware", "forced_algorithm", "look_on", "may_be_lost", "node_ranks", "nodes_of", "without_ulfm",
]  # fmt: skip
