"""The last rank fails, in the way that the first argument says, while the others wait for it, in what the second argument says: `function`, one of
the package's collectives, `join`, or `step`, an optimizer's; when, is written to the file of the third. With `slow` it is only very late, with
`handled` it has its own way with Ctrl-C; `work` goes on until something outside ends it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from mpi4py import MPI

import mpi_backend as hvd
from mpi_backend.engine import channel, flights

how, where = sys.argv[1:3]
hvd.init()
last = hvd.rank() == hvd.size() - 1
model = torch.nn.Linear(4, 4)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())


def collective() -> None:
    if where == "function":
        hvd.allreduce(torch.ones(3), name="awaited")
    elif where == "join":
        hvd.join()
    else:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()


def kill_my_watchdog() -> None:
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    (line,) = (line for line in children.splitlines() if "heartbeat.py" in line)
    os.kill(int(line.split()[0]), signal.SIGKILL)


collective()
hvd.barrier()
if how == "work":
    print(f"works on {os.uname().nodename}", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        collective()
        time.sleep(0.01)
if how == "slow":
    long = 2 * int(os.environ["MPI_BACKEND_WATCHDOG_TIMEOUT"])
    if last:
        kill_my_watchdog()
        time.sleep(long)
    collective()
    if last:
        ctypes.PyDLL(None).usleep(long * 1_000_000)  # with the interpreter lock held: no Python thread of this rank runs
    collective()
    if last:  # as in a debugger
        subprocess.Popen(["sh", "-c", f"sleep {long}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    collective()
    hvd.shutdown()
    print("well", flush=True)
    sys.exit()
if how == "handled":
    signal.signal(signal.SIGINT, lambda *given: print("handled", flush=True))
    if last:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(2)
    collective()
    hvd.shutdown()
    sys.exit()
if last:
    time.sleep(0.5)  # the others are waiting by now
    if how == "interrupt":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    Path(sys.argv[3]).write_text(f"{time.time()}")  # not printed: a launcher that is ended may not hand it on
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "raise":
        raise RuntimeError("on purpose")
    elif how == "exit":
        sys.exit(3)
    elif how == "early":
        sys.exit()
    elif how == "finalize":
        MPI.Finalize()
        sys.exit()
    elif how == "caught":

        def fail(self: object, run: object) -> None:
            raise MemoryError("on purpose")

        channel.Channel._run = fail  # type: ignore[assignment,method-assign]
        with contextlib.suppress(hvd.HorovodInternalError):
            collective()
        sys.exit()
    elif how in ("start", "landing"):  # out of memory, say, when the data is about to leave, or has arrived

        def out_of_memory(*given: object) -> None:
            raise MemoryError("on purpose")

        setattr(flights, "scale_" if how == "start" else "finish_", out_of_memory)
        collective()
    elif how == "stall":
        pass  # and never comes
    elif how == "ctrl-c":
        os.kill(os.getppid(), signal.SIGINT)  # mpirun's
    elif where == "step":  # within MPI, where Python does not see the signal: the others do not take part
        collective()
    time.sleep(60)
if how == "interrupt":
    time.sleep(60)
if how == "landing":  # the data of this one has arrived here
    collective()
collective()
print(f"rank {hvd.rank()} got through", flush=True)
