"""The benchmarks run, and emulated hosts leave nothing behind. How fast anything is, is not looked at: other tests run beside these."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.ranks import REPO, mpirun, rank_environment, require_mpirun

NETLAB = REPO / "benchmarks" / "netlab.sh"


@pytest.fixture
def lab() -> Iterator[str]:
    """The name of a lab of its own; after the test there is none."""
    require_mpirun()
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("ip", "tc", "unshare")):
        pytest.skip("emulated hosts need root, and the commands ip, tc and unshare")
    name = f"t{uuid.uuid4().hex[:6]}"
    probe = netlab(name, "up", "1", "1mbit")
    down = netlab(name, "down")
    if probe.returncode != 0:
        pytest.skip(f"network namespaces are not permitted here: {probe.stdout}")
    assert down.returncode == 0 and not left(name)
    yield name
    there = left(name)
    netlab(name, "down")
    assert not there and not left(name)


def netlab(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    pipe, out = subprocess.PIPE, subprocess.STDOUT
    return subprocess.run([str(NETLAB), *arguments], env=rank_environment({"NETLAB": name}), stdout=pipe, stderr=out, text=True, timeout=120)


def left(name: str) -> list[str]:
    """Of a lab: its namespaces, and what runs in them or was started for it."""
    spaces = [line for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines() if name in line]
    return spaces + [" ".join(p.info["cmdline"]) for p in psutil.process_iter(["cmdline"]) if any(name in word for word in p.info["cmdline"] or [])]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def check_tables(file: Path, *names: str) -> None:
    rows = [row for table in json.loads(file.read_text())["tables"].values() for row in table]
    assert {row["name"] for row in rows} >= set(names) and all(row["median"] > 0 for row in rows), rows


def test_collectives_on_emulated_hosts(lab: str, tmp_path: Path) -> None:
    short = ("python", "benchmarks/collectives.py", "--short", "--algorithms", "direct")
    done = netlab(lab, "with", "2", "100mbit", *short, "--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.svg"))
    assert done.returncode == 0, done.stdout
    check_tables(tmp_path / "c.json", "ours", "ours direct", "MPI, non-blocking", "MPI, blocking", "gloo")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["rate"] == 100e6 and found["size"] == 2
    (row,) = (row for row in found["tables"]["all-reduce of 1e+06 bytes"] if row["name"] == "ours")
    assert row["limit"] == pytest.approx(0.08) and row["median"] > 0.8 * row["limit"], "the link is as slow as it was asked to be"
    assert (tmp_path / "c.svg").stat().st_size > 1000


def test_steps_on_ranks_of_one_host(tmp_path: Path) -> None:
    rows = ("compute alone", "DDP dense", "ours none", "ours random_block(64)")
    arguments = ("--short", "--rows", *rows, "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.svg"))
    printed = mpirun(2, REPO / "benchmarks" / "step_time.py", *arguments)
    assert all(row in printed for row in rows), printed
    check_tables(tmp_path / "s.json", *rows)
    assert (tmp_path / "s.svg").stat().st_size > 1000


def test_predictions_beside_measured_steps(tmp_path: Path) -> None:
    arguments = ("--short", "--methods", "none", "top_k(100)", "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.svg"))
    assert "within 25 %" in mpirun(2, REPO / "benchmarks" / "predictions.py", *arguments)
    check_tables(tmp_path / "p.json", "none", "top_k(100)")
    assert set(json.loads((tmp_path / "p.json").read_text())["predicted"]) == {"none", "top_k(100)"}


def test_hosts_are_refused_twice_and_taken_away_after_ctrl_c_and_a_killed_launcher(lab: str, tmp_path: Path) -> None:
    assert netlab(lab, "up", "2", "1gbit").returncode == 0
    again = netlab(lab, "up", "2", "1gbit")
    assert again.returncode != 0 and f"{lab}-host-0" in again.stdout and "are there already; 'netlab.sh down' takes them away" in again.stdout
    assert sorted(netlab(lab, "run", "hostname").stdout.split()) == ["host-0", "host-1"]
    assert netlab(lab, "down").returncode == 0 and netlab(lab, "down").returncode == 0 and not left(lab)

    for end in ("Ctrl-C", "killed"):
        sleep = ["sh", "-c", f"touch {tmp_path}/{end}-$(hostname); exec sleep 300", lab]
        job = subprocess.Popen([str(NETLAB), "with", "2", "1gbit", *sleep], env=rank_environment({"NETLAB": lab}), start_new_session=True)
        wait_for(lambda end=end: len(list(tmp_path.glob(f"{end}-*"))) == 2, "the command runs on both hosts")  # type: ignore[misc]
        if end == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        else:
            launchers = [p for p in psutil.Process(job.pid).children(recursive=True) if "mpirun" in p.name() or "prterun" in p.name()]
            assert launchers
            launchers[0].kill()
        assert job.wait(60) != 0
        wait_for(lambda: not left(lab), f"after {end}: {left(lab)}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", "2", "fast"), "the rate 'fast' is not understood; expected for example 100mbit"),
        (("up", "none", "1gbit"), "the number of hosts is 'none'; expected 1 to 200"),
        (("run", "true"), "there are no hosts; 'netlab.sh up N RATE' makes them"),
        (("up", "2"), "benchmarks/netlab.sh up N RATE"),
    ],
)
def test_wrong_use_is_named(lab: str, arguments: tuple[str, ...], message: str) -> None:
    done = netlab(lab, *arguments)
    assert done.returncode != 0 and message in done.stdout, done.stdout


def test_without_root_it_says_so() -> None:
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-s", "up", "2", "1gbit"]
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is missing")
    else:
        command = ["bash", "-s", "up", "2", "1gbit"]
    done = subprocess.run(command, input=NETLAB.read_text(), capture_output=True, text=True, timeout=20)
    assert done.returncode != 0 and "need root" in done.stderr, done.stderr
