"""MPI_BACKEND_CHECKSUM on real ranks: collectives are what they were, and a bit that changes on its way is noticed by whoever receives it."""

from __future__ import annotations

from tests.ranks import mpirun

PROGRAM = """
import os
import torch
from mpi4py import MPI
from benchmarks.faulty import Flipping
from hvd_ecsgd.errors import TransportError
from mpi_backend.transport import MPITransport

comm = MPI.COMM_WORLD
rank, n = comm.Get_rank(), comm.Get_size()
drawn = torch.Generator().manual_seed(rank)


def collectives(transport, algorithm):
    x = torch.randn(n * 1001, generator=torch.Generator().manual_seed(rank))
    rows = torch.arange(7 * n, dtype=torch.uint8) + rank
    yield "all-reduce", lambda: transport.allreduce_(x.clone(), "a").wait()
    yield "reduce-scatter", lambda: transport.reduce_scatter(x, [1001] * n, "r").wait()
    yield "all-gather", lambda: torch.cat(transport.allgather(rows, "g", [7 * n] * n).wait())
    yield "all-to-all", lambda: torch.cat(transport.alltoall(rows, [7] * n, "t", [7] * n).wait())
    yield "all-gather of unknown sizes", lambda: torch.cat(transport.allgather(rows[: 3 + rank], "g").wait())


def outcome(call):
    try:
        return call()
    except TransportError as error:
        return str(error)


results = {}
for checked in ("0", "1"):
    os.environ["MPI_BACKEND_CHECKSUM"] = checked
    for algorithm in ("exchange", "direct"):
        transport = MPITransport(algorithm=algorithm)
        results[checked, algorithm] = [call() for _, call in collectives(transport, algorithm)]
        transport.close()
for algorithm in ("exchange", "direct"):
    assert all(map(torch.equal, results["0", algorithm], results["1", algorithm])), algorithm

found = []
for checked in ("0", "1"):
    os.environ["MPI_BACKEND_CHECKSUM"] = checked
    for i in range(4):  # in which nothing follows that the others would wait for
        transport = MPITransport(algorithm="exchange")
        name, call = list(collectives(transport, "exchange"))[i]
        messages = transport._messages
        if rank == 1:
            messages.comm = Flipping(messages.comm)  # in what rank 2, the next one, receives
        said = outcome(call)
        right = isinstance(said, torch.Tensor) and torch.equal(said, results["1", "exchange"][i])
        found.append((checked, name, right, said if isinstance(said, str) else ""))
        told = comm.allgather(found[-1])
        if checked == "1":
            assert [right for *_, right, _ in told] == [r != 2 for r in range(n)], told
            assert "what rank 1 sent has arrived changed" in told[2][3] and told[2][3].startswith(("all", "reduce")), told
        else:
            assert [right for *_, right, _ in told] == [r != 2 for r in range(n)] and not told[2][3], ("silently wrong", told)
        transport.abandon()
        comm.Barrier()
print("well", flush=True)
"""


def test_collectives_with_checksums_are_right_and_notice_a_changed_bit() -> None:
    """Control: without them the same bit is not noticed, and the result is another one."""
    assert mpirun(3, PROGRAM).count("well") == 3
