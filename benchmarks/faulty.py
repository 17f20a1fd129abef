"""On the ranks of a job: a small training that goes on from its last checkpoint, in which one thing goes wrong, at a moment that is hit for certain.

    mpirun -n 3 python benchmarks/faulty.py '{"folder": "f", "backend": "two_pass", "steps": 8, "record": true}'     # what is right, step by step
    mpirun -n 3 python benchmarks/faulty.py '{"folder": "f", "backend": "two_pass", "steps": 8, "fault": "kill", "moment": "pass 1", "at": 5}'

faults.py starts it. The fault-free run writes a hash of the weights after every step; whoever trains later compares after every step, on every rank,
so a run that goes on from a checkpoint is the fault-free one bit for bit, or ends with an error. Checkpoints are saved in two folders by turns.

With the backend `asynchronous` the last rank serves. Up to the step of the fault workers take turns, so that bits are given; from there on all train
at once, as they do in earnest, and there is nothing to compare with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mpi_backend as hvd
from hvd_ecsgd import CheckpointError, Compression, load_checkpoint, save_checkpoint
from hvd_ecsgd.asynchronous import Kind

BACKENDS = ("all_reduce", "two_pass", "asynchronous")
SERVERS = {"asynchronous": 1}
FREE = 40
"""Steps of each worker of an asynchronous training from the fault on, where the fault itself does not end it."""
TRACE, WHEN, NOW, STATES = "trace", "when", "now", ("even", "odd")
"""Files of the folder: hashes by step, when the fault was, that a server is to have it now; and its checkpoints."""

Fire = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What a job does. `steps`: where it ends. `record`: write the hashes, compare with none. `every`: steps from one checkpoint to the next.
    `fault` happens in step `at`, at the `moment`, on rank `victim`; `seconds`: how long a stop lasts. `leak`: what each step leaves behind, of what
    `watch` reports: memory (in MiB), threads and open files, from step 10 on."""

    folder: str
    backend: str
    steps: int
    record: bool = False
    every: int = 2
    fault: str = ""
    moment: str = ""
    at: int = -1
    victim: int = 1
    seconds: float = 20.0
    watch: bool = False
    leak: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))


# -- what goes wrong -------------------------------------------------------------------------------------------------------------


class Flipping:
    """A communicator in whose next message, and no other, one bit has changed when it arrives: what was handed over stays as it was."""

    def __init__(self, comm: Any) -> None:
        self._comm, self._done = comm, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def Isend(self, buffer: Any, dest: int, tag: int) -> Any:
        if self._done:
            return self._comm.Isend(buffer, dest, tag)
        self._done = True
        data = bytearray(buffer)
        middle = len(data) // 2 // 4 * 4
        data[middle + 2 if middle + 2 < len(data) else middle] ^= 0x40  # of a float32 a bit that counts, and no exponent's
        _kept.append(data)
        return self._comm.Isend(data, dest, tag)


_kept: list[bytearray] = []


@dataclass
class Fault:
    """`arm` it, and the next time the moment comes it happens, once."""

    plan: Plan
    armed: bool = False

    def arm(self) -> None:
        self.armed = True

    def due(self) -> bool:
        """Whether it is to happen now; it will not again."""
        now, self.armed = self.armed, False
        if now:
            temporary = Path(self.plan.folder) / f"{WHEN}.tmp"
            temporary.write_text(f"{time.time()}")
            temporary.rename(temporary.with_name(WHEN))
        return now

    def happen(self) -> None:
        """But for a changed message, which whoever sends it changes."""
        me = os.getpid()
        if self.plan.fault == "kill":
            os.kill(me, signal.SIGKILL)
        elif self.plan.fault == "stop":
            subprocess.Popen(["sh", "-c", f"sleep {self.plan.seconds}; kill -CONT {me}"])
            os.kill(me, signal.SIGSTOP)
        elif self.plan.fault == "slow":  # of every 100 ms it has ten
            subprocess.Popen(["sh", "-c", f"while kill -STOP {me} && sleep 0.09 && kill -CONT {me} && sleep 0.01; do :; done 2>/dev/null"])
        elif self.plan.fault == "cut":
            subprocess.run(["ip", "link", "set", "cable", "down"], check=True)
        elif self.plan.fault != "flip":
            raise ValueError(f"no fault is called {self.plan.fault!r}")

    def __call__(self) -> None:
        if self.due():
            self.happen()


