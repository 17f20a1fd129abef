"""A `Transport` over MPI. Importing this package imports `mpi4py.MPI`, which initialises MPI; `import mpi_backend` alone does not import it."""

from __future__ import annotations

from .collectives import MPITransport, ReduceOp
from .link import Link, User
from .memory import cuda_aware
from .nodes import NodesTransport, node_ranks, nodes_of
from .reduction import forced_algorithm

__all__ = ["Link", "MPITransport", "NodesTransport", "ReduceOp", "User", "cuda_aware", "forced_algorithm", "node_ranks", "nodes_of"]
