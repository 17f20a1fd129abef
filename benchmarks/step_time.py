"""A training step: compute alone, torch's DDP, mpi_backend with several methods, and stock Horovod where it is installed.

    benchmarks/netlab.sh with 4 1gbit python benchmarks/step_time.py --json step_time.json --plot step_time.svg

The model is ten square linear layers. Rows take turns, in one run: in each round every row makes its model, warms up, and takes a few steps. A step's
time is that of the slowest rank. `wire`: the bytes that the row's steps moved over the busiest host's link (as the system counts them, headers
and all) ÷ its rate. On ranks of one host there is no wire. `kernels`: what a step of the method among one worker, which sends nothing, takes longer
than compute alone, on all ranks at once. `aim`: of mpi_backend 1.2 × the longer of wire and compute with kernels; of its dense rows what DDP takes in
the same run, dense and with its fp16 hook; of stock Horovod 1.4 × mpi_backend. Where links delay it is 1.3 ×, and the delay there and back is added.
Rows `… logged` write telemetry, without norms, and `… logged, norms` take them in every step, where a Logger takes them in every 50th.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from reporting import Row, add_arguments, meet, slowest, start_gloo, wire_bytes, write
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mpi_backend as hvd
from hvd_ecsgd import Compression, telemetry
from hvd_ecsgd import DistributedOptimizer as one_worker
from hvd_ecsgd import ddp as ddp_hook

hvd.init()
from mpi4py import MPI  # noqa: E402

comm = MPI.COMM_WORLD.Dup()
rank, size = comm.Get_rank(), comm.Get_size()
Step = Callable[[torch.Tensor], None]
Make = Callable[[torch.nn.Module], Step]

METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: Compression.none,
    "fp16": lambda: Compression.fp16,
    "bf16": lambda: Compression.bf16(),
    "random_block(64)": lambda: Compression.random_block(64),
    "detached(64)": lambda: Compression.detached(64),
    "double_squeeze()": lambda: Compression.double_squeeze(),
    "random_k(100)": lambda: Compression.random_k(100),
    "one_bit()": lambda: Compression.one_bit(),
    "power_sgd(1)": lambda: Compression.power_sgd(1),
    "power_sgd(2)": lambda: Compression.power_sgd(2),
    "top_k(100)": lambda: Compression.top_k(100),
    "qsgd()": lambda: Compression.qsgd(),
    "auto()": lambda: Compression.auto(),
}
CHOOSING: list[Any] = []
"""What `auto()` chose by, one for each time that it was made."""


def plain(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compute_alone(model: torch.nn.Module) -> Step:
    return stepped(model, plain(model))


def ddp(model: torch.nn.Module, hook: Any = None) -> Step:
    wrapped = DistributedDataParallel(model, init_sync=False)
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    return stepped(wrapped, plain(wrapped))


def ddp_with_our_hook(model: torch.nn.Module, method: str) -> Step:
    wrapped = DistributedDataParallel(model, init_sync=False)
    optimizer = plain(wrapped)
    ddp_hook.register(wrapped, METHODS[method]()).compression.attach(optimizer)
    return stepped(wrapped, optimizer)


def alone(model: torch.nn.Module, method: str) -> Step:
    """The method among one worker."""
    return stepped(model, one_worker(plain(model), model.named_parameters(), METHODS[method]()))


def ours(model: torch.nn.Module, method: str) -> Step:
    optimizer = hvd.DistributedOptimizer(plain(model), model.named_parameters(), compression=METHODS[method]())
    if optimizer.compression.tuner is not None:
        CHOOSING.append(optimizer.compression.tuner)
    return stepped(model, optimizer)


LOGS = tempfile.TemporaryDirectory()


def logged(model: torch.nn.Module, method: str, norms_every: int) -> Step:
    """As `ours`, with rank 0's records in a file."""
    optimizer = hvd.DistributedOptimizer(plain(model), model.named_parameters(), compression=METHODS[method]())
    telemetry.Logger(optimizer.compression, Path(LOGS.name) / "run.jsonl", norms_every=norms_every)
    return stepped(model, optimizer)


def horovod(model: torch.nn.Module, method: str) -> Step:
    import horovod.torch as stock

    optimizer, compression = plain(model), METHODS[method]()
    if method not in ("none", "fp16"):
        compression = compression.bind(model)
    wrapped = stock.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=compression)
    if hasattr(compression, "attach"):
        compression.attach(wrapped)
    return stepped(model, wrapped)


@contextlib.contextmanager
def horovod_running(needed: bool) -> Iterator[None]:
    """Its thread looks for work a thousand times a second: only while it is measured."""
    if not needed:
        yield
        return
    import horovod.torch as stock

    stock.init()
    try:
        yield
    finally:
        stock.shutdown()


