"""What the benchmarks share: ranks that start together, medians with their spread, and how results are written."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mpi4py import MPI

__all__ = ["Row", "add_arguments", "meet", "slowest", "start_gloo", "told", "wire_bytes", "write"]


@dataclass
class Row:
    """Measurements of one thing, in seconds. `limit`: what the wire alone would take; None where its rate is not known. `kernels`: what the processor
    alone would take beyond the step without it, of a method. `aim`: what the median should be at most."""

    name: str
    limit: float | None = None
    seconds: list[float] = field(default_factory=list)
    kernels: float | None = None
    aim: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "limit": self.limit, "median": self.median, "kernels": self.kernels, "aim": self.aim, "seconds": self.seconds}

    def __str__(self) -> str:
        times = (
            f"{self.name:<36} {1e3 * self.median:9.2f} ms  ({1e3 * min(self.seconds):.2f} … {1e3 * max(self.seconds):.2f}, {len(self.seconds)} times)"
        )
        times += f"  wire {1e3 * self.limit:.2f} ms, × {self.median / self.limit:.2f}" if self.limit else ""
        times += "" if self.kernels is None else f"  kernels {1e3 * self.kernels:.0f} ms"
        return times if self.aim is None else f"{times}  aim {1e3 * self.aim:.0f} ms, × {self.median / self.aim:.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="file that the measurements are written to")
    parser.add_argument("--plot", type=Path, help="file that a plot is written to (.svg, .png)")
    parser.add_argument("--short", action="store_true", help="little of everything, to see that it runs")
    rate = int(os.environ.get("NETLAB_RATE", "0"))
    delay = float(os.environ.get("NETLAB_DELAY", "0"))
    parser.add_argument("--delay", type=float, default=delay, help="milliseconds from one host to another (default: netlab's)")
    parser.add_argument("--rate", type=float, default=rate, help="bits per second of each host's link (default: netlab's, 0: not known)")


def meet(comm: MPI.Intracomm) -> None:
    """Return when all ranks are here. They look now and then, so that nobody takes the others' core."""
    _look_at(comm.Ibarrier())


def told(comm: MPI.Intracomm, flag: bool) -> bool:
    """Rank 0's `flag`. Ranks look now and then: one that waits inside of MPI takes a core, and is put off afterwards, in what is measured next."""
    value = bytearray([flag])
    _look_at(comm.Ibcast([value, MPI.BYTE], 0))
    return bool(value[0])


def _look_at(request: MPI.Request) -> None:
    while not request.Test():
        time.sleep(20e-6)


def slowest(comm: MPI.Intracomm, seconds: Sequence[float]) -> list[float]:
    """The longest of all ranks, one by one."""
    return [max(those) for those in zip(*comm.allgather(list(seconds)))]


def start_gloo(comm: MPI.Intracomm) -> None:
    """torch.distributed's process group of these ranks. Its network interface: GLOO_SOCKET_IFNAME."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind((address if comm.rank == 0 else "", 0))
        port = comm.bcast(free.getsockname()[1])
    torch.distributed.init_process_group("gloo", init_method=f"tcp://{comm.bcast(address)}:{port}", rank=comm.rank, world_size=comm.size)


def wire_bytes() -> tuple[int, int]:
    """Bytes that this host has received and sent so far, but for those to itself."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    columns = [line.split(":")[1].split() for line in lines if not line.strip().startswith("lo:")]
    return sum(int(c[0]) for c in columns), sum(int(c[8]) for c in columns)


def write(options: argparse.Namespace, title: str, tables: dict[str, list[Row]], plot: Callable[[Any], None], **about: object) -> None:
    """Rank 0 does: all rows on the terminal, and in the files that were asked for. `plot` draws on the axes that it is given."""
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version(),
    }
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for heading, rows in tables.items():
        print(heading, *(f"  {row}" for row in rows), sep="\n", flush=True)
    if options.json is not None:
        plain = {heading: [row.plain() for row in rows] for heading, rows in tables.items()}
        known = {"title": title, "made": made, "rate": options.rate, "delay": options.delay}
        options.json.write_text(json.dumps({**known, **about, **machine, "tables": plain}, indent=1) + "\n")
    if options.plot is not None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 5))
        plot(axes)
        axes.set_title(title)
        figure.tight_layout()
        figure.savefig(options.plot)
