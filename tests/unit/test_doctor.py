"""`hvd-ecsgd doctor`: what is absent or broken is named, with what to do. Launchers are pretended; a real run is in tests/launch/test_doctor.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from hvd_ecsgd import CompressionError
from hvd_ecsgd.cli import main
from hvd_ecsgd.doctor import Finding, State, command, look, roads
from hvd_ecsgd.doctor.processes import Ended, environment_of_ranks, run
from hvd_ecsgd.doctor.roads import try_road
from hvd_ecsgd.doctor.trial import PASSED


def stub(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment whose PATH begins with a folder where `name` is this shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("which", "absent", "says"),
    [("mpi", "mpi4py", "pip install 'hvd-ecsgd[mpi]'"), ("horovod", "horovod", "launch/install_horovod.sh"), ("torch", "torch.distributed", "torch")],
)
def test_a_road_that_is_not_there_is_no_fault(which: str, absent: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roads, "find_spec", lambda name: None if name == absent else object())
    found = try_road(which, 5, {"PATH": str(tmp_path)})
    assert found.state is State.ABSENT and f"{absent} is not installed" in found.what and says in found.remedy
    assert ("is not on PATH" in found.what) == (which != "torch"), "torchrun is this Python's"


def test_a_launcher_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what has left its session, and what takes no notice of being asked to end."""
    monkeypatch.setattr(roads, "find_spec", lambda name: object())
    script = f"trap '' TERM; setsid sleep 611 & echo $! >{tmp_path}/child; echo $$ >{tmp_path}/launcher; echo 'waiting for a rank'; sleep 612"
    monkeypatch.setattr("hvd_ecsgd.doctor.processes._GRACE", 0.2)
    found = try_road("mpi", 1.0, stub(tmp_path / "bin", "mpirun", script))
    assert found.state is State.BROKEN and "did not end within 1 s" in found.what and "waiting for a rank" in found.what
    assert "launch/mpirun.sh -i NAME" in found.remedy and "--limit" in found.remedy
    for name in ("child", "launcher"):
        process = int((tmp_path / name).read_text())
        assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE, name


@pytest.mark.parametrize(
    ("script", "what", "remedy"),
    [
        ("echo 'There are not enough slots available in the system'; exit 1", "not enough slots", "oversubscribe"),
        ("echo 'mpirun has detected an attempt to run as root.'; exit 1", "run as root", "OMPI_ALLOW_RUN_AS_ROOT"),
        ("echo 'rank 0 of 1: the launcher started two ranks, and this one sees 1'; exit 1", "sees 1", "different MPIs"),
        ("echo \"ModuleNotFoundError: No module named 'numpy'\"; echo ------; exit 3", "No module named 'numpy'", "install what is named"),
        ("echo 'a riddle'; exit 7", "failed (status 7): a riddle", "mpirun -n 2 python -m hvd_ecsgd.doctor.trial mpi_backend"),
        (f"echo '{PASSED} 0'", f"{PASSED} 0", "see the whole output"),
        (f"echo '{PASSED} 0'; echo '{PASSED} 1'; exit 1", "status 1", "see the whole output"),
    ],
)
def test_a_launcher_that_fails_is_named_with_a_remedy(script: str, what: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roads, "find_spec", lambda name: object())
    found = try_road("mpi", 30, stub(tmp_path / "bin", "mpirun", script))
    assert found.state is State.BROKEN and what in found.what and remedy in found.remedy


