"""The batch files of launch/slurm, submitted with sbatch to a real Slurm of two nodes on this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import REPO, rank_environment, require_horovod, require_mpirun
from tests.slurm import Slurm, slurm, text

BATCH = REPO / "launch" / "slurm"
EPOCHS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    require_mpirun()
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets lie below it
    environment = {k: v for k, v in rank_environment().items() if not k.startswith("SLURM_")}
    try:
        with slurm(folder, environment) as started:
            yield started
    finally:
        shutil.rmtree(folder)


def submit(cluster: Slurm, file: str, name: str, *arguments: str) -> tuple[str, Path]:
    log = cluster.folder / f"{name}.out"
    job = cluster.run("sbatch", "--parsable", f"--chdir={REPO}", f"--output={log}", str(BATCH / file), *arguments).strip()
    return job, log


def digits(cluster: Slurm, name: str, *arguments: str) -> list[str]:
    example = ["python", str(REPO / "examples" / "digits.py"), "--method", "double_squeeze", "--epochs", str(EPOCHS)]
    return [*example, "--checkpoint", str(cluster.folder / name), *arguments]


def result(printed: str) -> tuple[float, str]:
    found = re.search(r"test accuracy (\d\.\d+), .*weights ([0-9a-f]{16})", printed)
    assert found, printed
    return float(found[1]), found[2]


@pytest.mark.timeout(600)
def test_both_batch_files_train_on_two_nodes_and_requeue_resumes(cluster: Slurm) -> None:
    """A job that is requeued in the middle goes on from its last checkpoint, and ends with the weights of the Horovod job, which was not."""
    require_horovod()
    job, log = submit(cluster, "mpi.sbatch", "mpi", *digits(cluster, "mpi"))
    deadline = time.monotonic() + 150
    while "epoch 2 of" not in text(log):
        assert time.monotonic() < deadline and cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), text(log) + cluster.logs()
        time.sleep(0.1)
    cluster.run("scontrol", "requeue", job)
    assert f"epoch {EPOCHS} of" not in text(log), "it had ended before it could be requeued"
    while cluster.state(job) != "PENDING":
        assert time.monotonic() < deadline, text(log) + cluster.logs()
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes by itself
    printed = cluster.wait(job, log, 200)
    assert re.search(r"Slurm job \d+ on node\[0-1\], 2 tasks on 2 nodes, start number 1", printed), printed
    assert "start number 2" in printed, printed
    resumed = re.search(r"goes on after epoch (\d+) of", printed)
    assert resumed and 2 <= int(resumed[1]) < EPOCHS, printed
    for epoch in range(1, EPOCHS + 1):
        assert f"epoch {epoch} of {EPOCHS} saved" in printed, printed

    job, log = submit(cluster, "horovod.sbatch", "horovod", *digits(cluster, "horovod", "--backend", "horovod"))
    printed_by_horovod = cluster.wait(job, log, 200)
    assert "horovod double_squeeze" in printed_by_horovod and "goes on" not in printed_by_horovod
    accuracy, weights = result(printed)
    assert accuracy > 0.85, printed
    assert weights == result(printed_by_horovod)[1]


def test_every_node_gets_its_task(cluster: Slurm) -> None:
    job, log = submit(cluster, "mpi.sbatch", "nodes", "sh", "-c", "echo a task on $SLURMD_NODENAME")
    printed = cluster.wait(job, log, 120)
    assert sorted(re.findall(r"^a task on (\S+)$", printed, re.MULTILINE)) == ["node0", "node1"], printed


@pytest.mark.parametrize("file", ["mpi.sbatch", "horovod.sbatch"])
def test_outside_of_a_job_they_explain_themselves(file: str) -> None:
    env = {k: v for k, v in rank_environment().items() if not k.startswith("SLURM_")}
    helped = subprocess.run(["bash", str(BATCH / file), "--help"], env=env, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0 and f"sbatch launch/slurm/{file}" in helped.stdout and "set -euo" not in helped.stdout
    refused = subprocess.run(["bash", str(BATCH / file)], env=env, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "error: this is no Slurm job." in refused.stderr
