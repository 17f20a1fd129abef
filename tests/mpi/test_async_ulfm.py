"""Asynchronous workers are killed, and the others go on with the servers; program_async_ulfm.py says what must hold among them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.ranks import REPO, SOON, require_mpirun, run_job

PROGRAM = REPO / "tests" / "mpi" / "program_async_ulfm.py"


def job(ranks: int, servers: int, folder: Path, *deaths: str, fails: bool = False) -> str:
    """What the ranks printed; status 0 is expected unless it `fails`, though some were killed."""
    require_mpirun()
    env = {"MPI_BACKEND_ON_FAILURE": "shrink", "MPI_BACKEND_SERVERS": str(servers)}
    launcher = ["mpirun", "--with-ft", "ulfm", "-n", str(ranks)]
    return run_job(launcher, PROGRAM, (str(servers), str(folder), *deaths), env=env, expect_failure=fails, bare=fails)


@pytest.mark.parametrize(
    ("ranks", "servers", "deaths"),
    [
        (4, 1, ("1:5:forward", "0:20:pull")),
        (5, 2, ("2:3:push", "0:34:save")),
        (4, 1, ("0:9:consistent", "2:39:load", "1:40:end")),
    ],
)
def test_the_others_go_on_and_hold_the_same_x(ranks: int, servers: int, deaths: tuple[str, ...], tmp_path: Path) -> None:
    """They evaluate, save, load and finish together; each death is reported once, at once, with what is known of what is lost."""
    output = job(ranks, servers, tmp_path, *deaths)
    ended = sum(death.endswith(":end") for death in deaths)
    left = ranks - servers - len(deaths) + ended
    assert f"well: {left} of {ranks - servers} workers came to the end" in output, output
    assert output.count("a worker, has died") == len(deaths) - ended, output
    for rank, turn, moment in (death.split(":") for death in deaths):
        known = re.search(rf"rank {rank}, a worker, has died\. (\d+) of its gradients have moved x", output)
        assert moment == "end" or (known and int(turn) <= int(known[1]) <= int(turn) + 1), (rank, output)


def test_a_server_that_dies_ends_the_job_and_is_named(tmp_path: Path) -> None:
    output = job(3, 1, tmp_path, "2:0:server", fails=True)
    assert time.time() - float((tmp_path / "when2").read_text()) < SOON, output
    assert re.search(r"\brank 2\b.*(has died|ended without shutting down)", output) and "well" not in output, output


def test_a_job_without_workers_ends(tmp_path: Path) -> None:
    output = job(3, 1, tmp_path, "0:3:forward", "1:7:forward", fails=True)
    assert time.time() - float((tmp_path / "when1").read_text()) < SOON, output
    assert "all 2 workers have died; the last was rank 1" in output, output


LEAVES = """
import os, signal
import torch
import mpi_backend as hvd
from hvd_ecsgd import Compression

hvd.init()
rank, model = hvd.rank(), torch.nn.Linear(8, 3)
optimizer = hvd.AsyncDistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Compression.one_bit())
for step in range(5 if rank == 0 else 40):
    optimizer.zero_grad()
    model(torch.ones(4, 8)).square().sum().backward()
    if (rank, step) == (1, 10):
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
if rank == 2:
    errors = []
    for _ in range(2):
        try:
            hvd.barrier()
        except hvd.HorovodInternalError as error:
            errors.append(f"{type(error).__name__}: {error}")
    assert errors[0].startswith("RankLostError: a rank died") and "rank 0 shut down without it" in errors[1], errors
    print("both were told", flush=True)
"""


def test_a_worker_that_has_left_is_no_reason_to_wait_after_a_death() -> None:
    """Worker 0 ends early, worker 1 dies, and a collective of worker 2 is an error that names the one, and then the other."""
    require_mpirun()
    env = {"MPI_BACKEND_ON_FAILURE": "shrink", "MPI_BACKEND_SERVERS": "1"}
    output = run_job(["mpirun", "--with-ft", "ulfm", "-n", "4"], LEAVES, env=env)
    assert "both were told" in output and "rank 1, a worker, has died" in output, output