@contextlib.contextmanager
def gloo_for_horovod() -> Iterator[None]:
    """What `horovodrun --gloo` gives its processes, which find each other through a server of its. For good: a process in which Horovod has used MPI
    cannot go over to gloo."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
    from horovod.runner.http.http_server import RendezvousServer

    names = comm.allgather(socket.gethostname())
    slots = get_host_assignments(parse_hosts(",".join(f"{name}:{names.count(name)}" for name in dict.fromkeys(names))), size)
    server = RendezvousServer() if rank == 0 else None
    port = comm.bcast(server.start() if server else 0)
    if server:
        server.init(slots)
    address = comm.bcast(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    os.environ.update(create_slot_env_vars(slots[rank]))
    told = create_run_env_vars(address, [os.environ.get("GLOO_SOCKET_IFNAME", "lo")], port)
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        yield
    finally:
        comm.Barrier()
        if server:
            server.stop()


def all_rows() -> dict[str, Make]:
    hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
    rows: dict[str, Make] = {"compute alone": compute_alone, "DDP dense": ddp}
    rows |= {f"DDP {name} hook": partial(ddp, hook=hook) for name, hook in hooks.items()}
    rows |= {f"ours {method}": partial(ours, method=method) for method in METHODS}
    rows |= {f"ours {method} logged": partial(logged, method=method, norms_every=0) for method in METHODS}
    rows |= {f"ours {method} logged, norms": partial(logged, method=method, norms_every=1) for method in METHODS}
    rows |= {f"DDP {method}": partial(ddp_with_our_hook, method=method) for method in METHODS}
    if importlib.util.find_spec("horovod") is not None:
        rows |= {f"Horovod {method}": partial(horovod, method=method) for method in METHODS if method != "auto()"}
    return rows


DEFAULT = [
    *("compute alone", "DDP dense", "DDP fp16 hook"),
    *(f"ours {method}" for method in METHODS if method not in ("power_sgd(2)", "auto()")),
    *("Horovod none", "Horovod fp16", "Horovod random_block(64)", "Horovod double_squeeze()"),
]


WARM_UP = 4
"""Steps before those that are measured: connections, buffers, and what optimizers check in their first three steps only."""
CHOICE = 17
"""Steps in which `auto()` decides, and one."""


def measure(make: Make, width: int, layers: int, batch: int, steps: int, warm_up: int = WARM_UP) -> tuple[list[float], float]:
    """Seconds of each step, and bytes that a step has moved over the busiest link."""
    gc.collect()  # optimizers and their hooks hold each other, and all gradients
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    x = torch.randn(batch, width)
    step = make(model)
    for _ in range(warm_up):
        step(x)
    meet(comm)
    before, seconds = wire_bytes(), []
    for _ in range(steps):
        start = time.perf_counter()
        step(x)
        seconds.append(time.perf_counter() - start)
    meet(comm)
    moved = max(after - earlier for after, earlier in zip(wire_bytes(), before))
    return slowest(comm, seconds), max(comm.allgather(moved)) / steps


def method_of(row: str) -> str | None:
    """Whose kernels a row runs: a method of this project, on any backend."""
    method = row.partition(" ")[2].removesuffix(" logged").removesuffix(" logged, norms")
    return method if method in METHODS and (not row.startswith("Horovod") or method not in ("none", "fp16")) else None


def set_aims(results: dict[str, Row], compute: float, delay: float) -> None:
    """What rows should take, of what the others of the same run have taken; nothing where those are missing. `delay`: seconds from host to host."""
    dense = {"ours none": "DDP dense", "ours fp16": "DDP fp16 hook", "ours bf16": "DDP fp16 hook"}
    for name, row in results.items():
        backend, _, method = name.partition(" ")
        if name in dense:
            row.aim = results[dense[name]].median if dense[name] in results else None
        elif backend == "ours" and row.kernels is not None:
            row.aim = (1.3 if delay else 1.2) * (max(compute + row.kernels, row.limit or 0.0) + 2 * delay)
        elif backend == "Horovod" and f"ours {method}" in results:
            row.aim = 1.4 * results[f"ours {method}"].median


def main() -> None:
    rows = all_rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--rows", nargs="+", default=[name for name in DEFAULT if name in rows], choices=list(rows), metavar="ROW", help="; ".join(rows)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured ones, for each row in each round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--horovod", choices=("mpi", "gloo"), default="mpi", help="what stock Horovod's rows use, as of its horovodrun")
    parser.add_argument("--width", type=int, default=1581, help="of the layers; 25 M parameters by default")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    start_gloo(comm)
    with gloo_for_horovod() if options.horovod == "gloo" else contextlib.nullcontext():
        run(options, rows)
    torch.distributed.destroy_process_group()


def run(options: argparse.Namespace, rows: dict[str, Make]) -> None:
    """All rows, by turns, and what is told of them."""
    width, layers, rounds, steps = (64, 3, 1, 1) if options.short else (options.width, 10, options.rounds, options.steps)
    results = {name: Row(name) for name in options.rows}
    for _ in range(rounds):
        for name, row in results.items():
            with horovod_running(name.startswith("Horovod")):
                seconds, moved = measure(rows[name], width, layers, options.batch, steps, CHOICE if "auto" in name else WARM_UP)
            row.seconds += seconds
            row.limit = 8 * moved / options.rate if options.rate and name != "compute alone" else None
    compute = next((row.median for name, row in results.items() if name == "compute alone"), None)
    if compute is not None:
        kernels: dict[str, float] = {}
        for name, row in results.items():
            if (method := method_of(name)) is not None and method != "auto()":
                if method not in kernels:
                    seconds, _ = measure(partial(alone, method=method), width, layers, options.batch, steps)
                    kernels[method] = max(0.0, statistics.median(seconds) - compute)
                row.kernels = kernels[method]
        set_aims(results, compute, options.delay / 1e3)

    def plot(axes: Any) -> None:
        names = list(results)[::-1]
        axes.barh(names, [1e3 * results[name].median for name in names], label="median step")
        axes.barh(names, [1e3 * (results[name].limit or 0) for name in names], height=0.3, label="wire alone")
        axes.set(xlabel="ms", xscale="log")
        axes.legend()

    if rank == 0:
        title = f"A step of {layers} × Linear({width}), {size} ranks"
        chosen = [str(decision) for tuner in CHOOSING for decision in tuner.decisions]
        write(options, title, {title: list(results.values())}, plot, size=size, batch=options.batch, auto=chosen)
        print(*(f"auto() chose {decision}" for decision in chosen), sep="\n")


if __name__ == "__main__":
    main()
