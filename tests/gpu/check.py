"""What can be found out on a machine with one GPU, part by part, in one table and one file. launch/gpu_check.sh starts it:

    python tests/gpu/check.py [--device cuda|cpu] [--short] [--dry-run] [--seconds 480] [--output results/gpu_check.json]

A part that fails does not end the others. With `--device cpu` every part runs on the CPU in the GPU's place, which shows whether the check itself
works. Ends with status 1 when a part failed, 2 when nothing was tried, as there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
NOT_HERE = {
    "NCCL between two GPUs": "one GPU cannot hold two NCCL ranks",
    "unmodified Horovod on a GPU": "Horovod is not carried: it must be compiled against this torch and CUDA",
}
"""What no run of this check can find out, and why."""
SHORT = ("random_block", "top_k", "double_squeeze", "detached")


class NotRun(Exception):
    """Why a part could not be tried."""


class Failed(Exception):
    """What was wrong."""


@dataclass
class Part:
    """`run(seconds)` returns figures, or raises `NotRun` or `Failed`; `command` is what it amounts to."""

    name: str
    command: str
    limit: float
    """In seconds."""
    run: Callable[[float], dict[str, Any]]
    result: str = "not run"
    said: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def started(command: Sequence[str], seconds: float) -> str:
    """What the command printed. Raises `Failed` when it does not end, or ends with another status than 0."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # no pipe, which processes that it has started could hold open
        process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            over = process.wait(seconds)
        except subprocess.TimeoutExpired:
            over = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        text = said.read()
    if over is None:
        raise Failed(f"not over after {seconds:.0f} s; {_end(text)}")
    if over:
        raise Failed(_end(text))
    return text


def _end(text: str) -> str:
    return text.strip()[-2000:] or "it printed nothing"


def tests_that_skip(device: str) -> Part:
    """Those of the test suite that need a GPU; on the CPU those of the same files that do not."""
    chosen = "gpu or cuda" if device == "cuda" else "test_a_gpu or test_cuda or cpu"
    files = ["tests/mpi/test_gpu.py", "tests/property/test_definitions.py", "tests/property/test_packing.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]

    def run(seconds: float) -> dict[str, Any]:
        said = started(command, seconds)
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped)", said.strip().splitlines()[-1])}
        reasons = sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)))
        return {**counts, "why skipped": reasons}

    return Part("tests that need a GPU", " ".join([*command[:-1], f"'{chosen}'"]), 60, run)


def ranks(name: str, n: int, program: str, device: str, only: Sequence[str], limit: float) -> Part:
    """A program of this folder on n ranks that share the GPU."""
    path = f"tests/gpu/{program}.py"

    def run(seconds: float) -> dict[str, Any]:
        try:
            from tests.ranks import mpirun
        except ImportError as error:
            raise NotRun(f"{error.name} is not installed") from error
        try:
            said = mpirun(n, path, device, *only, timeout=seconds, env={"MPI_BACKEND_CUDA_AWARE": "0"})
        except AssertionError as error:
            raise Failed(_end(str(error))) from None
        rows: dict[str, Any] = json.loads(re.findall(r"^RESULT (.*)$", said, re.MULTILINE)[-1])
        if not rows:
            raise Failed("no method was tried")
        if wrong := [row for row, found in rows.items() if not found["good"]]:
            raise Failed(f"{len(wrong)} of {len(rows)} methods: " + "; ".join(f"{row}: {rows[row]}" for row in wrong[:5]))
        bits = sum(row.get("promised") == "bits" for row in rows.values())
        return {"methods": len(rows), **({"bits of the CPU": bits} if bits else {}), "rows": rows}

    return Part(name, f"mpirun -n {n} python {path} {' '.join([device, *only])}", limit, run)


def kernels(device: str, short: bool) -> Part:
    """Selection, packing and random bits of the kernels for GPUs, beside the reference on the CPU."""
    command = [sys.executable, "tests/gpu/program_kernels.py", device, *(["--short"] if short or device == "cpu" else [])]

    def run(seconds: float) -> dict[str, Any]:
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            raise NotRun("Triton is not installed: what runs on a GPU is the reference, in torch")
        rows = json.loads(re.findall(r"^RESULT (.*)$", started(command, seconds), re.MULTILINE)[-1])
        control = rows.pop("broken")
        if wrong := [f"{name}: {what[:3]}" for name, what in rows.items() if what]:
            raise Failed(f"{len(wrong)} of {len(rows)} checks: " + "; ".join(wrong[:5]))
        if not isinstance(control, dict) or not all(control.values()):
            raise Failed(f"kernels that are wrong were not found to be: {control}")
        return {"checks": len(rows), "controls": len(control)}

    return Part("kernels, bit by bit", " ".join(command), 120, run)


def nccl(device: str) -> Part:
    command = [sys.executable, "tests/gpu/program_nccl.py", device]

    def run(seconds: float) -> dict[str, Any]:
        rows: dict[str, Any] = json.loads(re.findall(r"^RESULT (.*)$", started(command, seconds), re.MULTILINE)[-1])
        if "not run" in rows:
            raise NotRun(rows["not run"])
        if wrong := [name for name, good in rows.items() if not good]:
            raise Failed(f"{len(wrong)} of {len(rows)} checks: {', '.join(wrong)}")
        return {"checks": len(rows)}

    return Part("NCCL, one rank", " ".join(command), 60, run)


