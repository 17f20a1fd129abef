"""launch/mpirun.sh, launch/horovodrun.sh and launch/torchrun.sh: the command they make for each MPI, with pretended ones; and real jobs."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.test_scripts import REPO, environment, run, stub
from tests.ranks import rank_environment, require_horovod, require_mpirun

VERSIONS = {
    "openmpi4": "mpirun (Open MPI) 4.1.6\n\nReport bugs to http://www.open-mpi.org/community/help/",
    "openmpi4-debian": "mpirun.openmpi (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/",
    "openmpi5": "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/",
    "mpich": "HYDRA build details:\n    Version:                                 4.2.1\n    Release Date:                            Wed Apr 17 2024",
}
MACHINE = "host-a"  # what the pretended uname says


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a pretended machine: host-a, 8 cores, a route to host-b through ib0, mpirun and horovodrun that print their arguments."""
    bin_ = tmp_path / "bin"
    told = 'echo "threads $OMP_NUM_THREADS, interface ${MPI_BACKEND_INTERFACE:-none}"; echo "btls ${OMPI_MCA_btl-not chosen}"; '
    told += 'echo "memory ${MALLOC_MMAP_THRESHOLD_-not chosen} ${MALLOC_TRIM_THRESHOLD_-not chosen}"'
    show = f'printf "%s\\n" "$@"; {told}; exit "${{STATUS:-0}}"\n'
    stub(bin_ / "mpirun", f'if [ "${{1:-}}" = --version ]; then cat {tmp_path}/version; exit; fi\n{show}')
    stub(bin_ / "horovodrun", f"{show}")
    stub(bin_ / "uname", f"echo {MACHINE}.cluster\n")
    stub(bin_ / "nproc", "echo 8\n")
    stub(bin_ / "getent", '[ "$2" = host-b ] && echo "10.1.0.2       STREAM host-b"\n')
    stub(bin_ / "ip", 'echo "10.1.0.2 dev ib0 src 10.1.0.1 uid 0 \\\\    cache"\n')
    (bin_ / "python").symlink_to(sys.executable)
    for tool in ("bash", "env", "dirname", "id", "sed", "awk", "grep", "cut", "cat", "sleep"):
        (bin_ / tool).symlink_to(shutil.which(tool) or tool)
    (tmp_path / "version").write_text(VERSIONS["openmpi5"])
    return environment(bin_, VENV=str(tmp_path / "none"), TMPDIR="/tmp")