@contextlib.contextmanager
def flipping(fault: Fault, holder: Any) -> Iterator[None]:
    """`holder.comm` sends what is another thing when it arrives, where that is the fault; any other fault happens when the message has left."""
    if not fault.due():
        yield
    elif fault.plan.fault == "flip":
        true, holder.__dict__["comm"] = holder.comm, Flipping(holder.comm)
        try:
            yield
        finally:
            holder.__dict__["comm"] = true
    else:
        yield
        fault.happen()


def in_pass(fault: Fault, number: int) -> None:
    """Plant it in the first message of a pass of a bucket's exchange: of an all-to-all and an all-gather, or of an all-reduce's two halves."""
    from mpi_backend.transport.messages import Messages
    from mpi_backend.transport.operation import SLOTS, Operations

    started: dict[int, str] = {}
    start, send = Operations.start, Messages.send

    def noted(self: Any, what: str, stages: Any, *rest: Any, **more: Any) -> Any:
        def stages_noted(tag: int) -> Any:
            started[tag // SLOTS] = what
            return stages(tag)

        return start(self, what, stages_noted, *rest, **more)

    def pass_of(tag: int) -> int:
        what = started.get(tag // SLOTS, "")
        if re.search(r"\.reduce'", what):
            return 1 + tag % 2  # `reduction._direct`
        return 1 if what.endswith(".push'") else 2 if what.endswith(".pull'") else 0

    def sent(self: Any, t: Any, peer: int, tag: int) -> Any:
        with flipping(fault, self) if fault.armed and pass_of(tag) == number else contextlib.nullcontext():
            return send(self, t, peer, tag)

    Operations.start, Messages.send = noted, sent  # type: ignore[method-assign,assignment]


def in_post(fault: Fault, kind: Kind) -> None:
    """Plant it in a message of this kind between worker and server: when its head has left, and its payloads have not."""
    from mpi_backend.asynchronous.post import Post
    from mpi_backend.transport.memory import memory_of

    send = Post.send

    def sent(self: Any, message: Any, to: int) -> None:
        if not (fault.armed and message.kind is kind):
            send(self, message, to)
        elif fault.plan.fault == "flip":
            fault.due()
            true = self.comm

            class OfPayload(Flipping):
                def Isend(self, buffer: Any, dest: int, tag: int) -> Any:
                    return super().Isend(buffer, dest, tag) if tag == 2 else true.Isend(buffer, dest, tag)

            self.comm = OfPayload(true)
            try:
                send(self, message, to)
            finally:
                self.comm = true
        elif fault.plan.fault == "kill":
            head = torch.frombuffer(bytearray(message.head()), dtype=torch.uint8)
            self.comm.Isend(memory_of(head), to, 1).Wait()
            fault()
        else:
            fault()
            send(self, message, to)

    Post.send = sent  # type: ignore[method-assign]


def in_saving(fault: Fault, name: str) -> None:
    """Plant it where a file of a checkpoint, whose name begins so, is written but not in its place yet."""
    from hvd_ecsgd.checkpoint import parts

    sync = parts._sync

    def synced(path: Path) -> int:
        if path.suffix == ".tmp" and path.name.startswith(name):
            fault()
        return sync(path)

    parts._sync = synced


def plant(fault: Fault, model: torch.nn.Module) -> None:
    """Where the plan's moment is. On a server: a gradient has come (`pass 1`), an answer leaves (`pass 2`)."""
    moment, served = fault.plan.moment, fault.plan.backend == "asynchronous"
    if moment == "forward":
        model[0].register_forward_hook(lambda *_: fault())  # type: ignore[index,operator,union-attr]
    elif moment in ("part", "manifest"):
        in_saving(fault, moment)
    elif moment not in ("pass 1", "pass 2"):
        raise ValueError(f"no moment is called {moment!r}")
    elif not served:
        in_pass(fault, int(moment[-1]))
    elif hvd.is_serving() and moment == "pass 1":
        from hvd_ecsgd.asynchronous import Server

        push = Server.on_push

        def pushed(self: Any, message: Any) -> Any:
            fault()
            return push(self, message)

        Server.on_push = pushed  # type: ignore[method-assign]
    elif hvd.is_serving():
        in_post(fault, Kind.MOVE)
    elif moment == "pass 1":
        in_post(fault, Kind.PUSH)
    else:
        from mpi_backend.asynchronous.post import Post

        wait_for = Post.wait_for

        def waited(self: Any, source: int) -> Any:
            fault()
            return wait_for(self, source)

        Post.wait_for = waited  # type: ignore[method-assign]


# -- what is trained -------------------------------------------------------------------------------------------------------------


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))


