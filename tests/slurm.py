"""A small Slurm on this machine: a controller and two nodes, node0 and node1, from Debian's packages, unpacked in a folder of the tests.

Nothing is installed: the packages are downloaded by name and removed with the folder. It needs root, as Slurm's daemons start jobs for users.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

__all__ = ["Slurm", "free_ports", "slurm"]

PACKAGES = "slurm-wlm slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15 liblua5.1-0".split()  # noqa: SIM905
PACKAGES += ["libpmix2", "libevent-core-2.1-7", "libevent-pthreads-2.1-7"]  # for srun --mpi=pmix
_LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
_PMIX = b"/usr/lib/x86_64-linux-gnu/pmix2/lib\0"  # where Slurm's plugin looks for libpmix.so: it is compiled in
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
ReturnToService=2
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=node0,node1 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 180, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(command, env=self.environment | (env or {}), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def state(self, job: str) -> str:
        return next(word[9:] for word in self.run("scontrol", "show", "job", job).split() if word.startswith("JobState="))

    def wait(self, job: str, log: Path, timeout: float, end: str = "COMPLETED") -> str:
        """What the job printed, when it has ended: well, or in another state that is expected."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"job {job} is {state} after {timeout:g} s: {text(log)}"
            time.sleep(0.5)
        assert state == end, f"job {job}: {state}, {end} was expected: {text(log)}"
        return text(log)

    def logs(self) -> str:
        return "".join(f"\n{file.name}: {text(file)[-2000:]}" for file in sorted(self.folder.glob("*.log")))


def text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


@contextlib.contextmanager
def slurm(folder: Path, environment: dict[str, str]) -> Iterator[Slurm]:
    """Skips the test, and says why, where it cannot run. At the end no process is left; the folder is the caller's."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None or os.uname().machine != "x86_64":
        pytest.skip("Slurm is taken from Debian's packages for x86_64, by apt-get and dpkg-deb")
    root = folder / "root"
    _unpack(folder / "packages", root)
    _place_pmix(folder / "pmix", root)
    for node in ("node0", "node1"):  # of their own: in a common one the two, which are one machine here, would make the same files
        (folder / f"tmp-{node}").mkdir()
    libraries, plugins = root / _LIBRARIES, root / _LIBRARIES / "slurm-wlm"
    ports = free_ports(3)
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(host=os.uname().nodename.split(".")[0], folder=folder, ports=ports, plugins=plugins))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    folder.chmod(0o700)
    environment = environment | {
        "PATH": f"{root}/usr/bin:{environment['PATH']}",
        "LD_LIBRARY_PATH": f"{libraries}:{plugins}",
        "SLURM_CONF": str(configuration),
    }
    cluster = Slurm(folder, environment)
    sbin = root / "usr/sbin"
    munged = [
        f"{sbin}/munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
    ]  # fmt: skip
    daemons = [munged, [f"{sbin}/slurmctld-wlm", "-D", "-c", "-f", str(configuration)]]
    daemons += [[f"{sbin}/slurmd-wlm", "-D", "-N", n, "-f", str(configuration), "-d", f"{sbin}/slurmstepd-wlm"] for n in ("node0", "node1")]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            running.append(subprocess.Popen(daemon, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(0.5)
            deadline = time.monotonic() + 60
            while not (folder / "munge.socket").exists():  # the others need it when they start
                assert time.monotonic() < deadline, f"munged did not start: {cluster.logs()}"
                time.sleep(0.1)
        deadline = time.monotonic() + 180
        while subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True).stdout.strip() != "2":
            assert time.monotonic() < deadline, f"Slurm did not start: {cluster.logs()}"
            time.sleep(0.5)
        yield cluster
    finally:
        subprocess.run(["scancel", "--state=PENDING,RUNNING", "--user=root"], env=environment, capture_output=True, timeout=60)
        time.sleep(1)
        for process in [*reversed(running), *_processes(configuration)]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + 30
        while (left := _processes(configuration)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, 60)  # killed is not gone yet
        for started in running:
            started.kill()
            started.wait(60)
        assert not _processes(configuration), "processes of Slurm or its jobs cannot be ended"


def free_ports(n: int) -> list[int]:
    """Below those that systems give to connections by themselves: others might get one of these before it is used."""
    found: list[int] = []
    for port in random.sample(range(15000, 30000), 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found[:n]


def _processes(configuration: Path) -> list[psutil.Process]:
    """The daemons and everything they started, known by their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("SLURM_CONF") == str(configuration) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _unpack(packages: Path, root: Path) -> None:
    """Download the packages, within two minutes and a second try, and unpack them."""
    packages.mkdir()
    for attempt in range(2):
        try:
            if attempt:
                subprocess.run(["apt-get", "update", "-q"], capture_output=True, timeout=60)
            got = subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=packages, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            continue
        if got.returncode == 0:
            break
    else:
        pytest.skip("Debian's Slurm packages cannot be downloaded: no network, another system, or another release")
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True, timeout=60)


def _place_pmix(place: Path, root: Path) -> None:
    """Put PMIx's library where Slurm's plugin finds it, and away from where MPIs do, which bring their own."""
    libraries = root / _LIBRARIES
    plugin = libraries / "slurm-wlm" / "mpi_pmix.so"
    compiled = plugin.read_bytes()
    moved = bytes(place) + b"\0"
    assert compiled.count(_PMIX) == 1 and len(moved) <= len(_PMIX), f"{plugin} does not name {_PMIX!r} once, or {place} is longer"
    plugin.resolve().write_bytes(compiled.replace(_PMIX, moved.ljust(len(_PMIX), b"\0")))
    (libraries / "pmix2" / "lib").rename(place)
    (place / "libpmix.so").symlink_to("libpmix.so.2")
    for link in libraries.glob("libpmix.so*"):
        link.unlink()
