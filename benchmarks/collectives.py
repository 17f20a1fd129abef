"""Collectives alone: mpi_backend's against the MPI library's and gloo's, as multiples of what the wire alone would take.

    benchmarks/netlab.sh with 4 1gbit python benchmarks/collectives.py --json collectives.json --plot collectives.svg

All variants take turns, in one run. A time is that of the slowest rank, from a common start. On a network of a known rate the limit is
2(n-1)/n · bytes ÷ rate for an all-reduce, and half of that for an all-gather (of so many bytes in all) and an all-to-all (of so many bytes a rank).
Where links delay, that much is added for each of the two ways, or for one way of all bytes if that is less.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from mpi4py import MPI
from reporting import Row, add_arguments, meet, slowest, start_gloo, told, write

from mpi_backend.transport import MPITransport

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
Run = Callable[[torch.Tensor], Any]


def memory(t: torch.Tensor) -> MPI.buffer:
    return MPI.buffer.fromaddress(t.data_ptr(), t.numel() * t.element_size())


def polled(request: MPI.Request) -> None:
    """Waited for as an optimizer's thread waits: by looks now and then."""
    pause = 20e-6
    while not request.Test():
        time.sleep(pause)
        pause = min(1.5 * pause, 200e-6)


def all_reduces(algorithms: list[str]) -> dict[str, Run]:
    """By name; each works in place."""
    transports = {name: MPITransport(algorithm=name) for name in ("", *algorithms)}
    ours: dict[str, Run] = {f"ours {name}".strip(): lambda t, by=by: by.allreduce_(t, "x").wait() for name, by in transports.items()}  # type: ignore[misc]
    return ours | {
        "MPI, non-blocking": lambda t: polled(comm.Iallreduce(MPI.IN_PLACE, [memory(t), t.numel(), MPI.FLOAT])),
        "MPI, blocking": lambda t: comm.Allreduce(MPI.IN_PLACE, [memory(t), t.numel(), MPI.FLOAT]),
        "gloo": lambda t: torch.distributed.all_reduce(t),
    }


def gathers() -> dict[str, Run]:
    """By name; the result has the size of what they are given, of which this rank's part is sent."""
    transport = MPITransport()

    def own(t: torch.Tensor) -> torch.Tensor:
        return t.view(size, -1)[rank]

    return {
        "ours": lambda t: transport.allgather_concatenated(own(t), "x", [own(t).numel()] * size).wait(),
        "MPI, non-blocking": lambda t: polled(comm.Iallgather(MPI.IN_PLACE, [memory(t), t.numel() // size, MPI.FLOAT])),
        "gloo": lambda t: torch.distributed.all_gather(list(torch.empty_like(t).view(size, -1)), own(t)),
    }


def all_to_alls() -> dict[str, Run]:
    transport = MPITransport()

    def by_mpi(t: torch.Tensor) -> None:
        out, count = torch.empty_like(t), t.numel() // size
        polled(comm.Ialltoall([memory(t), count, MPI.FLOAT], [memory(out), count, MPI.FLOAT]))

    splits = lambda t: [t.numel() // size] * size  # noqa: E731
    return {"ours": lambda t: transport.alltoall(t, splits(t), "x", splits(t)).wait(), "MPI, non-blocking": by_mpi}


def limit_of(nbytes: int, trips: int, rate: float, delay: float) -> float:
    """Seconds that rate and delay (in seconds) allow; one trip of an all-reduce sends a part, or all that there is to all others."""
    part = (size - 1) / size * nbytes * 8 / rate
    return min(trips * (part + delay), size * part + delay) if trips == 2 else part + delay


def measure(runs: dict[str, Run], nbytes: int, trips: int, options: argparse.Namespace, seconds: float, most: int) -> list[Row]:
    """Rounds in which each has its turn, for about so many seconds, at least three and at most so many."""
    count = max(1, nbytes // 4 // size) * size
    limit = limit_of(4 * count, trips, options.rate, options.delay / 1e3) if options.rate else None
    rows = [Row(name, limit) for name in runs]
    t, turns = torch.empty(count), list(zip(rows, runs.values()))
    began, rounds = time.perf_counter(), 0
    while told(comm, rounds < min(3, most) or (rounds < most and time.perf_counter() - began < seconds)):
        rounds += 1
        turns = turns[1:] + turns[:1]  # nobody always follows the same one
        for row, run in turns:
            t.fill_(rank + 1)
            meet(comm)
            time.sleep(0.005)  # what the meeting has left is over
            start = time.perf_counter()
            run(t)
            row.seconds.append(time.perf_counter() - start)
            if trips == 2 and (t[0] != size * (size + 1) / 2 or t[-1] != t[0]):
                raise AssertionError(f"{row.name}: the sum of {nbytes} bytes is wrong")
    for row in rows:
        row.seconds = slowest(comm, row.seconds[min(1, rounds - 1) :])  # the first round opens connections
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sizes", type=float, nargs="+", default=[4e3, 30e3, 100e3, 1.56e6, 25e6, 100e6], help="bytes")
    parser.add_argument("--seconds", type=float, default=8, help="for each size of each collective")
    parser.add_argument("--algorithms", nargs="*", default=[], help="of mpi_backend's all-reduce, each by itself too: exchange, direct, mpi")
    parser.add_argument("--only", choices=["all-reduce", "all-gather", "all-to-all"], help="measure this collective alone")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start_gloo(comm)
    sizes, most = ([4e3, 1e6], 1) if options.short else (options.sizes, 15)
    kinds = {"all-reduce": (lambda: all_reduces(options.algorithms), 2), "all-gather": (gathers, 1), "all-to-all": (all_to_alls, 1)}
    tables: dict[str, list[Row]] = {}
    for kind, (make, trips) in kinds.items():
        if options.only in (None, kind):
            runs = make()
            for nbytes in sizes:
                tables[f"{kind} of {nbytes:g} bytes"] = measure(runs, int(nbytes), trips, options, options.seconds, most)

    def plot(axes: Any) -> None:
        kind = next(iter(tables)).split(" of ")[0]
        shown = {float(heading.split()[2]): rows for heading, rows in tables.items() if heading.startswith(kind)}
        for k, row in enumerate(next(iter(shown.values()))):
            axes.loglog(list(shown), [rows[k].median / (rows[k].limit or 1) for rows in shown.values()], "o-", label=row.name)
        axes.set(xlabel="bytes", ylabel="multiple of what the wire takes" if options.rate else "seconds")
        axes.legend()

    if rank == 0:
        write(options, f"Collectives among {size} ranks", tables, plot, size=size)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
