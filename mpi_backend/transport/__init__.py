"""A `Transport` over MPI. Importing this package imports `mpi4py.MPI`, which initialises MPI; `import mpi_backend` alone does not import it."""

from __future__ import annotations

from .collectives import MPITransport, ReduceOp
from .link import Link, User
from .lost import agree, among_those_that_live, dead_of, look_on, lost_between, may_be_lost, one_by_one, start_agreement, without_ulfm
from .memory import cuda_aware
from .messages import are_checked
from .nodes import NodesTransport, node_ranks, nodes_of
from .reduction import forced_algorithm

__all__ = [
    "Link", "MPITransport", "NodesTransport", "ReduceOp", "User",
    "agree", "among_those_that_live", "are_checked", "cuda_aware", "dead_of", "forced_algorithm", "look_on", "lost_between", "may_be_lost",
    "node_ranks", "nodes_of", "one_by_one", "start_agreement", "without_ulfm",
]  # fmt: skip
