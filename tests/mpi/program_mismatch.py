"""Whatever differs between ranks is an error on every rank, says who sent what, and leaves the backend in working order."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mpi_backend as hvd
from mpi_backend import HorovodInternalError
from tests.mpi.verdict import Verdict

verdict = Verdict()
hvd.init()
rank, size = hvd.rank(), hvd.size()
assert size > 1
odd = rank == size - 1
ranks = "rank 0: " if size == 2 else f"ranks {', '.join(map(str, range(size - 1)))}: "


def differs(call: Callable[[], object], what: str, *fragments: str) -> None:
    verdict.raises(hvd.MismatchError, call, what, ranks, f"rank {size - 1}: ", *fragments)
    verdict.equal(hvd.allreduce(torch.ones(2), op=hvd.Sum), torch.full((2,), float(size)), f"after {what}")


float_or_double = torch.float64 if odd else torch.float32
differs(lambda: hvd.allreduce(torch.ones(3 + odd), name="w"), "shape", "float32 (3), named 'w'", "float32 (4), named 'w'")
differs(lambda: hvd.allreduce_(torch.ones(3, 1 + odd), name="w"), "shape", "(3, 1)", "(3, 2)")
differs(lambda: hvd.allreduce(torch.ones(6).view(2 + odd, 3 - odd), name="w"), "shape of the same size", "(2, 3)", "(3, 2)")
differs(lambda: hvd.allreduce(torch.ones(3, dtype=float_or_double), name="w"), "dtype", "float32 (3)", "float64 (3)")
differs(lambda: hvd.allreduce(torch.ones(3), op=hvd.Sum if odd else hvd.Average), "op", "allreduce (Average)", "allreduce (Sum)")
differs(lambda: hvd.allreduce(torch.ones(3), postscale_factor=2.0 if odd else 1.0), "factor", "scaled by 1.0 and 2.0")
differs(lambda: hvd.allgather(torch.ones(rank, 3 + odd), name="w"), "trailing shape", "float32 (rows, 3)", "float32 (rows, 4)")
differs(lambda: hvd.alltoall(torch.ones(size, 3 + odd), name="w"), "trailing shape", "alltoall of float32 (rows, 3)", "(rows, 4)")
differs(lambda: hvd.broadcast(torch.ones(3), int(odd), name="w"), "root", "broadcast from rank 0", "broadcast from rank 1")
differs(lambda: hvd.broadcast_(torch.ones(3 + odd), 0), "shape", "(3)", "(4)")
differs(lambda: hvd.allgather(torch.ones(3)) if odd else hvd.allreduce(torch.ones(3)), "function", "allreduce (Average) of", "allgather of")
differs(lambda: hvd.barrier() if odd else hvd.allreduce(torch.ones(3)), "function", "allreduce (Average) of", "barrier")
many = [torch.ones(2)] * 100 + [torch.ones(3 + odd)]
differs(lambda: hvd.grouped_allreduce(many, name="w"), "the last of a long group", "float32 (3), named 'w'", "float32 (4), named 'w'", "its hash")
one_or_two = [("w", torch.ones(2)), ("b", torch.ones(2))][: 2 - odd]
differs(lambda: hvd.broadcast_parameters(one_or_two, 0), "number of parameters", "of 2 tensors", "of 1 tensors")
b_or_c = {"w": torch.ones(2), "c" if odd else "b": torch.ones(2)}
differs(lambda: hvd.broadcast_parameters(b_or_c, 0), "names of parameters", "b: float32 (2)", "c: float32 (2)")
adam_or_sgd = (torch.optim.Adam if odd else torch.optim.SGD)([torch.nn.Parameter(torch.ones(2))], lr=0.1)
differs(lambda: hvd.broadcast_optimizer_state(adam_or_sgd, 0), "optimizer", "state of SGD", "state of Adam")
other_shapes = torch.optim.SGD([torch.nn.Parameter(torch.ones(2 + odd))], lr=0.1)
differs(lambda: hvd.broadcast_optimizer_state(other_shapes, 0), "parameters of the optimizer", "shapes [(2,)]", "shapes [(3,)]")

# Among many in flight exactly the wrong ones fail, whatever is waited for first.
handles = [hvd.allreduce_async(torch.ones(10 + (odd and i % 7 == 3)), op=hvd.Sum) for i in range(30)]
for i in range(30) if rank % 2 else reversed(range(30)):
    if i % 7 == 3:
        verdict.raises(HorovodInternalError, handles[i].wait, f"{i} of many", "(10)", "(11)")
        verdict.raises(HorovodInternalError, handles[i].wait, f"{i} of many, again", "(10)", "(11)")
        verdict.expect(hvd.poll(handles[i]), "what has failed is done")
    else:
        verdict.equal(handles[i].wait(), torch.full((10,), float(size)), f"{i} of many")

# The check can fail: where nothing differs nothing is raised, and it says so.
control = Verdict()
control.raises(HorovodInternalError, lambda: hvd.allreduce(torch.ones(3), name="w"), "equal shapes", ranks)
control.raises(HorovodInternalError, lambda: hvd.allreduce(torch.ones(3 + odd), name="w"), "equal shapes", "not in the message")
verdict.expect(len(control.failures) == 2, "the control")
verdict.conclude()