def command(script: str, machine: dict[str, str], *arguments: str) -> list[str]:
    """The command that a dry run prints on standard output, and nothing else there."""
    done = subprocess.run([str(REPO / "launch" / script), "--dry-run", *arguments], env=machine, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


EVERYTHING = shlex.split("-H host-a:2,host-b:3 -n 4 --bind core --transport tcp --ssh myssh --tag 1 --timeout=60 -x FOO --mpi-args=--verbose")
EXPECTED = {
    "openmpi5": """mpirun -n 4 -H host-a:2,host-b:3 --map-by slot --bind-to core --mca btl_tcp_if_include ib0 --prtemca prte_if_include ib0
        --mca pml ob1 --mca btl self,sm,tcp --prtemca plm_ssh_agent myssh --output tag --timeout 60
        -x PATH -x PYTHONPATH -x PYTHONUNBUFFERED -x OMP_NUM_THREADS -x FOO -x HVD_ECSGD_THING -x MPI_BACKEND_INTERFACE
        --prtemca oob_tcp_keepalive_time 3 --prtemca oob_tcp_keepalive_intvl 1 --prtemca oob_tcp_keepalive_probes 2 --verbose""",
    "openmpi4": """mpirun -n 4 -H host-a:2,host-b:3 --map-by slot --bind-to core --mca btl_tcp_if_include ib0 --mca oob_tcp_if_include ib0
        --mca pml ob1 --mca btl self,vader,tcp --mca plm_rsh_agent myssh --tag-output --timeout 60
        -x PATH -x PYTHONPATH -x PYTHONUNBUFFERED -x OMP_NUM_THREADS -x FOO -x HVD_ECSGD_THING -x MPI_BACKEND_INTERFACE
        --mca oob_tcp_keepalive_time 3 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 2 --verbose""",
    "mpich": """env MPIEXEC_TIMEOUT=60 mpirun -n 4 -hosts host-a:2,host-b:3 -bind-to core -iface ib0 -genv FI_PROVIDER tcp -genv UCX_TLS tcp,sm,self
        -launcher ssh -launcher-exec myssh -prepend-rank --verbose""",
}
EXPECTED["openmpi4-debian"] = EXPECTED["openmpi4"]


@pytest.mark.parametrize("mpi", VERSIONS)
def test_each_mpi_gets_its_own_options(mpi: str, machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "version").write_text(VERSIONS[mpi])
    env = {**machine, "FOO": "1", "HVD_ECSGD_THING": "2", "OTHER": "3"}
    assert command("mpirun.sh", env, *EVERYTHING, "python", "a b.py", "--tag") == [*EXPECTED[mpi].split(), "python", "a b.py", "--tag"]
    variables = {
        "HOSTS": "host-a:2,host-b:3", "RANKS": "4", "BIND": "core", "TRANSPORT": "tcp", "MPI_SSH": "myssh", "TAG": "1", "TIMEOUT": "60",
        "EXPORT": "FOO", "MPI_ARGS": "--verbose",
    }  # fmt: skip
    assert command("mpirun.sh", env | variables, "python", "a b.py", "--tag") == [*EXPECTED[mpi].split(), "python", "a b.py", "--tag"]


@pytest.mark.parametrize("mpi", VERSIONS)
def test_on_one_machine_ranks_may_exceed_cores_and_no_network_is_chosen(mpi: str, machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "version").write_text(VERSIONS[mpi])
    expected = {
        "openmpi5": "mpirun -n 2 --map-by slot:oversubscribe --bind-to none",
        "openmpi4": "mpirun -n 2 --map-by slot --bind-to none --oversubscribe",
        "mpich": "mpirun -n 2 -bind-to none",
    }
    assert command("mpirun.sh", machine, "x") == [*expected[mpi.split("-")[0]].split(), "x"]


@pytest.mark.parametrize("said", ["mpirun (Open MPI) 3.1.3", "Intel(R) MPI Library for Linux* OS, Version 2021.11", "no such thing"])
def test_an_unknown_mpi_is_refused_unless_it_is_named(said: str, machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "version").write_text(said)
    done = run(["launch/mpirun.sh", "x"], machine)
    assert done.returncode == 1
    assert f"error: this mpirun is not known: '{said}'" in done.stdout and "MPI_FLAVOUR" in done.stdout
    assert command("mpirun.sh", {**machine, "MPI_FLAVOUR": "mpich"}, "x")[:3] == ["mpirun", "-n", "2"]


def test_it_says_versions_ranks_interface_and_threads_and_passes_on_status(machine: dict[str, str]) -> None:
    done = run(["launch/mpirun.sh", "-H", "host-a:3,host-b:1,host-c:1", "-n", "4", "python", "train.py"], {**machine, "STATUS": "7"})
    assert done.returncode == 7
    for text in (
        "mpirun (Open MPI) 5.0.11 (",
        f"Python {sys.version.split()[0]}",
        "ranks 0-2: on host-a (3 slots)",
        "rank 3: on host-b (1 slots)",
        "no rank: on host-c (1 slots)",
        "network interface: ib0, which the route to host-b (10.1.0.2) takes",
        "threads of each rank: 2",  # 8 cores, 3 ranks
        "\nthreads 2, interface ib0\n",  # what mpirun was given
    ):
        assert text in done.stdout, text


def test_open_mpi_does_not_look_for_libfabric_unless_somebody_has_chosen(machine: dict[str, str], tmp_path: Path) -> None:
    """Which takes a second in each MPI_Init. Who has chosen, in a variable (empty: all) or in a file of Open MPI, keeps that."""

    def btls(**env: str) -> str:
        said = run(["launch/mpirun.sh", "train"], {**machine, "HOME": str(tmp_path), **env}).stdout
        return next(line.removeprefix("btls ") for line in said.splitlines() if line.startswith("btls "))

    own = tmp_path / ".openmpi" / "mca-params.conf"
    assert btls() == "^ofi"
    assert [btls(OMPI_MCA_btl=value) for value in ("self,tcp", "")] == ["self,tcp", ""]
    own.parent.mkdir()
    own.write_text("# btl = none\npml = ob1\nbtl_tcp_if_include = lo\n")
    assert btls() == "^ofi"
    own.write_text("pml = ob1\n btl=self,sm,tcp\n")
    assert btls() == "not chosen"
    assert btls(OMPI_MCA_mca_base_param_files=str(tmp_path / "none")) == "^ofi"


def test_ranks_keep_memory_that_they_free_unless_somebody_has_chosen(machine: dict[str, str], tmp_path: Path) -> None:
    """Setting one of the two alone would let glibc map and unmap each large tensor, so both are set or none."""

    def memory(says: str, **env: str) -> str:
        stub(tmp_path / "bin" / "getconf", says)
        lines = run(["launch/mpirun.sh", "train"], {**machine, **env}).stdout.splitlines()
        return next(line.removeprefix("memory ") for line in lines if line.startswith("memory "))

    new, old = 'echo "glibc 2.41"', 'echo "glibc 2.35"'
    assert memory(new) == "1073741824 1099511627776" and memory(old) == "33554432 1099511627776"
    assert memory("exit 1") == memory("echo musl 1.2") == "not chosen not chosen"
    assert memory(new, MALLOC_TRIM_THRESHOLD_="5") == "not chosen 5" and memory(new, MALLOC_MMAP_THRESHOLD_="7") == "7 not chosen"


def test_in_a_slurm_job_mpirun_takes_its_tasks_and_nodes(machine: dict[str, str]) -> None:
    env = {**machine, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
    done = run(["launch/mpirun.sh", "train"], env)
    assert "ranks 0-3: on the nodes of Slurm job 5, n[1-2]" in done.stdout and "threads of each rank: 4" in done.stdout
    assert "\n-x\nPATH\n" in done.stdout
    done = run(["launch/mpirun.sh", "train"], {**env, "SLURM_CPUS_PER_TASK": "3"})
    assert "threads of each rank: 3" in done.stdout


@pytest.mark.parametrize(
    ("hosts", "ranks", "threads"),
    [
        ("localhost:1,localhost:1", "2", 4),  # 8 cores
        ("localhost:4", "2", 4),
        ("localhost:2,host-b:8", "4", 4),
        ("host-a:2,host-b:2,host-c:2", "6", 4),  # elsewhere: taken to be machines like this one
        ("host-b:1,host-c:4", "5", 2),
        ("localhost:2", "16", 1),
        ("host-b:2,localhost:2", "2", 4),  # none here
    ],
)
def test_cores_are_shared_among_the_ranks_of_a_machine(hosts: str, ranks: str, threads: int, machine: dict[str, str]) -> None:
    done = run(["launch/mpirun.sh", "-H", hosts, "-n", ranks, "--oversubscribe", "1", "--dry-run", "x"], machine)
    assert done.returncode == 0 and f"threads of each rank: {threads}\n" in done.stdout, done.stdout


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_a_dry_run_stays_one(script: str, machine: dict[str, str], tmp_path: Path) -> None:
    """Whatever is misspelt beside it."""
    for arguments, variables, message in (
        (["-t", "--dry-run"], {}, "error: -t needs a value, and '--dry-run' is an option."),
        ([], {"DRY_RUN": "yes"}, "error: DRY_RUN='yes' is not known."),
        (["--dry-run=true"], {}, "error: DRY_RUN='true' is not known."),
        (["--dry-run"], {}, " x"),
        (["--dry-run=1"], {}, " x"),
    ):
        done = run([f"launch/{script}", *arguments, "x"], {**machine, **variables})
        assert message in done.stdout and "threads 4" not in done.stdout, done.stdout
    done = run([f"launch/{script}", "--dry-run=0", "x"], machine)
    assert "\nthreads 4, interface " in done.stdout, f"control: it runs; {done.stdout}"


@pytest.mark.parametrize("name", ["TAG", "OVERSUBSCRIBE", "TIMEOUT"])
def test_switches_and_limits_are_looked_at(name: str, machine: dict[str, str]) -> None:
    done = run(["launch/mpirun.sh", "--dry-run", "x"], {**machine, name: "yes"})
    assert done.returncode == 1 and "'yes'" in done.stdout, done.stdout


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command to run."),
        (["-t", "0", "x"], "the number of threads is '0'"),
        (["-n"], "-n needs a value."),
        (["-n", "0", "x"], "the number of ranks is '0', expected a whole number of at least 1."),
        (["--mpi-args"], "--mpi-args needs a value."),
        (["--frobnicate", "1", "x"], "unknown option '--frobnicate'."),
        (["--frobnicate"], "unknown option '--frobnicate'."),
        (["-n", "2", "--frobnicate=1"], "unknown option '--frobnicate'."),
        (["-z"], "unknown option '-z'."),
        (["-H", "a:2,b:x", "y"], "the number of slots in 'b:x' is 'x'"),
        (["-H", ":2", "y"], "HOSTS=':2' has an entry without a name."),
        (["-H", "a:2,b", "-n", "4", "y"], "4 ranks do not fit the 3 slots of HOSTS='a:2,b'."),
        (["-t", "many", "x"], "the number of threads is 'many'"),
    ],
)
def test_wrong_arguments_are_worded(script: str, arguments: list[str], message: str, machine: dict[str, str]) -> None:
    done = run([f"launch/{script}", *arguments], machine)
    assert done.returncode == 1
    assert f"error: {message}" in done.stdout