def test_two_ranks_that_pass_are_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several may be asked at once: nothing of this process is changed."""
    monkeypatch.setattr(roads, "find_spec", lambda name: object())
    environment = stub(tmp_path / "bin", "mpirun", f'sleep 0.3; echo "{PASSED} 1"; echo "{PASSED} 0 of $*"')
    stub(tmp_path / "bin", "horovodrun", "echo no; exit 1")
    before = dict(os.environ)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda which: try_road(which, 30, environment), ["mpi", "horovod"] * 2))
    assert [f.state for f in found] == [State.OK, State.BROKEN] * 2 and dict(os.environ) == before


def test_what_a_rank_sees_is_its_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hvd_ecsgd.doctor import trial

    class Alone:
        """A backend whose ranks do not see each other."""

        init = rank = staticmethod(lambda: 0)
        size = staticmethod(lambda: 1)

    monkeypatch.setattr(trial.importlib, "import_module", lambda name: Alone)
    monkeypatch.setattr(trial.torch, "set_num_threads", lambda n: None)
    assert trial.main("alone") == 1 and "this one sees 1" in capsys.readouterr().out


def test_mpirun_that_fails_or_is_not_there(tmp_path: Path) -> None:
    def mpirun(environment: dict[str, str]) -> Finding:
        return look.versions(environment)[-1]

    assert mpirun({"PATH": str(tmp_path)}).state is State.ABSENT and "module load" in mpirun({"PATH": str(tmp_path)}).remedy
    broken = mpirun(stub(tmp_path / "a", "mpirun", "echo 'libopen-rte.so.40: cannot open'; exit 127"))
    assert broken.state is State.BROKEN and "status 127: libopen-rte.so.40" in broken.what and broken.remedy
    hydra = mpirun(stub(tmp_path / "b", "mpirun", "echo 'HYDRA build details:'; echo '    Version:      4.2.1'"))
    assert hydra.state is State.OK and hydra.what.startswith("MPICH (Hydra) 4.2.1 (")


ABOUT = {"vendor": "Open MPI", "version": "5.0.11", "thread_multiple": True, "cuda_aware": True}


@pytest.mark.parametrize(
    ("look_at", "package", "ended", "states", "says"),
    [
        (look.mpi, "mpi4py", None, ["absent"], "hvd-ecsgd[mpi]"),
        (look.mpi, "mpi4py", Ended(1, "ImportError: libmpi.so.40: no such file", 1.0), ["broken"], "pip install --force-reinstall mpi4py"),
        (look.mpi, "mpi4py", Ended(None, "", 30.0), ["broken"], "LD_LIBRARY_PATH"),
        (look.mpi, "mpi4py", Ended(0, f"a warning\n{json.dumps(ABOUT)}\n", 1.0), ["ok", "ok", "ok"], ""),
        (look.mpi, "mpi4py", Ended(0, json.dumps({**ABOUT, "thread_multiple": False}), 1.0), ["ok", "absent", "ok"], "built with it"),
        (look.mpi, "mpi4py", Ended(0, json.dumps({**ABOUT, "cuda_aware": False}), 1.0), ["ok", "ok", "absent"], "MPI_BACKEND_CUDA_AWARE"),
        (look.horovod, "horovod", None, ["absent"], "launch/install_horovod.sh"),
        (look.horovod, "horovod", Ended(1, "OSError: undefined symbol: _ZN3c10", 1.0), ["broken"], "against this torch and MPI"),
        (look.horovod, "horovod", Ended(0, '{"gloo": true, "nccl": false}', 1.0), ["ok"], ""),
    ],
)
def test_mpi_and_horovod(
    look_at: Callable[[Any], list[Finding]], package: str, ended: Ended | None, states: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are in a process of their own; None: the package is not there."""
    monkeypatch.setattr(look, "find_spec", lambda name: None if ended is None and name == package else object())
    monkeypatch.setattr(look, "run", lambda command, limit, environment: ended)
    found = look_at({"PATH": ""})
    assert [f.state.value for f in found] == states and says in " ".join(f.remedy for f in found)
    if look_at is look.horovod and states == ["ok"]:
        assert found[0].what == "with gloo; without nccl"


def test_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(look, "native_library", lambda: None)
    monkeypatch.setattr(look, "FILE", tmp_path / "lib.so")
    (absent,) = look.kernels({})
    assert absent.state is State.ABSENT and "C++17 compiler" in absent.remedy
    (tmp_path / "lib.so").write_text("no library")
    (broken,) = look.kernels({})
    assert broken.state is State.BROKEN and "cannot be loaded" in broken.what and "setup.py build_ext --inplace" in broken.remedy
    (asked,) = look.kernels({"HVD_ECSGD_KERNELS": "reference"})
    assert asked.state is State.OK


def test_network(tmp_path: Path) -> None:
    for name, speed, up in (("eth0", "25000", "up"), ("wan0", "-1", "down"), ("tun0", "-1", "unknown"), ("lo", "", "unknown")):
        (tmp_path / "net" / name).mkdir(parents=True)
        for file, text in (("speed", speed), ("operstate", up), ("mtu", "1500"), ("type", "772" if name == "lo" else "1")):
            (tmp_path / "net" / name / file).write_text(text + "\n")
    (tmp_path / "infiniband/mlx5_0/ports/1").mkdir(parents=True)
    (tmp_path / "infiniband/mlx5_0/ports/1/rate").write_text("100 Gb/sec (4X EDR)\n")
    found = {f.name: f for f in look.network({"MPI_BACKEND_INTERFACE": "eth0,10.0.0.0/8", "NCCL_SOCKET_IFNAME": "eth"}, tmp_path)}
    assert set(found) == {"eth0", "wan0", "tun0", "lo", "mlx5_0:1"} and found["eth0"].what == "up, 25 Gbit/s, MTU 1500"
    assert found["wan0"].state is State.ABSENT and found["wan0"].what == "down" and "100 Gb/sec" in found["mlx5_0:1"].what
    assert "speed not told" in found["tun0"].what and "advise" in found["tun0"].what and found["lo"].what == "the loopback, MTU 1500"
    wrong = look.network({"GLOO_SOCKET_IFNAME": "eth9"}, tmp_path)[-1]
    assert wrong.state is State.BROKEN and "names eth9" in wrong.what and "eth0" in wrong.remedy
    assert look.network({}, tmp_path / "none")[0].state is State.ABSENT


