"""One rank of: what is larger than the counts of MPI's functions, or than one message."""

from __future__ import annotations

import torch

import mpi_backend as hvd

hvd.init()
rank, MEBI = hvd.rank(), 1 << 20
objects = hvd.allgather_object(bytes([rank]) * (560 * MEBI))
assert [(len(o), o[0], o[-1]) for o in objects] == [(560 * MEBI, r, r) for r in range(2)]
del objects
rows = [1024 * MEBI + 3 + r for r in range(2)]
gathered = hvd.allgather(torch.full((rows[rank],), rank + 1, dtype=torch.uint8))
assert gathered.numel() == sum(rows)
assert [int(gathered[i]) for i in (0, rows[0] - 1, rows[0], sum(rows) - 1)] == [1, 1, 2, 2]
del gathered
assert len(hvd.broadcast_object(bytes(1200 * MEBI) if rank == 0 else None, 0)) == 1200 * MEBI
ones = torch.ones(2048 * MEBI + 5, dtype=torch.uint8)  # beyond the counts of a C int, each rank with one element of its own
ones[-1 - rank] = 3
assert hvd.allreduce_(ones, op=hvd.Sum) is ones
assert ones[-3:].tolist() == [2, 4, 4] and int(ones[:-3].min()) == int(ones[:-3].max()) == 2
print(f"rank {rank}: all right", flush=True)
