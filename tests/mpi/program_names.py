"""Names: any order on any rank, fusion, joining, stalls, idling, and what happens after a failure.

Arguments: `unthreaded` (run with MPI_BACKEND_THREAD=0) or nothing.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time

import torch
from mpi4py import MPI

import mpi_backend as hvd
from mpi_backend import runtime
from mpi_backend.engine.flights import Flights
from mpi_backend.transport import MPITransport
from tests.mpi.verdict import Verdict

verdict = Verdict()
said: list[str] = []
logging.getLogger("mpi_backend").addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, record: said.append(record.getMessage())})())

launched: list[int] = []
starts = MPITransport.allreduce_


def counted(self: object, t: torch.Tensor, name: str, op: str = "sum") -> object:
    launched.append(t.numel())
    return starts(self, t, name, op)  # type: ignore[arg-type]


MPITransport.allreduce_ = counted  # type: ignore[assignment,method-assign]
hvd.init()
rank, size = hvd.rank(), hvd.size()
last = size - 1
threaded = "unthreaded" not in sys.argv
verdict.expect(runtime.context().engine.threaded == threaded, "with a thread, or without")
verdict.expect(any(t.name == "mpi_backend" for t in threading.enumerate()) == threaded, "with a thread, or without")

# Every rank submits in an order of its own, all kinds of collectives, some waited for early.
own = random.Random(rank)
for _ in range(4):
    handles = {}
    for i in own.sample(range(60), 60):
        name = f"tensor.{i}"
        if i % 4 == 0:
            handles[i] = hvd.allgather_async(torch.full((rank + 1, 2), i), name)
        elif i % 4 == 1:
            handles[i] = hvd.broadcast_async(torch.full((3,), float(rank + i)), i % size, name)
        else:
            handles[i] = hvd.allreduce_async(torch.full((1000 if i % 3 else 5,), float(rank + i)), name=name, op=hvd.Sum)
        if own.random() < 0.2:
            time.sleep(0.001)
    for i in own.sample(range(60), 60):
        result = hvd.synchronize(handles[i])
        if i % 4 == 0:
            verdict.equal(result, torch.full((size * (size + 1) // 2, 2), i), f"all-gather {i}")
        elif i % 4 == 1:
            verdict.equal(result, torch.full((3,), float(i % size + i)), f"broadcast {i}")
        else:
            verdict.equal(result[:5], torch.full((5,), float(sum(r + i for r in range(size)))), f"all-reduce {i}")

# Small all-reduces run as one: those that wait for the last rank are complete at the same time.
hvd.barrier()
del launched[:]
if rank == last:
    MPI.COMM_WORLD.Barrier()
    time.sleep(0.3)
first = hvd.grouped_allreduce_async([torch.ones(1)] * 3, op=hvd.Sum)  # one by itself: a name, however many tensors
handles = [hvd.allreduce_async(torch.full((10 + i,), float(i)), name=f"small.{i}", op=hvd.Sum) for i in range(40)]
if rank != last:
    MPI.COMM_WORLD.Barrier()
for i, handle in enumerate(handles):
    verdict.equal(handle.wait(), torch.full((10 + i,), float(i * size)), f"fused {i}")
first.wait()
if size > 1 and threaded:  # others see what there is when it is their turn
    verdict.expect(len(launched) < 30, f"{len(launched)} all-reduces for 40 names")

# A name is in use until it is done.
if size > 1:
    hvd.barrier()
    if rank != last:
        handle = hvd.allreduce_async(torch.ones(1), name="twice")
        verdict.raises(ValueError, lambda: hvd.allreduce_async(torch.ones(1), name="twice"), "a name in use", "'twice'", "being processed")
    hvd.barrier()
    if rank == last:
        handle = hvd.allreduce_async(torch.ones(1), name="twice")
    handle.wait()
    verdict.equal(hvd.allreduce(torch.ones(2), name="twice"), torch.ones(2), "the name is free again")

# Waiting burns no core: neither a rank without work nor one that waits for another.
hvd.barrier()
begin = time.process_time()
if rank == last:
    time.sleep(1.0)
if size > 1:
    hvd.allreduce(torch.ones(1))
used = time.process_time() - begin
verdict.expect(used < 0.3, f"{used:.2f} seconds of CPU while waiting for one")

# Rank r has r batches; those that are through join, and the others go on.
for batch in range(rank):
    mean = hvd.allreduce(torch.full((2,), 1.0), name=f"batch.{batch}")
    verdict.expect(torch.allclose(mean, torch.full((2,), (size - 1 - batch) / size)), f"batch {batch}: joined ranks add zeros, {mean}")
    if batch == rank - 1 and rank == last and size > 1:
        verdict.raises(hvd.HorovodInternalError, lambda: hvd.allgather(torch.ones(1), "late"), "all-gather after a join", "joined")
        verdict.raises(hvd.HorovodInternalError, lambda: hvd.allreduce(torch.ones(1), name="late", op=hvd.Max), "Max after a join", "joined")
verdict.expect(hvd.join() == (last if last else 0), "the last rank joins last")
verdict.equal(hvd.allreduce(torch.ones(1), op=hvd.Sum), torch.tensor([float(size)]), "after joining")
for _ in range(rank):
    hvd.allreduce(torch.ones(2))
verdict.expect(hvd.join() in range(size), "joining again")
calls = [hvd.allreduce_async(torch.full((1,), 10.0 * i + rank), op=hvd.Sum) for i in range(3)]
sums = [torch.tensor([10.0 * i * size + size * (size - 1) / 2]) for i in range(3)]
verdict.expect([hvd.synchronize(h) for h in calls] == sums, "unnamed ones are matched by their order since the join")

# What one rank never submits is reported, with names, and fails after a while; on that rank too, when it comes.
STALLS = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "0.5", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
if size > 1:
    hvd.shutdown()
    os.environ.update(STALLS)  # for this alone: a rank that the machine keeps for two seconds would fail elsewhere
    hvd.init()
    begin = time.monotonic()
    MPI.COMM_WORLD.Barrier()
    if rank != last:
        handle = hvd.allreduce_async(torch.ones(3), name="forgotten")
        whom = "rank 0" if size == 2 else f"ranks {', '.join(map(str, range(last)))}"
        stalled = ("'forgotten'", f"submitted by {whom}, but not by rank {last} within 2 seconds")
        verdict.raises(hvd.HorovodInternalError, handle.wait, "a tensor that never comes", *stalled)
        waited = time.monotonic() - begin
        verdict.expect(waited > 1.5, f"failed after {waited} seconds, 2 were asked for")
        if rank == 0:
            warned = [s for s in said if "'forgotten'" in s]
            verdict.expect(bool(warned), f"no warning, one every 0.5 seconds: {said}")
            verdict.expect(all(f"still missing on rank {last}" in s and f"submitted by {whom}" in s for s in warned), f"who is missing: {warned}")
        time.sleep(2.0)  # the last rank is late for that one: for the next it must not be
    else:
        time.sleep(4.0)
        verdict.raises(hvd.HorovodInternalError, lambda: hvd.allreduce(torch.ones(3), name="forgotten"), "the one that was late", "'forgotten'")
    verdict.equal(hvd.allreduce(torch.ones(3), name="forgotten"), torch.ones(3), "and all goes on")
    verdict.expect(not said or rank == 0, "only the coordinator warns")
    hvd.shutdown()
    for setting in STALLS:
        del os.environ[setting]
    hvd.init()

# What this rank has started on a transport and does not wait for, others need before they come to what it does wait for.
hvd.barrier()
private = MPITransport()
large = private.allreduce_(torch.ones(4 * 10**6), "large")
if rank == 0:
    verdict.equal(hvd.allreduce(torch.ones(3), name="meanwhile"), torch.ones(3), "rank 0 waits for this first")
verdict.expect(bool((large.wait() == size).all()), "the others for this")
if rank > 0:
    verdict.equal(hvd.allreduce(torch.ones(3), name="meanwhile"), torch.ones(3), "and then for rank 0's")
private.close()

# An exception in the middle of communication: here it surfaces in what was pending and at the next call.
hvd.barrier()
hvd.shutdown()
hvd.init()
Flights.reduce = lambda self, run, submissions: 1 // 0  # type: ignore[assignment,method-assign,return-value]
handle = hvd.allreduce_async(torch.ones(3))
verdict.raises(hvd.HorovodInternalError, handle.wait, "what was pending", "ZeroDivisionError")
earlier = "communication has failed earlier", "ZeroDivisionError"
verdict.raises(hvd.HorovodInternalError, lambda: hvd.broadcast(torch.ones(3), 0), "the next call", *earlier)
hvd.shutdown()
verdict.expect(not any(t.name == "mpi_backend" and t.is_alive() for t in threading.enumerate()), "the thread has ended")
verdict.conclude()
