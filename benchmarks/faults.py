"""What becomes of a training in which something goes wrong: fault × moment × outcome × seconds, on real ranks, for docs/reliability.md.

    python benchmarks/faults.py --repeat 10 --json docs/results/faults.json --page    # all of it; root, for links that are cut
    python benchmarks/faults.py --only kill --backends two_pass --repeat 2            # a part; with --json it replaces that part in the file
    python benchmarks/faults.py --soak 2000                                           # random faults, one after the other, on four ranks

Each fault happens at a moment that is planted in the program (faulty.py). The job after it goes on from the last checkpoint and compares its
weights with those of the fault-free run after every step, so each line below says, too, that the last checkpoint was loaded and led to the right
bits. What hangs, leaves a process, takes longer than is stated, names nobody or trains wrongly is printed as that, and the exit status is 1.
Of every two ranks that are killed the launcher notices one itself; the other time it is told to look on, as srun does. Ranks are started by the
tests' runner (tests/ranks.py), which finds what a job leaves behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from tests.ranks import run_job  # noqa: E402

PROGRAM, NETLAB, PAGE = REPO / "benchmarks" / "faulty.py", REPO / "benchmarks" / "netlab.sh", REPO / "docs" / "reliability.md"
START, END = "<!-- faults: written by benchmarks/faults.py -->\n", "<!-- end of faults -->"
BACKENDS = {"all_reduce": "all-reduce", "two_pass": "two-pass", "asynchronous": "asynchronous"}
WORKERS = 3
EVERY = 2  # steps from one checkpoint to the next
HUNG = 60.0  # seconds after which a job counts as hung, and is ended
STOPPED = 20.0  # seconds

Run = Callable[..., str]
"""Of `tests.ranks`: starts a job, and returns what it printed."""


@dataclass(frozen=True)
class Cell:
    """A fault at a moment, with a backend. `limit`: seconds in which it must be over, from the fault to the end of the last process where the job
    ends by it (`ends`), and where it goes on, too, which the job does for a few steps."""

    fault: str
    moment: str
    backend: str
    victim: int
    ends: bool
    limit: float

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.moment}, {self.backend}"

    @property
    def shrinks(self) -> bool:
        """The others go on without the victim."""
        return self.fault == "kill shrink"

    @property
    def ranks(self) -> int:
        return WORKERS + (self.backend == "asynchronous")


FAULTS = {
    "kill": "a worker is killed (SIGKILL)",
    "kill server": "the server is killed",
    "kill shrink": "a worker is killed (SIGKILL), `MPI_BACKEND_ON_FAILURE=shrink`",
    "cut": "a worker's link is cut",
    "stop": f"a worker is stopped for {STOPPED:g} s (SIGSTOP)",
    "slow": "a worker becomes 10 × slower",
    "flip": "a bit of a payload changes on its way (all-reduce, two-pass: `MPI_BACKEND_CHECKSUM=1`)",
    "damage": "a byte of a checkpoint's part changes",
}
MOMENTS = {
    "forward": "forward",
    "pass 1": "pass 1 (asynchronous: push)",
    "pass 2": "pass 2 (asynchronous: answer)",
    "part": "a checkpoint, its part unfinished",
    "manifest": "a checkpoint, before its manifest",
    "load": "before it is loaded",
}
LIMITS = {"kill": 10.0, "kill server": 10.0, "kill shrink": 30.0, "cut": 12.0, "stop": STOPPED + 10, "slow": 30.0, "flip": 10.0, "damage": 5.0}


def cells() -> list[Cell]:
    """All of the table."""
    found = []
    for backend in BACKENDS:
        served = backend == "asynchronous"
        planned = [("kill", moment, 0 if moment == "manifest" else 1) for moment in ("forward", "pass 1", "pass 2", "part", "manifest")]
        planned += [("kill server", moment, WORKERS) for moment in ("pass 1", "pass 2", "part") if served]
        planned += [("kill shrink", moment, victim) for fault, moment, victim in planned if fault == "kill" and served]
        planned += [("cut", "pass 1", 1), ("stop", "forward", 1), ("stop", "pass 1", 1), ("slow", "forward", 1)]
        planned += [("flip", "pass 1", 1), ("flip", "pass 2", WORKERS if served else 1), ("damage", "load", 1)]
        found += [Cell(f, moment, backend, victim, f in ("kill", "kill server", "cut", "flip"), LIMITS[f]) for f, moment, victim in planned]
    return found


# -- one cell --------------------------------------------------------------------------------------------------------------------


class Jobs:
    """Starts jobs of a backend in folders below one, each of which begins with the hashes of the fault-free run."""

    def __init__(self, root: Path, run: Run = run_job, limit: float = HUNG) -> None:
        self._root, self._run, self._limit = root, run, limit
        self._traces: dict[tuple[str, int], tuple[int, Path]] = {}
        self.grown: dict[str, int] = {}
        """Of the last fault-free run: see `grown`."""

    def start(self, launcher: Sequence[str], bare: bool = False, env: dict[str, str] | None = None, **plan: Any) -> str:
        """What a job printed. AssertionError of `run_job` for one that hangs, or leaves processes."""
        return self._run(list(launcher), PROGRAM, (json.dumps(plan),), timeout=self._limit, env=env, expect_failure=None, bare=bare)

    def folder(self, backend: str, ranks: int, steps: int) -> Path:
        """A new one, with the fault-free run of so many steps at least."""
        known = self._traces.get((backend, ranks))
        if known is None or known[0] < steps:
            made = Path(tempfile.mkdtemp(prefix=f"{backend}-", dir=self._root))
            plan = {"folder": str(made), "backend": backend, "steps": steps, "every": EVERY, "record": True, "watch": True}
            output = self.start(local(ranks), env=environment(backend), **plan)
            self.grown = grown(output)
            if went(output) != ranks - (backend == "asynchronous"):
                raise SystemExit(f"the fault-free run has failed:\n{output}")
            known = self._traces[backend, ranks] = steps, made / "trace"
        folder = Path(tempfile.mkdtemp(prefix=f"{backend}-", dir=self._root))
        shutil.copy(known[1], folder)
        return folder


def local(ranks: int) -> list[str]:
    return ["mpirun", "-n", str(ranks)]


def environment(backend: str) -> dict[str, str]:
    return {"MPI_BACKEND_SERVERS": "1"} if backend == "asynchronous" else {}


def went(output: str) -> int:
    """How many ranks came to the end."""
    return len(re.findall(r"^rank \d+ went from step", output, re.MULTILINE))


def newest(folder: Path) -> tuple[int, Path]:
    """The step of the last checkpoint that is there, and its folder; 0 where none is."""
    files = list(folder.glob("*/manifest.json"))
    return max(((int(json.loads(file.read_text())["step"]), file.parent) for file in files), default=(0, folder))


@contextlib.contextmanager
def hosts(n: int) -> Iterator[tuple[list[str], Callable[[], None]]]:
    """Emulated ones: what starts one rank on each, and what makes them anew after a link was cut. Raises SystemExit where they are not to be had."""
    lab = f"f{uuid.uuid4().hex[:6]}"
    network = "10.78.0.0/24"  # netlab.sh's

    def netlab(*arguments: str) -> None:
        done = subprocess.run([str(NETLAB), *arguments], env={**os.environ, "NETLAB": lab}, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise SystemExit(f"emulated hosts are not to be had here (leave out 'cut'): {done.stderr}")

    def anew() -> None:
        netlab("down")
        netlab("up", str(n), "1gbit")

    named = ",".join(f"host-{i}:1" for i in range(n))
    inside = ["ip", "netns", "exec", f"{lab}-host-0", "unshare", "-u", "sh", "-c", 'hostname host-0; exec "$@"', "sh"]
    inside += ["env", f"NETLAB={lab}", str(REPO / "launch" / "mpirun.sh"), "-H", named, "-i", network]
    anew()
    try:
        yield [*inside, "--ssh", f"{NETLAB} agent", "--transport", "tcp", "-t", "1", "--"], anew
    finally:
        netlab("down")


@dataclass
class Once:
    """What became of one fault: `wrong` is empty where all was as it must be."""

    seconds: float
    wrong: str
    said: str = ""


def once(cell: Cell, jobs: Jobs, folder: Path, launcher: Sequence[str]) -> Once:
    """From the last checkpoint to the fault, and what follows in that job."""
    first, place = newest(folder)
    when = folder / "when"
    when.unlink(missing_ok=True)
    (folder / "now").unlink(missing_ok=True)
    fault = {"folder": str(folder), "backend": cell.backend, "every": EVERY, "seconds": STOPPED}
    if cell.fault == "damage":
        (part,) = place.glob(f"part-*-rank{cell.victim:05d}.safetensors")
        damage(part, first)
        fault["steps"] = first + EVERY
    else:
        at = first + EVERY + 1
        fault |= {"fault": cell.fault.split()[0], "moment": cell.moment, "at": at, "victim": cell.victim, "steps": at + 3}
    variables = environment(cell.backend) | ({"MPI_BACKEND_CHECKSUM": "1"} if cell.fault == "flip" else {})
    if cell.shrinks:
        variables |= {"MPI_BACKEND_ON_FAILURE": "shrink"}
        launcher = [launcher[0], "--with-ft", "ulfm", *launcher[1:]]
    try:
        output = jobs.start(launcher, bare=cell.fault == "cut", env=variables, **fault)
    except AssertionError as error:
        text = str(error)
        wrong = "hangs" if "ended by its time limit" in text else "leaves processes" if "these processes went on" in text else "fails"
        return Once(float("nan"), wrong, text)
    ended = time.time()
    if cell.fault == "damage":
        seconds = max(map(float, re.findall(r"passed over after ([\d.]+) s", output)), default=float("nan"))
        named = rf"part of rank {cell.victim}, is damaged"
    else:
        if not when.exists():
            return Once(float("nan"), "the fault did not happen", output)
        seconds, named = ended - float(when.read_text()), rf"\brank {cell.victim}\b"
    return Once(seconds, verdict(cell, output, seconds, named), output)


def verdict(cell: Cell, output: str, seconds: float, named: str) -> str:
    """What is not as it must be."""
    all_went = went(output) == WORKERS - cell.shrinks
    if "wrong bits" in output:
        return "trains wrongly"
    if cell.ends and went(output):
        return "is not noticed"
    if not cell.ends and not all_went:
        return "does not go on"
    # A stopped or slow worker need not be named.
    if cell.fault not in ("stop", "slow") and not re.search(named, output):
        return "names nobody"
    if not seconds <= cell.limit:
        return f"takes longer than {cell.limit:g} s"
    return ""


def measure(cell: Cell, jobs: Jobs, repeat: int) -> dict[str, Any]:
    """So many times, and a last job that goes on from what the last fault has left."""
    folder = jobs.folder(cell.backend, cell.ranks, steps=6 * repeat + 16)
    common = {"folder": str(folder), "backend": cell.backend, "every": EVERY}
    first = jobs.start(local(cell.ranks), env=environment(cell.backend), steps=2 * EVERY, **common)  # two checkpoints
    found = [] if went(first) == WORKERS else [Once(float("nan"), "does not even begin", first)]
    with hosts(cell.ranks) if cell.fault == "cut" else contextlib.nullcontext((local(cell.ranks), lambda: None)) as (launcher, anew):
        while len(found) < repeat:
            alone = cell.fault.startswith("kill") and not cell.shrinks and len(found) % 2 == 1
            found.append(once(cell, jobs, folder, [launcher[0], "--runtime-options", "continuous", *launcher[1:]] if alone else launcher))
            anew()
    before, _ = newest(folder)
    last = jobs.start(local(cell.ranks), env=environment(cell.backend), steps=before + EVERY, **common)
    if "wrong bits" in last or went(last) != WORKERS or f"went from step {before} to" not in last:
        found.append(Once(float("nan"), "the last checkpoint does not go on", last))
    shutil.rmtree(folder)
    wrong = [one for one in found if one.wrong]
    for one in wrong:
        print(f"--- {cell.name}: {one.wrong}:\n{one.said[-3000:]}\n---", file=sys.stderr, flush=True)
    seconds = [round(one.seconds, 2) for one in found if one.seconds == one.seconds]
    outcome = "; ".join(dict.fromkeys(one.wrong for one in wrong))
    made = {"fault": cell.fault, "moment": cell.moment, "backend": cell.backend, "repeat": repeat, "wrong": outcome, "seconds": seconds}
    print(f"{cell.name:<34} {cell_text(made)}", flush=True)
    return made


# -- the table -------------------------------------------------------------------------------------------------------------------


OUTCOMES = {
    "damage": "refused, names the part; the one before it is loaded",
    "stop": "goes on",
    "slow": "goes on",
    "kill shrink": "goes on without it, names the rank",
}
"""Others: the job ends, and names the rank."""


def cell_text(made: dict[str, Any]) -> str:
    if made["wrong"]:
        return f"**{made['wrong']}**"
    outcome = OUTCOMES.get(made["fault"], "ends, names the rank")
    times = made["seconds"]
    return f"{outcome}, {statistics.median(times):.1f} s ({max(times):.1f})"


def table(results: Sequence[dict[str, Any]]) -> str:
    """In Markdown; a row for each fault and moment."""
    by = {(made["fault"], made["moment"], made["backend"]): made for made in results}
    often = " to ".join(map(str, sorted({min(made["repeat"] for made in results), max(made["repeat"] for made in results)}))) if results else "0"
    lines = [f"Each {often} times; median seconds, and the longest in brackets.", ""]
    lines += [f"| fault | moment | at most | {' | '.join(BACKENDS.values())} |", f"|{'---|' * (3 + len(BACKENDS))}"]
    for fault, moment in dict.fromkeys((cell.fault, cell.moment) for cell in cells()):
        told = [by.get((fault, moment, backend)) for backend in BACKENDS]
        if any(told):
            row = [FAULTS[fault], MOMENTS[moment], f"{LIMITS[fault]:g} s", *("–" if made is None else cell_text(made) for made in told)]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def updated(results: Sequence[dict[str, Any]], page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(START)
    return before + START + table(results) + END + rest.partition(END)[2]


# -- one fault after the other ---------------------------------------------------------------------------------------------------


def soak(jobs: Jobs, steps: int, seed: int, ranks: int = 4, backend: str = "two_pass", distance: int = 5) -> tuple[Counter[str], dict[str, int]]:
    """Train `steps` steps with random faults (a rank killed or stopped, a part of the last checkpoint damaged), one in about `distance` steps of the
    first three quarters, after each of which another job starts from the last checkpoint that can be loaded. Returns how often each fault was, and
    how much memory (KiB), threads and open files grew at most on a rank of a job, among them the one without faults.

    Raises AssertionError where any step's weights are not, bit for bit, those of the run without faults, or a job does not end.
    """
    drawn, faults = random.Random(seed), Counter[str]()
    folder = jobs.folder(backend, ranks, steps)
    common: dict[str, Any] = {"folder": str(folder), "backend": backend, "every": EVERY, "watch": True}
    while True:
        first, place = newest(folder)
        damaged = drawn.random() < 0.35 and place != folder
        if damaged:
            damage(sorted(place.glob("part-*.safetensors"))[drawn.randrange(ranks)], first)
            faults["damage"] += 1
        at = first + 1 + drawn.randrange(2 * distance)
        plan: dict[str, Any] = {"steps": steps}
        if at < 3 * steps // 4:
            what, moment = drawn.choice(["kill", "kill", "stop"]), drawn.choice(["forward", "pass 1", "pass 2", "part"])
            plan = {"steps": at + 3, "fault": what, "moment": moment, "at": at, "victim": drawn.randrange(ranks), "seconds": 0.5}
            faults[what] += 1
        output = jobs.start(local(ranks), **common, **plan)
        assert "wrong bits" not in output, output
        assert damaged == ("passed over" in output), output
        assert went(output) == (0 if plan.get("fault") == "kill" else ranks), output
        if "fault" not in plan:
            return faults, jobs.grown | {what: max(jobs.grown.get(what, 0), more) for what, more in grown(output).items()}


def grown(output: str) -> dict[str, int]:
    """What grew on the ranks of a job, of each what grew most."""
    ranks = [json.loads(told) for told in re.findall(r"^grown on rank \d+: (.*)$", output, re.MULTILINE)]
    return {what: max(rank[what] for rank in ranks) for what in ranks[0]} if ranks else {}


def damage(part: Path, seed: int) -> None:
    """One bit, where the tensors are."""
    drawn, data = random.Random(seed), bytearray(part.read_bytes())
    data[drawn.randrange(len(data) // 2, len(data))] ^= 1 << drawn.randrange(8)
    part.write_bytes(data)


# -- the command -----------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="how often each; 0: nothing is measured")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--moments", nargs="+", choices=list(MOMENTS), default=list(MOMENTS), metavar="MOMENT", help=", ".join(MOMENTS))
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS), metavar="BACKEND", help=", ".join(BACKENDS))
    parser.add_argument("--json", type=Path, help="file of results, of which those that are measured are replaced")
    parser.add_argument("--page", action="store_true", help="write the table of the file into docs/reliability.md")
    parser.add_argument("--soak", type=int, metavar="STEPS", help="random faults on four ranks, and no table")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        jobs = Jobs(Path(folder))
        if options.soak is not None:
            faults, most = soak(Jobs(Path(folder), limit=3600), options.soak, options.seed, distance=100)
            print(f"the weights are right after {options.soak} steps and {dict(faults)}; most that grew on a rank: {most}")
            print(f"took {time.perf_counter() - began:.0f} s", file=sys.stderr)
            return
        chosen = [c for c in cells() if options.repeat and c.fault in options.only and c.moment in options.moments and c.backend in options.backends]
        results = [] if options.json is None or not options.json.exists() else json.loads(options.json.read_text())["cells"]
        for cell in chosen:
            made = measure(cell, jobs, options.repeat)
            key = made["fault"], made["moment"], made["backend"]
            results = [other for other in results if (other["fault"], other["moment"], other["backend"]) != key] + [made]
            if options.json is not None:
                options.json.write_text(
                    json.dumps({"title": "fault × moment × outcome × seconds", "cells": results}, indent=1) + "\n", encoding="utf-8"
                )
    print(table(results), end="")
    if options.page:
        PAGE.write_text(updated(results, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"took {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if any(made["wrong"] for made in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
