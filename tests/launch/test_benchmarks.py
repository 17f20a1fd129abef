"""The benchmarks run, and emulated hosts leave nothing behind. How fast anything is, is not looked at: other tests run beside these."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
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
    return subprocess.run([str(NETLAB), *arguments], env=rank_environment({"NETLAB": name}), stdout=pipe, stderr=out, text=True, timeout=600)


def left(name: str) -> list[str]:
    """Of a lab: its namespaces and their files, and what runs in them or was started for it."""
    spaces = [line for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines() if name in line]
    spaces += [str(file) for file in Path("/etc/netns").glob(f"{name}-*")]
    return spaces + [" ".join(p.info["cmdline"]) for p in psutil.process_iter(["cmdline"]) if any(name in word for word in p.info["cmdline"] or [])]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 180
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
    """And stock Horovod's over gloo, where there is Horovod."""
    rows, stock = ["compute alone", "DDP dense", "ours none", "ours random_block(64)"], list[str]()
    if importlib.util.find_spec("horovod") is not None:
        rows, stock = [*rows, "Horovod random_block(64)"], ["--horovod", "gloo"]
    arguments = ("--short", *stock, "--rows", *rows, "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.svg"))
    printed = mpirun(2, REPO / "benchmarks" / "step_time.py", *arguments)
    assert all(row in printed for row in rows), printed
    check_tables(tmp_path / "s.json", *rows)
    (table,) = json.loads((tmp_path / "s.json").read_text())["tables"].values()
    by_name = {row["name"]: row for row in table}
    assert by_name["ours none"]["aim"] == by_name["DDP dense"]["median"] and by_name["DDP dense"]["aim"] is None
    ours = by_name["ours random_block(64)"]
    assert ours["kernels"] >= 0 and ours["aim"] == pytest.approx(1.2 * (by_name["compute alone"]["median"] + ours["kernels"]))
    assert all(by_name[row]["aim"] == pytest.approx(1.4 * ours["median"]) for row in rows if row.startswith("Horovod"))
    assert (tmp_path / "s.svg").stat().st_size > 1000


def test_predictions_beside_measured_steps(tmp_path: Path) -> None:
    arguments = ("--short", "--methods", "none", "top_k(100)", "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.svg"))
    assert "within 25 %" in mpirun(2, REPO / "benchmarks" / "predictions.py", *arguments)
    check_tables(tmp_path / "p.json", "none", "top_k(100)")
    assert set(json.loads((tmp_path / "p.json").read_text())["predicted"]) == {"none", "top_k(100)"}


