"""Ranks of one node as one worker: dense sums inside of a node, and collectives between nodes, of which each rank of a node carries a part."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.base import Handle, Ready

from .collectives import MPITransport, ReduceOp
from .lanes import Stages, Task, after
from .link import Link
from .messages import NEAR, exchange_parts
from .operation import SLOTS
from .reduction import allreduce_tasks, forced_algorithm

__all__ = ["NodeWorkers", "NodesTransport", "node_ranks", "nodes_of"]


def node_ranks() -> str:
    """What MPI_BACKEND_NODES says: "" (every rank is a worker by itself), "hosts" (the ranks of a host are one), or how many ranks, one after the
    other, are one. Raises ValueError for anything else, and beside an all-reduce that knows no nodes."""
    value = os.environ.get("MPI_BACKEND_NODES", "")
    if value not in ("", "hosts") and not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"MPI_BACKEND_NODES is {value!r}; expected hosts, a number of ranks of each node, or nothing.")
    if value and forced_algorithm() == "mpi":
        raise ValueError("MPI_BACKEND_ALLREDUCE=mpi adds among all ranks, and MPI_BACKEND_NODES asks for sums among some; unset one of them.")
    return value


def nodes_of(comm: MPI.Comm, said: str) -> list[list[int]]:
    """The ranks of each node, by what `node_ranks` has said. Collective. Raises ValueError, on all ranks, where nodes differ in size."""
    if said == "hosts":
        assert isinstance(comm, MPI.Intracomm)
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        firsts = comm.allgather(host.bcast(comm.Get_rank()))
        host.Free()
        nodes = [[r for r, of in enumerate(firsts) if of == first] for first in dict.fromkeys(firsts)]
    else:
        ranks = list(range(comm.Get_size()))
        nodes = [ranks[first : first + int(said)] for first in range(0, len(ranks), int(said))]
    if len(sizes := {len(node) for node in nodes}) > 1:
        raise ValueError(
            f"MPI_BACKEND_NODES={said}: the nodes have {sorted(sizes)} of these {comm.Get_size()} ranks; expected as many on each. Start as many "
            "ranks on each host, or unset the variable."
        )
    return nodes


class NodesTransport(MPITransport):
    """A transport among all ranks, with the `workers` that they form. Its link was made for nodes."""

    def __init__(self, link: Link) -> None:
        super().__init__(link=link)
        self.workers = NodeWorkers(link)


class NodeWorkers(MPITransport):
    """A transport among the nodes of `link`: see `hvd_ecsgd.transport.base.Workers`.

    All ranks of a node must call it alike, with the same bits. Of what travels between nodes each carries an equal part, to and from the rank in its
    place on the others, and the parts are exchanged inside of the node: so all ranks hold the same bits. `rank` is the node's, as are the sizes.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(link=link)
        everybody = link.messages
        node = next(node for node in link.nodes if everybody.rank in node)
        self._place = node.index(everybody.rank)
        self._inside = everybody.others(node, NEAR)
        self._first = [ranks[0] for ranks in link.nodes]
        self._be_among(everybody.others([ranks[self._place] for ranks in link.nodes], everybody.pace))

    def average_inside_(self, t: torch.Tensor, name: str) -> Handle[torch.Tensor]:
        """See `Workers`. Floats, whose sums are formed in the order of ranks."""
        what = f"average_inside_ {name!r}"
        flat, n = self._flat(t, what), self._inside.size
        if not t.is_floating_point():
            raise TransportError(f"{what}: means are of floats, and the tensor is {t.dtype}. Convert it first.")
        if n == 1 or flat.numel() == 0:
            return Ready(t)
        work, copy = self._staging.readable(flat)

        def finish() -> torch.Tensor:
            torch.div(work, n, out=work)
            if work is not flat:
                flat.copy_(work, non_blocking=True)
            return t

        return self._operations.start(what, lambda tag: after(copy, lambda: iter([allreduce_tasks(self._inside, tag, work, "sum", "")])), finish)

    def _root(self, root: int) -> int:
        return self._first[root]

    def _parts(self, t: torch.Tensor) -> Sequence[torch.Tensor]:
        """One for each place in the node."""
        return torch.tensor_split(t, self._inside.size)

    def _reduce_stages(self, tag: int, t: torch.Tensor, op: ReduceOp) -> Stages:
        parts = self._parts(t)
        yield allreduce_tasks(self._messages, tag, parts[self._place], op, self._algorithm)
        yield exchange_parts(self._inside, tag + SLOTS // 2, [parts[self._place]] * len(parts), parts)

    def _exchange_stages(self, tag: int, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> Stages:
        cut = [self._parts(t) for t in incoming]
        place = self._place
        yield exchange_parts(self._messages, tag, [self._parts(t)[place] for t in outgoing], [parts[place] for parts in cut])
        # This node's own too: whatever ranks of a node would disagree on, all ranks of all nodes hold the same.
        handed_on = [exchange_parts(self._inside, tag + SLOTS // 2, [parts[place]] * len(parts), parts) for parts in cut]
        yield [_one_by_one(tasks) for tasks in itertools.zip_longest(*handed_on)]


def _one_by_one(tasks: Sequence[Task | None]) -> Task:
    """As they share a tag, none begins before the one before it has ended."""
    for task in tasks:
        if task is not None:
            yield from task