def test_only_names_are_exported(machine: dict[str, str]) -> None:
    done = run(["launch/mpirun.sh", "-x", "A=1", "y"], machine)
    assert done.returncode == 1 and "error: EXPORT='A=1' is not a list of names of variables." in done.stdout


@pytest.mark.parametrize("option", ["--bind", "--transport", "--controller"])
def test_unknown_choices_are_refused(option: str, machine: dict[str, str]) -> None:
    done = run(["launch/horovodrun.sh" if option == "--controller" else "launch/mpirun.sh", option, "best", "x"], machine)
    assert done.returncode == 1
    assert f"error: {option[2:].upper()}='best' is not known." in done.stdout


def test_horovodrun(machine: dict[str, str]) -> None:
    assert command("horovodrun.sh", machine, "x") == shlex.split("horovodrun --gloo -np 2 --start-timeout 30 x")
    every = """-c mpi -H host-a:2,host-b:2 --ssh-port 2222 --start-timeout 9 --fusion-mb 64 --cycle-ms 2 --timeline t.json
        --log-level INFO --mpi-args=-v"""
    expected = """horovodrun --mpi -np 4 --start-timeout 9 -H host-a:2,host-b:2 --network-interfaces ib0 --ssh-port 2222 --fusion-threshold-mb 64
        --cycle-time-ms 2 --timeline-filename t.json --log-level INFO --mpi-args=-v x --y"""
    assert command("horovodrun.sh", machine, *every.split(), "x", "--y") == expected.split()


