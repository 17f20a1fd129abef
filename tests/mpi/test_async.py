"""Asynchronous training on real ranks; program_async.py does it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.ranks import SOON, mpirun

PROGRAM = "tests/mpi/program_async.py"


@pytest.mark.parametrize(("ranks", "servers", "also"), [(2, 1, "resume"), (3, 1, "wrong"), (5, 2, "resize")])
def test_workers_train_and_servers_serve(ranks: int, servers: int, also: str, tmp_path: Path) -> None:
    output = mpirun(ranks, PROGRAM, str(servers), str(tmp_path), also, env={"MPI_BACKEND_SERVERS": str(servers)})
    assert "all well" in output, output


@pytest.mark.parametrize("victim", [0, 2])
def test_a_dead_worker_or_server_ends_the_job_and_is_named(victim: int, tmp_path: Path) -> None:
    """Without the launcher's help; worker 1, and the server, are left waiting."""
    when = tmp_path / "when"
    env = {"MPI_BACKEND_SERVERS": "1"}
    output = mpirun(3, PROGRAM, "1", str(tmp_path), "fail", str(victim), str(when), env=env, expect_failure=True, bare=True)
    assert time.time() - float(when.read_text()) < SOON, output
    assert re.search(rf"rank {victim} .*(ended without shutting down|signal 9)|rank {victim} (.|\n)*signal 9", output), output
