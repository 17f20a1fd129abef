"""Two machines, and the network between them fails: all ranks end soon, on both sides, although no launcher's order crosses the cut."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.hosts import TwoHosts, two_hosts
from tests.ranks import REPO, SOON, rank_environment, require_mpirun

PROGRAM = Path(__file__).parent / "program_failure.py"


def run_and_cut(hosts: TwoHosts, folder: Path, launcher: str, ended: Callable[[], bool], seconds: float, **env: str) -> tuple[float, str]:
    """Seconds from the cut to `ended`, or to giving up after `seconds`; and what was printed."""
    log = folder / "log"
    with log.open("wb") as file:
        command = hosts.on_host_a(f"{launcher} python {PROGRAM} work step")
        job = subprocess.Popen(command, cwd=REPO, env=rank_environment(env), stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        wait_for(lambda: {"works on host-a", "works on host-b"} <= set(log.read_text(errors="replace").splitlines()), 180, log)
        time.sleep(1)
        hosts.cut()
        start = time.monotonic()
        while not ended() and time.monotonic() < start + seconds:
            job.poll()
            time.sleep(0.05)
        return time.monotonic() - start, log.read_text(errors="replace")
    finally:
        for pid in hosts.processes():
            with contextlib.suppress(psutil.Error):  # it may be just ending by itself
                psutil.Process(pid).kill()
        job.wait(120)


def wait_for(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)


def running(hosts: TwoHosts, *names: str) -> list[str]:
    found = []
    for pid in hosts.processes():
        try:
            command = " ".join(psutil.Process(pid).cmdline())
        except psutil.Error:
            continue
        found += [command for name in names if name in command and "mpirun" not in command and "prterun" not in command and "prted" not in command]
    return found


@pytest.mark.parametrize("watched", [True, pytest.param(False, marks=pytest.mark.full, id="control")])
def test_all_ranks_end_when_the_network_between_them_is_cut(watched: bool, tmp_path: Path) -> None:
    require_mpirun()
    with two_hosts(tmp_path) as hosts:
        launcher = (
            f"mpirun -n 2 -H host-a:1,host-b:1 --map-by slot --prtemca plm_ssh_agent {hosts.agent} --prtemca prte_if_include {hosts.network} "
            f"--mca pml ob1 --mca btl self,sm,tcp --mca btl_tcp_if_include {hosts.network} -x PYTHONPATH -x PATH -x MPI_BACKEND_WATCHDOG"
        )
        ended = lambda: not running(hosts, "program_failure.py", "heartbeat.py")  # noqa: E731
        limit = SOON if watched else 15
        seconds, printed = run_and_cut(hosts, tmp_path, launcher, ended, limit, MPI_BACKEND_WATCHDOG=str(int(watched)))
        assert (seconds < limit) == watched, printed
        if watched:  # the other side's words cannot reach the launcher
            assert re.search(
                r"rank 0 \(process \d+ on host-a\): ending, because rank 1 \(process \d+ on host-b\) gave no sign of life for 6 seconds", printed
            ), printed


def test_nothing_is_left_of_a_job_of_the_launch_script(tmp_path: Path) -> None:
    """Neither the launcher nor its daemon on the other machine, which by themselves go on."""
    require_mpirun()
    with two_hosts(tmp_path) as hosts:
        launcher = f"launch/mpirun.sh -H host-a:1,host-b:1 -i {hosts.network} --ssh {hosts.agent} --transport tcp"
        seconds, printed = run_and_cut(hosts, tmp_path, launcher, lambda: not hosts.processes(), SOON)
        assert seconds < SOON, printed
        # By whoever is first: the watchdog, or the launcher, that finds its daemon cut off.
        lost = r"because rank [01] \(process \d+ on host-[ab]\) gave no sign of life for 6 seconds|lost communication(.|\n)*on node host-b"
        assert re.search(lost, printed), printed
