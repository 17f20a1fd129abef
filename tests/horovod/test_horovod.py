"""hvd_ecsgd on an unmodified Horovod: programs on real ranks, several checks in each."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.cases import CASES, COVERING, PAIRS
from tests.ranks import horovodrun, mpirun

FOLDER = "tests/horovod"


def passed(launch: Callable[..., str], n: int, program: str, *names: str) -> list[str]:
    """Names of the checks that passed; a failed one makes the program's status non-zero."""
    return re.findall(r"^passed (\S+)$", launch(n, f"{FOLDER}/{program}", *names), re.MULTILINE)


@pytest.mark.parametrize(("launch", "n"), [(horovodrun, 2), (mpirun, 3)], ids=["horovodrun-2", "mpirun-3"])
def test_every_method_is_its_simulation(launch: Callable[..., str], n: int, pytestconfig: pytest.Config) -> None:
    """Same bits on all ranks; the simulation's bits on two ranks (half precision: to rounding). On three, to rounding, what three are another matter
    for: each exchange with each kind of rule. All methods on both with --full."""
    names = [c.name for c in (CASES if pytestconfig.getoption("--full") else COVERING if n == 2 else PAIRS)]
    assert passed(launch, n, "program_methods.py", *names) == [*names, "controls"]


def test_what_users_do() -> None:
    """Hook orders, unused parameters, groups, several passes, sums, memory formats, types, sparse gradients, schedules, resuming, clipping, NaN,
    switching methods, skipped bytes, telemetry, waiting."""
    assert len(passed(horovodrun, 2, "program_variants.py")) == 17


def test_mistakes_are_told_to_every_rank() -> None:
    assert len(passed(horovodrun, 2, "program_errors.py")) == 18


def test_what_scripts_do_to_gradients() -> None:
    assert len(passed(horovodrun, 2, "program_gradients.py")) == 9


def test_a_failing_check_ends_the_job_at_once() -> None:
    """Control of the programs themselves, of those of conformance tests too: a check fails on one rank, for which the other waits; the job ends long
    before its time limit, and says why."""
    program = """
        from tests.horovod.programs import hvd, run_checks
        def check():
            assert hvd.rank() == 0, "on purpose"
            hvd.broadcast_object(1, 0, name="awaited")
            hvd.barrier()
        hvd.init()
        run_checks({"check": check})
        print("got through")
    """
    said = horovodrun(2, program, expect_failure=True)
    assert "FAILED check" in said and "got through" not in said
    assert "on purpose" in said
