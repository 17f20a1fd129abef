"""Two machines and a network cable between them, on this one: network namespaces, which need root. For tests in which the cable is cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["TwoHosts", "two_hosts"]

# What Open MPI starts its daemons with, in place of ssh. A name of its own tells it that the other side is another machine.
_AGENT = """#!/bin/sh
while case $1 in -*) true ;; *) false ;; esac; do shift; done
host=$1; shift
exec ip netns exec {prefix}$host unshare -u sh -c "hostname $host; $*"
"""


@dataclass(frozen=True)
class TwoHosts:
    """host-a (10.77.0.1) and host-b (10.77.0.2)."""

    prefix: str
    agent: Path
    network: str = "10.77.0.0/24"

    def on_host_a(self, command: str) -> list[str]:
        """What runs `command` there."""
        return ["ip", "netns", "exec", f"{self.prefix}host-a", "unshare", "-u", "sh", "-c", f"hostname host-a; exec {command}"]

    def cut(self) -> None:
        _ip("-n", f"{self.prefix}host-a", "link", "set", "cable", "down")

    def processes(self) -> list[int]:
        """Everything that runs on either host."""
        return [int(pid) for host in ("host-a", "host-b") for pid in _ip("netns", "pids", f"{self.prefix}{host}").split()]


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Skips the test where namespaces are not to be had. At the end no process, no namespace and no cable is left."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, and the commands ip and unshare")
    prefix = f"t{uuid.uuid4().hex[:6]}-"
    agent = folder / "agent"
    agent.write_text(_AGENT.format(prefix=prefix), encoding="utf-8")
    agent.chmod(0o755)
    hosts = TwoHosts(prefix, agent)
    names = [f"{prefix}host-a", f"{prefix}host-b"]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        for i, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "cable", "up")
        yield hosts
    finally:
        there = [name for name in names if name in _ip("netns", "list")]
        if len(there) == 2:
            deadline = time.monotonic() + 30
            while (left := hosts.processes()) and time.monotonic() < deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
        for name in there:
            _ip("netns", "del", name)
        assert prefix not in _ip("netns", "list")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=120).stdout
