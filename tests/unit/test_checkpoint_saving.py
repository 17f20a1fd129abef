"""Saves that fail, two jobs in one directory, and what a killed job leaves behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_ecsgd import CheckpointError, Compression, DistributedOptimizer, checkpoint, load_checkpoint, save_checkpoint
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.forked import forked
from tests.unit.checkpoints import CASE, N, contents, load, part, save
from tests.unit.test_state import Setup


def test_a_save_that_fails_on_one_rank_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"

    def worker(transport: Transport) -> Any:
        setup = Setup(CASE, transport)
        setup.train(0, 2)
        save(setup, folder)
        transport.allreduce_(torch.zeros(1), "all are here").wait()
        before = contents(folder)
        setup.train(2, 3)
        with pytest.raises(CheckpointError, match=r"No space left.*\(rank 2\)"):
            save(setup, folder)
        transport.allreduce_(torch.zeros(1), "all are here").wait()
        after = contents(folder)
        transport.allreduce_(torch.zeros(1), "all are here").wait()
        monkeypatch.undo()
        save(setup, folder)
        again = Setup(CASE, transport)
        return before == after, load(again, folder).step

    written = Counter[str]()

    def sync(path: Path) -> int:
        written[path.name[-14:]] += 1
        if path.name.endswith("rank00002.tmp") and written[path.name[-14:]] == 2:
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    real = checkpoint.parts._sync
    monkeypatch.setattr(checkpoint.parts, "_sync", sync)
    assert run_simulated(N, worker) == [(True, 3)] * N


def on_a_small_disk(said: Connection, disk: Path, kind: str) -> None:
    """In a process of its own: a save onto a disk that only it sees, and one that is refused and leaves what was there. Says why it was."""
    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)], check=True)
    p, folder = torch.nn.Linear(100, 100), disk / "a"
    optimizer = DistributedOptimizer(torch.optim.SGD(p.parameters(), lr=0.1), p.named_parameters(), Compression.top_k())
    save_checkpoint(folder, p, optimizer, optimizer.compression)
    before = contents(folder)
    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(folder, p, optimizer, optimizer.compression, extras=torch.randn(200_000))
    assert before == contents(folder)
    load_checkpoint(folder, p, optimizer, optimizer.compression)
    said.send(str(refused.value))


@pytest.mark.parametrize(("kind", "message"), [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_a_full_and_a_read_only_disk(kind: str, message: str, tmp_path: Path) -> None:
    """A small file system in memory, in a mount namespace of its own. The control is the save before, which fits."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    with forked(on_a_small_disk, tmp_path, kind) as process:
        assert message in process.recv()


def test_two_jobs_in_one_directory(tmp_path: Path) -> None:
    """Whoever did not save or load what is there does not replace it, unless told to; each alone may (the control)."""

    def worker(transport: Transport) -> int:
        one, two = Setup(CASE, transport), Setup(CASE, transport)
        one.train(0, 1)
        save(one, tmp_path)
        save(one, tmp_path)
        two.train(0, 2)
        with pytest.raises(CheckpointError, match=r"a checkpoint \(step 1, 3 workers\) that this training neither saved nor loaded"):
            save(two, tmp_path)
        save(two, tmp_path, overwrite=True)
        with pytest.raises(CheckpointError, match="step 2"):
            save(one, tmp_path)
        load(one, tmp_path)
        save(one, tmp_path)
        return load(two, tmp_path).step

    assert run_simulated(N, worker) == [2] * N


def test_two_jobs_at_the_same_moment(tmp_path: Path) -> None:
    """While somebody holds the lock; a killed job holds none."""
    holder = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("job 7")
file.flush()
print("holding", flush=True)
time.sleep(600)
"""
    setup = Setup(CASE, SelfTransport())
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "saving.lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match=r"another job is saving to .* right now \(job 7\)"):
            save(setup, tmp_path)
        other.kill()
    save(setup, tmp_path)


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    setup = Setup(CASE, SelfTransport())
    for name in ("part-00-rank00000.safetensors", "part-00-rank00001.tmp", "manifest.json.00.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    save(setup, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([part(tmp_path, 0).name, "manifest.json", "notes.txt", "saving.lock"])
