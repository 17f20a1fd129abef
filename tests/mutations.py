"""Plants one fault at a time in a copy of the tree, and shows that the tests named for it notice.   python tests/mutations.py [--list] [WORD …]

By hand, after tests or what they guard were rewritten: that a test passes says little while nobody has seen it fail. It takes some 10 minutes; WORDs
pick the faults whose descriptions hold one. The tests of a fault run on the tree as it is first, and must pass; then on a copy that has the fault,
and must fail: "red". A fault that its tests do not notice ("GREEN"), and one whose text is not found exactly once where it is to be planted, make
the exit status 1. `ranks`: the tests start real ranks, under mpirun or horovodrun, without which they fail here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LIMIT = 900
"""Seconds for the tests of one fault."""
_LIMIT_REACHED = "ended by its time limit"
"""Said by tests/ranks.py. It may be the machine's fault, and shows nothing."""


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    ranks: bool = False

    def planted(self, text: str) -> str:
        """`text` of the file with the fault. Raises ValueError where the place is not found, or is not the only one."""
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} holds {found} times what is to be replaced, once is needed: {self.old!r}")
        faulty = text.replace(self.old, self.new)
        compile(faulty, self.file, "exec")
        return faulty


FAULTS = (
    Fault(
        "the residual is carried by the inverse ratio of learning rates",
        "hvd_ecsgd/feedback/error_feedback.py",
        'Addition(part.segments, part.state["residual"], ctx.carry)',
        'Addition(part.segments, part.state["residual"], 1 / ctx.carry)',
        ("tests/unit/test_units.py::test_what_arrives_and_what_waits_is_what_was_put_in",),
    ),
    Fault(
        "residuals of all old workers but the first are lost on another number of workers",
        "hvd_ecsgd/checkpoint/resize.py",
        "for value, weight in zip(values, weights, strict=True):",
        "for value, weight in zip(values[:1], weights[:1], strict=True):",
        ("tests/unit/test_resize.py",),
    ),
    Fault(
        "a step is undone without its momentum",
        "hvd_ecsgd/kernels/accumulate.py",
        "                torch._foreach_sub_(momentum, list(gradients))\n                self.momentum.div_(self.mu)\n",
        "                pass\n",
        ("tests/horovod/test_updates.py::test_the_update_is_applied_by_the_method[horovodrun-2]",),
        ranks=True,
    ),
    Fault(
        "every rank draws from a seed of its own",
        "hvd_ecsgd/core/aggregator.py",
        "bucket.context(group, method.seed,",
        "bucket.context(group, method.seed + transport.rank,",
        ("tests/mpi/test_methods.py::test_every_method_on_two_ranks_is_its_simulation",),
        ranks=True,
    ),
    Fault(
        "the second pass of two is dropped: a rank applies its own server's answer alone",
        "hvd_ecsgd/exchange/two_pass.py",
        "for r, a in enumerate(answers) if pieces[r].numel]",
        "for r, a in enumerate(answers) if pieces[r].numel and r == rank]",
        ("tests/mpi/test_methods.py::test_every_method_on_two_ranks_is_its_simulation",),
        ranks=True,
    ),
    Fault(
        "what a server does not send is not kept",
        "hvd_ecsgd/exchange/two_pass.py",
        "    task.undo_by_adding(residual, server, answer, mine, key, 1.0)\n",
        "    task.undo_by_adding(residual, server, answer, mine, key, 1.0)\n    residual.zero_()\n",
        ("tests/unit/test_two_pass_oracles.py::test_the_recursion[DoubleSqueeze-plain]",),
    ),
    Fault(
        "frozen parameters are moved by what is left of them",
        "hvd_ecsgd/core/bucket.py",
        "return [i for i, p in enumerate(self.parameters) if not p.requires_grad]",
        "return []",
        ("tests/conformance/test_lifecycle.py::test_what_scripts_do[mpi]",),
        ranks=True,
    ),
    Fault(
        "the unit of residuals falls with the learning rate in front of a momentum",
        "hvd_ecsgd/core/bucket.py",
        "return max(settings.lr, self.unit or 0.0) if remembers else settings.lr",
        "return settings.lr",
        ("tests/unit/test_units.py::test_a_warm_restart_after_cosine_to_zero",),
    ),
    Fault(
        "a stale gradient is accumulated a second time",
        "hvd_ecsgd/optimizer/driver.py",
        "self._leftover.check_fresh(self.names)",
        "pass",
        ("tests/unit/test_gradients.py::test_gradients_are_exchanged_once",),
    ),
    Fault(
        "saved state is taken over by place instead of by name",
        "hvd_ecsgd/core/saved_state.py",
        "entries[segment.name].get(slot)",
        "[*entries.values()][i].get(slot)",
        ("tests/unit/test_state.py::test_a_resumed_run_is_the_run[double_squeeze-model first]",),
    ),
    Fault(
        "verify_every is ignored",
        "hvd_ecsgd/core/agreement.py",
        "every = state.method.verify_every",
        "every = 0",
        ("tests/conformance/test_lifecycle.py::test_what_scripts_do[mpi]",),
        ranks=True,
    ),
    Fault(
        "every rank adds in an order of its own",
        "mpi_backend/transport/reduction.py",
        "        if mine.dtype in _HALVES:",
        "        rows = rows[rank:] + rows[:rank]\n        if mine.dtype in _HALVES:",
        ("tests/mpi/test_mpi_backend.py::test_programs[transport bits flight-3]",),
        ranks=True,
    ),
    Fault(
        "ranks that joined go on without the state of the last to join",
        "hvd_ecsgd/optimizer/join.py",
        "if any(note.joined_at != latest.joined_at for note in notes):",
        "if False:",
        ("tests/mpi/test_mpi_backend.py::test_programs[optimizer join-2]",),
        ranks=True,
    ),
)


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    """What git knows, and what it would add."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in listed.splitlines():
            if (REPO / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPO / name, Path(folder) / name)
        yield Path(folder)


def run(tree: Path, tests: Sequence[str]) -> tuple[bool, str]:
    """Whether they pass, and what is said of the first that does not. Raises RuntimeError where they could not be run."""
    variables = {**os.environ, "PYTHONPATH": str(tree), "HVD_ECSGD_REQUIRE_ALL": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--color=no", *tests]
    job = subprocess.Popen(command, cwd=tree, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = job.communicate(timeout=LIMIT)
    except BaseException:
        job.send_signal(signal.SIGINT)  # it ends the ranks that it has started
        try:
            job.communicate(timeout=60)
        finally:
            job.kill()
        raise
    if job.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {job.returncode}:\n{said[-3000:]}")
    errors = re.findall(r"^E +(?:AssertionError: )?(.+)$", said, re.MULTILINE)
    of_ranks = [e for e in errors if re.match(r"FAILED |rank \d+: |[\w.]*(Error|Warning): (?!Horovod detected)", e)]
    limit = [e for e in errors if _LIMIT_REACHED in e]
    return job.returncode == 0, (limit or of_ranks or errors or [""])[0][:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which faults there are, and whether they can be planted")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    faults = [f for f in FAULTS if not options.words or any(word in f.what for word in options.words)]
    bad = 0 if faults else 1
    for fault in faults:  # before anything is run
        place = "ranks  " if fault.ranks else "process"
        try:
            fault.planted((REPO / fault.file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            bad, place = bad + 1, f"ERROR   {error}:"
        if options.list or place.startswith("ERROR"):
            print(f"{place} {fault.what}")
    if options.list or bad:
        return int(bad > 0)
    with copy_of_tree() as tree:
        sound: set[tuple[str, ...]] = set()
        for fault in faults:
            if fault.tests not in sound:
                passes, said = run(tree, fault.tests)
                if not passes:
                    bad += 1
                    print(f"ERROR    {fault.what}: its tests do not pass without it: {said}", flush=True)
                    continue
                sound.add(fault.tests)
            place, start = tree / fault.file, time.monotonic()
            text = place.read_text(encoding="utf-8")
            place.write_text(fault.planted(text), encoding="utf-8")
            passes, said = run(tree, fault.tests)
            place.write_text(text, encoding="utf-8")
            verdict = "GREEN" if passes else "ERROR" if _LIMIT_REACHED in said else "red"
            bad += verdict != "red"
            print(f"{verdict:8} {fault.what} ({time.monotonic() - start:.0f} s): {said or 'nothing was noticed'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