def test_scaling_is_measured_and_a_model_fitted(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.json" for n in (2, 3)]
    for n, file in zip((2, 3), files, strict=True):
        mpirun(n, REPO / "benchmarks" / "scaling.py", "measure", "--short", "--json", str(file))
        check_tables(file, "ours")
    # The control: times that a link of 1 Gbit/s would take are found again, and drawn on to 1 024 hosts.
    for n, file in zip((2, 3), files, strict=True):
        found = json.loads(file.read_text())
        for heading, rows in found["tables"].items():
            rows[0]["median"] = 1e-4 * (n - 1) + 2 * (n - 1) / n * float(heading.split()[2]) * 8e-9
        file.write_text(json.dumps(found))
    fit = [sys.executable, str(REPO / "benchmarks" / "scaling.py"), "fit", *map(str, files)]
    done = subprocess.run([*fit, "--json", str(tmp_path / "fit.json"), "--plot", str(tmp_path / "fit.svg")], capture_output=True, text=True)
    assert done.returncode == 0 and "1000 Mbit/s" in done.stdout, done.stdout + done.stderr
    fitted = json.loads((tmp_path / "fit.json").read_text())
    assert fitted["model"]["seconds per host"] == pytest.approx(1e-4) and fitted["hosts"][-1] == 1024
    assert (tmp_path / "fit.svg").stat().st_size > 1000
    one = subprocess.run(fit[:-1], capture_output=True, text=True)
    assert one.returncode != 0 and "a fit needs two at least" in one.stderr, one.stderr


def test_time_to_accuracy_and_what_misses_it(lab: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "benchmarks" / "time_to_accuracy.py"), "--short", "--problems", "digits"]
    command += ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.svg"), "--curves", str(tmp_path / "curves.json")]
    done = subprocess.run(command, env=rank_environment({"NETLAB": lab}), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and (tmp_path / "t.svg").stat().st_size > 1000, done.stdout + done.stderr
    found = json.loads((tmp_path / "t.json").read_text())["digits"]
    cell = found["pressures"]["3.0"]
    step = statistics.median(cell["steps"]["seconds"]["none"])
    assert cell["seconds"]["loss"]["none"] == pytest.approx(found["reached"]["loss"]["none"][0] * step), "steps × time of a step"
    assert cell["seconds"]["loss"]["top_k(100)"] is None and "| top_k(100) | missed |" in done.stdout, "20 steps are too few for a hundredth"
    assert cell["steps"]["auto"]["chose"] in ("none", "fp16", "power_sgd(2)")


def test_a_delay_is_kept_and_the_rate_too(lab: str) -> None:
    if not Path("/dev/net/tun").exists() or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("a delay needs TUN/TAP and a C++ compiler")
    code = (
        "import os, time, numpy as np; from mpi4py import MPI; c = MPI.COMM_WORLD; took = {}\n"
        "for n in (1,) * 20 + (500000,) * 3:\n"
        "    here, there = np.zeros(n), np.zeros(n); c.Barrier(); begin = time.perf_counter()\n"
        "    c.Send(here, 1 - c.rank) if c.rank == 0 else c.Recv(there, 0)\n"
        "    c.Recv(there[:1], 1) if c.rank == 0 else c.Send(here[:1], 0)\n"
        "    took[n] = min(took.get(n, 9), time.perf_counter() - begin)\n"
        "print('took', *took.values(), os.environ['NETLAB_DELAY']) if c.rank == 0 else None"
    )
    done = netlab(lab, "with", "2", "100mbit", "--delay", "30", "python", "-c", code)
    assert done.returncode == 0, done.stdout
    there_and_back, much, told = map(float, done.stdout.split("took ")[1].split()[:3])
    assert told == 30
    assert 0.055 < there_and_back < 0.3, "a message there and one back take twice the delay, and not much more"
    assert much > 0.32 + 0.055, "4 MB take what the rate allows, and the delays"


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "the delay is 'long'; expected milliseconds"), ({"CXX": "no-such-compiler"}, "needs a C++ compiler, and there is no 'no-such-compiler'")],
)
def test_a_delay_that_cannot_be_had_is_named(lab: str, environment: dict[str, str], message: str) -> None:
    environment = rank_environment({"NETLAB": lab, **environment})
    delay = "10" if "CXX" in environment else "long"
    done = subprocess.run([str(NETLAB), "up", "2", "1gbit", "--delay", delay], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and message in done.stderr and not left(lab), done.stderr


def test_a_machine_without_tun_is_named(lab: str) -> None:
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$0" "$@"', str(NETLAB), "up", "2", "1gbit"]
    if not Path("/dev/net").is_dir() or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("a delay needs TUN/TAP and a C++ compiler")
    arguments: list[str]
    for arguments, refused in (["--delay", "10"], True), ([], False):  # the control: without a delay nobody needs it
        done = subprocess.run([*hidden, *arguments], env=rank_environment({"NETLAB": lab}), capture_output=True, text=True, timeout=600)
        assert ("this machine has no /dev/net/tun: load the module 'tun'" in done.stderr) == refused == (done.returncode != 0), done.stderr
        assert not refused or not left(lab)
    assert netlab(lab, "down").returncode == 0


def test_hosts_are_refused_twice_and_taken_away_after_ctrl_c_and_a_killed_launcher(lab: str, tmp_path: Path) -> None:
    assert netlab(lab, "up", "2", "1gbit").returncode == 0
    again = netlab(lab, "up", "2", "1gbit")
    assert again.returncode != 0 and f"{lab}-host-0" in again.stdout and "are there already; 'netlab.sh down' takes them away" in again.stdout
    # Open MPI's daemons wait for ever, now and then, where all processes ended while they were being started; a training job takes longer.
    hello = "hostname; getent hosts host-1; sleep 1"
    said = netlab(lab, "run", "sh", "-c", hello).stdout.splitlines()  # and it warns of races of its own
    assert sorted(line for line in said if line.startswith("host-")) == ["host-0", "host-1"], said
    assert [line.split() for line in said].count(["10.78.0.2", "host-1"]) == 2, said
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
        assert job.wait(180) != 0
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


def test_the_hosts_control_congestion_alike_whatever_the_machine_does(lab: str) -> None:
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    if "reno" not in allowed:
        pytest.skip("this machine does not allow reno")
    assert netlab(lab, "up", "1", "1gbit").returncode == 0
    inside = ["ip", "netns", "exec", f"{lab}-host-0", "cat", "/proc/sys/net/ipv4/tcp_congestion_control"]
    said = subprocess.run(inside, capture_output=True, text=True, timeout=600)
    assert said.stdout.strip() == "reno"
    assert netlab(lab, "down").returncode == 0
    command = [str(NETLAB), "up", "1", "1gbit"]
    done = subprocess.run(command, env=rank_environment({"NETLAB": lab, "NETLAB_CONGESTION": "none"}), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "the congestion control 'none' is not to be had; allowed are: " in done.stderr and not left(lab), done.stderr


def test_without_root_it_says_so() -> None:
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-s", "up", "2", "1gbit"]
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is missing")
    else:
        command = ["bash", "-s", "up", "2", "1gbit"]
    done = subprocess.run(command, input=NETLAB.read_text(), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "need root" in done.stderr, done.stderr


def test_a_slow_worker_on_real_ranks(tmp_path: Path) -> None:
    """One training of `benchmarks/stragglers.py`, the cutoff's; and verdicts that follow its numbers, with controls."""
    pytest.importorskip("sklearn")
    output = mpirun(4, "benchmarks/stragglers.py", "--short", "--mode", "cutoff")
    (line,) = [line for line in output.splitlines() if "result " in line]
    found = json.loads(line.split("result ", 1)[1])
    assert found["steps"] >= 20 and len(found["turns"]) == 4 and found["loss_at"][0][2] == pytest.approx(2.3, abs=0.1)
    sys.path.insert(0, str(REPO / "benchmarks"))
    try:
        import stragglers
    finally:
        sys.path.pop(0)

    def verdicts(cut: float = 0.033, loss: float = 0.2, until: float = 5.0, served: float = 6.0, alike: float = 0.031) -> list[bool]:
        made = {row: {"step": 0.03, "loss": 0.2, "until": 5.0} for row in (stragglers.row_of(*pair) for pair in stragglers.ROWS)}
        made["synchronous, one 5x slower"] |= {"step": 0.15, "until": 25.0}
        made["cutoff, one 5x slower"] |= {"step": cut, "loss": loss, "until": until}
        made["cutoff, all alike"]["step"] = alike
        made["asynchronous, one 5x slower"]["until"] = served
        spreads = {row: {name: stragglers.Spread((v - 0.001, v + 0.001)) for name, v in f.items()} for row, f in made.items()}
        return [claim.agrees for claim in stragglers.claims(spreads)]

    assert all(verdicts())
    for i, change in enumerate(({"cut": 0.04}, {"loss": 0.21}, {"until": 20.0}, {"served": 20.0}, {"alike": 0.035})):
        assert [n for n, agrees in enumerate(verdicts(**change)) if not agrees] == [i], change
    assert stragglers.seconds_until([(1.0, 1, 2.0), (2.0, 2, 0.5)], 0.6) == 2.0