def backward(model: torch.nn.Module, step: int, rank: int) -> None:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    inputs, labels = torch.randn(8, 64, generator=drawn), torch.randint(10, (8,), generator=drawn)
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()


def hash_of(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for p in model.parameters():
        digest.update(p.detach().numpy().data)
    return digest.hexdigest()


class Trace:
    """Hashes after each step: written by rank 0 of the fault-free run, and what every other run is compared with."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._file, self._rank, self._record = Path(plan.folder) / TRACE, rank, plan.record
        self.known = {} if plan.record else {int(step): value for step, value in map(str.split, self._file.read_text().splitlines())}

    def look(self, step: int, model: torch.nn.Module, writes: bool) -> None:
        """After `step`. `writes`: whether it is this rank's to write down."""
        value = hash_of(model)
        if self._record and writes:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{step} {value}\n")
        if not self._record and self.known.get(step) != value:
            raise AssertionError(f"wrong bits: the weights of rank {self._rank} after step {step} are not those of the fault-free run")


def resume(folder: Path, model: torch.nn.Module, load: Callable[[Path], Any]) -> int:
    """The step from which it goes on: that of the newest checkpoint that can be loaded."""
    saved = [(json.loads(file.read_text())["step"], file.parent) for name in STATES if (file := folder / name / "manifest.json").exists()]
    for _, place in sorted(saved, reverse=True):
        before, began = hash_of(model), time.time()
        try:
            return int(load(place).extras["next"])
        except CheckpointError as error:
            assert hash_of(model) == before, "wrong bits: a checkpoint that was refused has changed the model"
            print(f"passed over after {time.time() - began:.3f} s: {error}", flush=True)
    return 0


class Watch:
    """Memory, threads and open files of this process, and what grows of them."""

    def __init__(self, leak: bool) -> None:
        self._leak, self._left, self._files, self._first = leak, [], [], None  # type: ignore[var-annotated]

    def look(self) -> dict[str, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return {"KiB": int(lines["VmRSS"].split()[0]), "threads": int(lines["Threads"]), "files": len(os.listdir("/proc/self/fd"))}

    def step(self, taken: int) -> None:
        if taken == 10:
            self._first = self.look()
        if self._leak:
            self._left.append(bytearray(os.urandom(2**20)))
            self._files.append(os.dup(0))
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()

    def grown(self) -> dict[str, int]:
        now = self.look()
        return {} if self._first is None else {what: now[what] - self._first[what] for what in now}


def synchronous(plan: Plan) -> None:
    hvd.init()
    rank, folder, model = hvd.rank(), Path(plan.folder), model_of()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ratio = {"ratio": 2, "dense_below": 0, "dense_1d": False}  # so that three ranks cut the all-reduce in halves
    compression = Compression.random_block(**ratio) if plan.backend == "all_reduce" else Compression.double_squeeze()
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression)
    trace, watch, fault = Trace(plan, rank), Watch(plan.leak), Fault(plan)
    first = resume(folder, model, lambda place: load_checkpoint(place, model, optimizer, optimizer.compression))
    if plan.fault and rank == plan.victim:
        plant(fault, model)
    for step in range(first, plan.steps):
        if plan.fault and rank == plan.victim and step == plan.at:
            fault.arm()
        optimizer.zero_grad()
        backward(model, step, rank)
        optimizer.step()
        trace.look(step, model, rank == 0)
        watch.step(step - first)
        if (step + 1) % plan.every == 0:
            place = folder / STATES[(step + 1) // plan.every % 2]
            save_checkpoint(place, model, optimizer, optimizer.compression, extras={"next": step + 1}, overwrite=True)
    if plan.watch:
        print(f"grown on rank {rank}: {json.dumps(watch.grown())}", flush=True)
    print(f"rank {rank} went from step {first} to {plan.steps}", flush=True)
    hvd.shutdown()


def asynchronous(plan: Plan) -> None:
    hvd.init(servers=1)
    rank, size, folder, model = hvd.rank(), hvd.size(), Path(plan.folder), model_of()
    fault, serves = Fault(plan), hvd.is_serving()
    mine = bool(plan.fault) and rank + (size_of_job() - 1) * serves == plan.victim
    if mine:
        plant(fault, model)
        if serves:  # it knows nothing of steps, and is told by a file
            threading.Thread(target=arm_when_told, args=(fault, folder), daemon=True).start()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.AsyncDistributedOptimizer(sgd, model.named_parameters(), Compression.double_squeeze(), tau_max=99)
    trace = Trace(plan, rank)
    first = resume(folder, model, lambda place: optimizer.load(place, model))

    def train(step: int) -> None:
        optimizer.zero_grad()
        backward(model, step, rank)
        optimizer.step()

    for step in range(first, plan.steps):
        if step == plan.at:
            free(plan, optimizer, model, train, fault, mine, step)
            break
        if step % size == rank:
            train(step)
            trace.look(step, model, True)
        hvd.barrier()
        if (step + 1) % plan.every == 0:
            optimizer.save(folder / STATES[(step + 1) // plan.every % 2], model, extras={"next": step + 1}, overwrite=True)
    optimizer.finish()
    said = hvd.allgather_object(hash_of(model))
    assert len(set(said)) == 1, f"wrong bits: workers end with different weights: {said}"
    print(f"rank {rank} went from step {first} to {plan.steps}", flush=True)
    hvd.shutdown()


def free(plan: Plan, optimizer: Any, model: torch.nn.Module, train: Callable[[int], None], fault: Fault, mine: bool, step: int) -> None:
    """All at once, and the fault among it, in its third step; with a moment in a checkpoint, that is saved then. Where the others outlive the fault,
    it is saved aside: whoever trains later goes on from what can be compared."""
    aside = Path(plan.folder) / "free" / STATES[0]
    place = aside if os.environ.get("MPI_BACKEND_ON_FAILURE") == "shrink" else Path(plan.folder) / STATES[0]
    for turn in range(FREE):
        if turn == 2:
            now = Path(plan.folder) / NOW
            if mine:
                fault.arm()
            elif plan.victim == size_of_job() - 1 and hvd.rank() == 0:
                now.touch()
            if plan.moment in ("part", "manifest"):
                hvd.barrier()
                while now.exists():
                    time.sleep(0.01)
                optimizer.save(place, model, extras={}, overwrite=True)
        train(step + turn)


def arm_when_told(fault: Fault, folder: Path) -> None:
    while not (folder / NOW).exists():
        time.sleep(0.005)
    fault.arm()
    (folder / NOW).unlink()


def size_of_job() -> int:
    """With those that serve."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_size()


def main() -> None:
    torch.set_num_threads(1)
    plan = Plan(**json.loads(sys.argv[1]))
    try:
        asynchronous(plan) if plan.backend == "asynchronous" else synchronous(plan)
    except Exception:  # as Python does, also where the tests' runner has taken its place
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)


if __name__ == "__main__":
    main()