def test_torchrun(machine: dict[str, str], tmp_path: Path) -> None:
    """The interpreter's own, with the machines that meet, the interface of the route to where, and the processors of a task shared by its ranks."""
    own = "python -m torch.distributed.run"
    expected = "--nproc-per-node 2 --max-restarts 0 --standalone --no-python x --y"
    assert command("torchrun.sh", machine, "x", "--y") == [*own.split(), *expected.split()]
    every = "-n 3 -N 2:4 -e host-b -r 5 --id job -i eth0 -t 2 --torchrun-args=--rdzv-conf=timeout=9 -- x"
    expected = """--nproc-per-node 3 --max-restarts 5 --nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint host-b:29400 --rdzv-id job
        --rdzv-conf=timeout=9 --no-python x"""
    assert command("torchrun.sh", machine, *every.split()) == [*own.split(), *expected.split()]
    variables = {"RANKS": "3", "NODES": "2:4", "ENDPOINT": "host-b", "MAX_RESTARTS": "5", "ID": "job", "TORCHRUN_ARGS": "--rdzv-conf=timeout=9"}
    assert command("torchrun.sh", machine | variables, "x") == [*own.split(), *expected.split()]
    said = run(["launch/torchrun.sh", "-n", "2", "-N", "2", "-e", "host-b:5", "--dry-run", "x"], machine).stdout
    assert "2 ranks on this machine, host-a.cluster, of 2 that meet at host-b:5" in said, said
    assert "network interface: ib0, which the route to host-b (10.1.0.2) takes" in said and "threads of each rank: 4\n" in said, said
    task = {**machine, "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "6", "SLURM_JOB_NUM_NODES": "2"}
    assert "threads of each rank: 3\n" in run(["launch/torchrun.sh", "-n", "2", "-N", "2", "-e", "host-b", "--dry-run", "x"], task).stdout
    missing = run(["launch/torchrun.sh", "x"], machine)
    assert missing.returncode == 1 and "error: torch is not installed in" in missing.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-N", "2", "x"], "2 machines need a place to meet."),
        (["-N", "a", "-e", "b", "x"], "the number of machines is 'a'"),
        (["-N", "1:0", "-e", "b", "x"], "the number of machines is '0'"),
        (["-r", "-1", "x"], "-r needs a value, and '-1' is an option."),
        (["-r", "often", "x"], "the number of restarts (or 0) is 'often'"),
    ],
)
def test_wrong_arguments_of_torchrun_are_worded(arguments: list[str], message: str, machine: dict[str, str]) -> None:
    done = run(["launch/torchrun.sh", *arguments], machine)
    assert done.returncode == 1 and f"error: {message}" in done.stdout, done.stdout