def gpu_bench(device: str, short: bool) -> Part:
    command = [sys.executable, "benchmarks/gpu.py", "--device", device]

    def run(seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            started([*command, *(["--short"] if short else []), "--seconds", f"{0.6 * seconds:.0f}", "--output", f"{folder}/gpu.json"], seconds)
            found = json.loads((Path(folder) / "gpu.json").read_text())
        steps = {f"{name}, {int(n) / 1e6:g} M": row for n, size in found["sizes"].items() for name, row in size["steps"].items()}
        rate = max(size["copy"]["GB/s"] for size in found["sizes"].values())
        return {"copy in GB/s": rate, "kernels": sum(len(s["kernels"]) for s in found["sizes"].values()), "steps": steps, "rows": found}

    return Part("kernels, how fast", " ".join([*command, *(["--short"] if short else [])]), 130, run)


def parts_of(device: str, short: bool) -> list[Part]:
    only = SHORT if short else ()
    return [
        kernels(device, short),
        ranks("every method, 2 ranks", 2, "program_methods", device, only, 100),
        gpu_bench(device, short),
        ranks("streams, autocast, scaler", 2, "program_training", device, only, 60),
        tests_that_skip(device),
        nccl(device),
        ranks("every method, 3 ranks", 3, "program_methods", device, only, 100),
    ]


_ABOUT = """
import json, shutil, sysconfig, os, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
headers = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
facts |= {"C compiler, for Triton": compiler, "Python.h, for Triton": headers}
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    facts |= {"gpu": about.name, "GiB": round(about.total_memory / 2**30, 1), "processors": about.multi_processor_count}
    from hvd_ecsgd.kernels import cuda
    facts["Triton"] = cuda.why_not() or "launches kernels"
print("RESULT", json.dumps(facts))
"""


def machine() -> tuple[dict[str, Any], str]:
    """Facts for the file, and why there is no GPU ('' where there is one). Asked in a process of its own, as a driver may hang."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    try:
        facts |= json.loads(re.findall(r"^RESULT (.*)$", started([sys.executable, "-c", _ABOUT], 120), re.MULTILINE)[-1])
    except Failed as error:
        return facts, "torch is not installed" if "No module named 'torch'" in str(error) else f"the GPU cannot be asked: {error}"
    return facts, "" if facts["gpu"] else "no GPU: torch.cuda.is_available() is False"


def go_through(parts: Sequence[Part], seconds: float) -> None:
    """Run all, within so many seconds together."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if left < 5:
            part.said = f"the {seconds:g} s of the whole check were over"
            continue
        print(f"== {part.name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            part.figures, part.result = part.run(min(part.limit, left)), "passed"
        except NotRun as error:
            part.said = str(error)
        except Failed as error:
            part.result, part.said = "FAILED", str(error)
        except Exception as error:
            part.result, part.said = "FAILED", repr(error)
        except BaseException as error:  # of pytest's, where mpirun or mpi4py is missing
            if type(error).__name__ != "Skipped":
                raise
            part.said = str(error)
        part.seconds = time.monotonic() - start


def _summary(part: Part) -> str:
    if part.said:
        return part.said.splitlines()[-1][:110]
    shown = {what: value for what, value in part.figures.items() if isinstance(value, int | float)}
    return ", ".join(f"{what} {value:.4g}" for what, value in shown.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--short", action="store_true", help="few methods, and small sizes")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--output", type=Path, default=REPO / "results" / "gpu_check.json")
    given = parser.parse_args(arguments)
    parts = parts_of(given.device, given.short)
    if given.dry_run:
        for part in parts:
            print(f"{part.name:28}{part.limit:5.0f} s  {part.command}")
        return 0
    facts, missing = machine()
    if missing and (given.device == "cuda" or "torch" not in facts):
        for part in parts:
            part.said = missing
    else:
        go_through(parts, given.seconds)
    print(f"\n{'part':28}{'result':9}{'seconds':>8}  ")
    for part in parts:
        print(f"{part.name:28}{part.result:9}{part.seconds:8.1f}  {_summary(part)}")
    for what, why in NOT_HERE.items():
        print(f"{what:28}{'not run':9}{'':8}  {why}")
    if steps := next((part.figures["steps"] for part in parts if "steps" in part.figures), None):
        print(f"\nwhole step: {'T':>18}{'of copy':>10}      (T: one e.add_(g))")
        for name, row in steps.items():
            print(f"{name:24}{row['in T']:6.2f}{row['of copy']:10.1%}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{key: getattr(part, key) for key in ("name", "command", "result", "seconds", "said", "figures")} for part in parts]
    given.output.write_text(
        json.dumps({"device": given.device, "short": given.short, "machine": facts, "parts": rows, "not run": NOT_HERE}, indent=1)
    )
    print(f"\nwritten to {given.output}")
    return 1 if any(part.result == "FAILED" for part in parts) else 2 if all(part.result == "not run" for part in parts) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    sys.exit(main())