def test_slurm(tmp_path: Path) -> None:
    assert look.slurm({"PATH": str(tmp_path)})[0].state is State.ABSENT
    listing = "echo 'MPI plugin types are...'; echo '\tpmix'; echo '\tpmi2'"
    (found,) = look.slurm(stub(tmp_path / "a", "srun", listing) | {"SLURM_JOB_ID": "17"})
    assert found.state is State.OK and "--mpi=pmix|pmi2; in job 17" in found.what
    (broken,) = look.slurm(stub(tmp_path / "b", "srun", "echo 'Unable to contact slurm controller'; exit 1"))
    assert broken.state is State.BROKEN and "Unable to contact" in broken.what and "START=mpirun" in broken.remedy


@pytest.mark.parametrize(
    ("named", "states", "status"),
    [
        (["mpi"], [State.OK], 0),
        (["mpi"], [State.BROKEN], 1),
        (["mpi"], [State.ABSENT], 1),
        (["mpi", "torch"], [State.OK, State.ABSENT], 1),
        ([], [], 0),
        (None, [State.OK, State.ABSENT, State.ABSENT], 0),
        (None, [State.OK, State.BROKEN, State.ABSENT], 1),
        (None, [State.ABSENT] * 3, 1),
    ],
)
def test_the_exit_status_is_for_scripts(
    named: list[str] | None, states: list[State], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is absent is a fault where it was asked for by its name, or nothing else is there; what is broken is one. As text and as JSON."""
    made = dict(zip(named if named is not None else roads.ROADS, [Finding("roads", f"{s.value} road", "as it is", s, "mend it") for s in states]))
    monkeypatch.setattr(command, "LOOKS", (lambda environment: [Finding("versions", "x", "1")],))
    monkeypatch.setattr(command, "try_road", lambda which, limit, environment: made[which])
    for name in command._OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    arguments = ["doctor"] if named is None else ["doctor", "--roads", *named]
    assert main(arguments) == status
    said = capsys.readouterr().out
    assert ("→ mend it" in said) == bool(states) and ("To be mended: " in said) == bool(status)
    assert ("Ready to train: ok road" in said) == (State.OK in states) and ("no road was tried" in said) == (named == [])
    assert main([*arguments, "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (not status)
    for finding, state in zip(found["findings"][1:], states, strict=True):
        assert finding == {"part": "roads", "name": f"{state.value} road", "what": "as it is", "state": state.value, "remedy": "mend it"}


def test_numpy_that_torch_cannot_use_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.2 and NumPy 2, of which neither's metadata says that they do not go together."""
    assert look._numpy().state is State.OK

    def refuse(array: object) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(look.torch, "from_numpy", refuse)
    assert look._numpy().state is State.BROKEN and "numpy<2" in look._numpy().remedy


def test_wrong_use_is_named() -> None:
    with pytest.raises(CompressionError, match="is a rank of a job \\(OMPI_COMM_WORLD_SIZE is set\\)"):
        command.examine([], 1.0, {"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(CompressionError, match="--limit must be a number of seconds above 0"):
        command.examine([], 0.0, {})


@pytest.mark.parametrize(
    ("limit", "ranks", "message"), [("-1", "", "--limit must be"), ("nan", "", "--limit must be"), ("1", "2", "this process is a")]
)
def test_the_command_tells_wrong_use_in_one_line(
    limit: str, ranks: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in command._OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    if ranks:
        monkeypatch.setenv("PMI_SIZE", ranks)
    assert main(["doctor", "--limit", limit]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"hvd-ecsgd doctor: {message}") and said.err.count("\n") == 1 and not said.out


def test_the_environment_of_ranks_is_what_the_user_has_set_and_what_small_jobs_need() -> None:
    environment = environment_of_ranks({"PATH": "/usr/bin:/bin", "TMPDIR": "/x" * 40, "OMP_NUM_THREADS": "5"})
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert (environment["TMPDIR"], environment["OMP_NUM_THREADS"]) == ("/tmp", "5") and environment["OMPI_MCA_btl"] == "^ofi"
    ended = run(["sh", "-c", "echo out; echo err >&2; exit 3"], 30, environment)
    assert (ended.status, ended.output, ended.last_line) == (3, "out\nerr\n", "err")
