"""Ranks are killed, and the others go on without leaving their processes; program_ulfm.py says what is compared."""

from __future__ import annotations

import pytest

from tests.ranks import REPO, require_mpirun, run_job

PROGRAM = REPO / "tests" / "mpi" / "program_ulfm.py"
SHRINK = {"MPI_BACKEND_ON_FAILURE": "shrink"}


def job(n: int, program: str, *args: str, ulfm: bool = True, env: dict[str, str] | None = None, fails: bool = False) -> str:
    """What the ranks printed; status 0 is expected unless it `fails`, though some were killed."""
    require_mpirun()
    launcher = ["mpirun", *(["--with-ft", "ulfm"] if ulfm else []), "-n", str(n)]
    return run_job(launcher, program, args, env=SHRINK | (env or {}), expect_failure=fails)


@pytest.mark.parametrize(
    ("n", "methods", "deaths"),
    [
        # The first server of all pieces dies, too, and with it the only central one.
        (
            4,
            "none,summed,random_block,double_squeeze,central,local_momentum,power_sgd",
            ("2:1:double_squeeze:pull", "0:3:central:push", "3:6:none:end"),
        ),
        (3, "none,top_k,qsgd,double_squeeze", ("1:1:none:forward", "2:3:top_k:gather")),
        (3, "none,random_block,double_squeeze", ("2:1:none:named", "0:3:random_block:reduce")),
    ],
)
def test_those_that_live_train_on_from_the_last_finished_step(n: int, methods: str, deaths: tuple[str, ...]) -> None:
    output = job(n, str(PROGRAM), methods, *deaths)
    assert f": {', '.join(deaths)}\n" in output, output
    ended = sum(death.endswith(":end") for death in deaths)
    assert output.count("is gone. The job goes on with") == len(deaths) - ended, output
    assert output.count("another rank has died while all shut down") == ended, output


LOOKS = """
import os
import signal
import sys
import time
import numpy as np
from mpi4py import MPI
from mpi_backend.transport import look_on

comm = MPI.COMM_WORLD.Dup()
if comm.Get_rank():
    os.kill(os.getpid(), signal.SIGKILL)
request = comm.Isend(np.zeros(100_000), 1)  # it asks first, and nobody answers
look = MPI.Request.Testsome if sys.argv[1] == "by MPI" else look_on(comm)
while True:
    try:
        assert not look([request])
    except MPI.Exception as error:
        assert error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_IN_STATUS), error
        break
    time.sleep(0.001)
print("is freed" if request == MPI.REQUEST_NULL else "is there", flush=True)
os._exit(0)
"""


def test_no_request_is_freed_before_it_is_complete() -> None:
    """When it is complete after that, Open MPI ends the process. That happens once in hundreds of deaths, so the request itself is looked at."""
    assert "is there" in job(2, LOOKS, "as here")
    assert "is freed" in job(2, LOOKS, "by MPI")


ALONE = """
import contextlib
import threading
from mpi4py import MPI
from mpi_backend.transport import agree, look_on, lost

class Begins:
    def Iagree(self, flag):
        begins.set()
        self.together = looked.wait(patience)
        return MPI.COMM_WORLD.Iagree(flag)

class Asked:
    def Get_status(self):
        looked.set()
        return False

def look_when_it_begins():
    begins.wait()
    look_on(MPI.COMM_WORLD)([Asked()])

for lock, patience in ((lost.one_by_one, 0.5), (contextlib.nullcontext(), 60)):
    lost.one_by_one, begins, looked, comm = lock, threading.Event(), threading.Event(), Begins()
    other = threading.Thread(target=look_when_it_begins)
    other.start()
    assert agree(comm, True)
    other.join()
    print("together" if comm.together else "one by one", flush=True)
"""


def test_nobody_looks_while_an_agreement_begins() -> None:
    """What Open MPI does to a message that comes then shows once in ten thousand agreements. The control is the second line."""
    assert job(1, ALONE).split("\n")[:2] == ["one by one", "together"]


REFUSED = """
import re
import torch
import mpi_backend as hvd
from hvd_ecsgd import Compression, CompressionError

def refused(kind, message, call):
    try:
        call()
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(message)

hvd.init()
model = torch.nn.Linear(4, 4)
def optimizer(method):
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), method)
for method in (Compression.detached(), Compression.comp_skip(), Compression.cser(), Compression.butterfly()):
    refused(CompressionError, "shrink: this method cannot go on without a worker that dies", lambda: optimizer(method))
for call in (hvd.join, lambda: hvd.add_process_set([0]), lambda: hvd.CutoffDistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))):
    refused(ValueError, "cannot be had with MPI_BACKEND_ON_FAILURE=shrink", call)
# An exception is no death: it would meet the others, too.
own = optimizer(Compression.none)
model(torch.ones(1, 4)).sum().backward()
if hvd.rank() == 1:
    raise RuntimeError("on purpose")
own.step()
print("got through")
"""


def test_what_cannot_go_on_is_refused_and_an_exception_ends_the_job() -> None:
    output = job(2, REFUSED, fails=True)
    assert "on purpose" in output and "AssertionError" not in output and "got through" not in output, output


@pytest.mark.parametrize(
    ("ulfm", "env", "message"),
    [
        (False, {}, r"MPI_BACKEND_ON_FAILURE=shrink: this job of Open MPI v\S+ was not started for it"),
        (True, {"MPI_BACKEND_ON_FAILURE": "go on"}, r"MPI_BACKEND_ON_FAILURE is 'go on'; expected end or shrink"),
        (True, {"MPI_BACKEND_THREAD": "0"}, r"shrink: it needs the communication thread"),
    ],
)
def test_a_job_that_could_not_shrink_does_not_begin(ulfm: bool, env: dict[str, str], message: str) -> None:
    program = f"""
import re
import mpi_backend as hvd
try:
    hvd.init()
except ValueError as error:
    assert re.search({message!r}, str(error)), error
else:
    raise AssertionError("it began")
"""
    job(2, program, ulfm=ulfm, env=env)