@pytest.mark.full  # it waits for torchrun half a minute
def test_killed_ranks_start_again_from_the_checkpoint_and_so_do_fewer(tmp_path: Path) -> None:
    """By torchrun's own elasticity: one of two ranks is killed, and both start again. Then two launchers, as on two machines, go on with what they
    have saved, one of these is killed with its rank, and the other one goes on alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = str(REPO / "launch" / "torchrun.sh")
    script = [sys.executable, str(REPO / "examples" / "digits.py"), "--backend", "torch", "--method", "double_squeeze", "--epochs", "4000"]
    script += ["--checkpoint", str(tmp_path / "checkpoint")]
    log = tmp_path / "log"
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> None:
        with log.open("ab") as out:
            started = subprocess.Popen(
                [launcher, *options, *script], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=rank_environment(), cwd=REPO
            )
        running.append(started)

    def end() -> None:
        for job in running:
            job.terminate()
        while running:
            running.pop().wait(60)

    def ranks() -> list[psutil.Process]:
        children = [p for job in running for p in psutil.Process(job.pid).children(recursive=True)]
        return [p for p in children if str(script[1]) in p.cmdline()[:2]]

    def saved_after(line: str, times: int) -> None:
        """Once `line` was printed so often, an epoch is done."""
        deadline = time.monotonic() + 100
        while len(parts := re.split(line, log.read_text())) <= times or "saved" not in parts[-1]:
            assert time.monotonic() < deadline and all(job.poll() is None for job in running), log.read_text()
            time.sleep(0.1)

    try:
        start("-n", "2", "-r", "2")
        saved_after("epoch 1 of", 1)
        ranks()[0].kill()
        saved_after("goes on after epoch", 1)
        assert [p.environ()["WORLD_SIZE"] for p in ranks()] == ["2", "2"]
        end()
        # The meeting waits so long for the one that has gone, or is not there yet; on one machine, both would host it.
        brief = "last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=5"
        for host in (1, 0):
            start("-n", "1", "-N", "1:2", "-e", f"127.0.0.1:{port}", "-r", "2", f"--torchrun-args=--rdzv-conf={brief},is_host={host}")
        saved_after("goes on after epoch", 2)
        assert [p.environ()["WORLD_SIZE"] for p in ranks()] == ["2", "2"]
        gone = running.pop()
        for process in psutil.Process(gone.pid).children(recursive=True):
            process.kill()
        gone.wait(60)
        saved_after("goes on after epoch", 3)
        assert [p.environ()["WORLD_SIZE"] for p in ranks()] == ["1"]
        epochs = [int(e) for e in re.findall(r"goes on after epoch (\d+)", log.read_text())]
        assert 1 <= epochs[0] < epochs[1] < epochs[2], "control: it never begins anew"
    finally:
        end()


def test_without_horovod(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "horovodrun").unlink()
    done = run(["launch/horovodrun.sh", "x"], machine)
    assert done.returncode == 1 and "error: no horovodrun on PATH." in done.stdout and "launch/mpirun.sh" in done.stdout


def test_the_shim_writes_open_mpi_5s_options_and_leaves_the_program_alone(machine: dict[str, str]) -> None:
    """The command line is what Horovod 0.28.1 makes (horovod/runner/mpi_run.py)."""
    shim = REPO / "launch" / "shim"
    env = {**machine, "PATH": f"{shim}:{shim}:{machine['PATH']}"}
    given = """--allow-run-as-root --tag-output -np 2 -H localhost:2 -bind-to none -map-by slot -mca pml ob1 -mca btl ^openib
        -mca btl_tcp_if_include lo -x NCCL_SOCKET_IFNAME=lo -x PATH --timeout 5 python -map-by -mca x"""
    done = run(["mpirun", *given.split()], env)
    expected = """--allow-run-as-root --output tag -np 2 -H localhost:2 --bind-to none --map-by slot --mca pml ob1 --mca btl ^openib
        --mca btl_tcp_if_include lo -x NCCL_SOCKET_IFNAME=lo -x PATH --timeout 5 python -map-by -mca x"""
    assert done.stdout.splitlines()[:-3] == expected.split(), done.stdout
    assert run(["mpirun", "--version"], env).stdout.startswith("mpirun (Open MPI) 5.0.11")


def launched(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = run([str(a) for a in arguments], rank_environment(env))
    assert done.returncode == 0, done.stdout
    found = re.search(r"weights ([0-9a-f]{16})", done.stdout)
    assert found, done.stdout
    return found.group(1)


def test_a_real_job_of_each_script_gives_the_same_weights() -> None:
    """Also `horovodrun --mpi`, which Open MPI 5 needs the shim for; the control is that it fails without. That hashes of this script tell runs apart
    is shown in tests/torch/test_ddp.py."""
    require_mpirun()
    require_horovod()
    script = ("python", str(REPO / "examples" / "digits.py"), "--epochs", "1", "--method", "random_block", "--ratio")
    horovod = (*script, "16", "--backend", "horovod")
    over_mpi = launched("launch/mpirun.sh", "-n", "2", "--timeout", "100", *script, "16")
    assert over_mpi == launched("launch/horovodrun.sh", "-n", "2", *horovod)
    assert over_mpi == launched("launch/horovodrun.sh", "-c", "mpi", "-n", "2", *horovod)
    if "(Open MPI) 5" in run(["mpirun", "--version"], rank_environment()).stdout:
        bare = run(["horovodrun", "--mpi", "-np", "2", *horovod], rank_environment())
        assert bare.returncode != 0, bare.stdout


def test_a_job_that_outlives_its_ranks_is_started_with_ulfm(machine: dict[str, str]) -> None:
    """By the option and by the variable, which reaches all ranks; not without either."""
    for options, env in ((["--on-failure", "shrink"], {}), ([], {"MPI_BACKEND_ON_FAILURE": "shrink"})):
        line = command("mpirun.sh", {**machine, **env}, "-n", "3", *options, "-H", "host-a:2,host-b:2", "python", "a.py")
        assert line[line.index("--with-ft") + 1] == "ulfm"
        assert line[line.index("MPI_BACKEND_ON_FAILURE") - 1] == "-x"
    assert "--with-ft" not in command("mpirun.sh", machine, "-n", "3", "--on-failure", "end", "python", "a.py")
    for flavour, said, message in (("openmpi5", "go on", "It is end or shrink"), ("mpich", "shrink", "cannot go on without a rank that dies")):
        launcher = [str(REPO / "launch" / "mpirun.sh"), "--dry-run", "-n", "3", "--on-failure", said, "true"]
        done = subprocess.run(launcher, env={**machine, "MPI_FLAVOUR": flavour}, capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stdout + done.stderr


def test_servers_are_a_variable_of_all_ranks(machine: dict[str, str]) -> None:
    """Also on other machines; the number must leave somebody to train."""
    line = command("mpirun.sh", machine, "-n", "3", "--servers", "1", "-H", "host-a:2,host-b:2", "python", "a.py")
    assert line[line.index("MPI_BACKEND_SERVERS") - 1] == "-x"
    assert "MPI_BACKEND_SERVERS" not in command("mpirun.sh", machine, "-n", "3", "-H", "host-a:2,host-b:2", "python", "a.py")
    for servers, message in (("3", "leave nobody to train"), ("one", "expected a whole number of at least 1")):
        done = subprocess.run(
            [str(REPO / "launch" / "mpirun.sh"), "--dry-run", "-n", "3", "--servers", servers, "true"], env=machine, capture_output=True, text=True
        )
        assert done.returncode != 0 and message in done.stdout + done.stderr
