"""Methods saved by real ranks and loaded by new processes, as many or fewer or more: on MPI and on an unmodified Horovod. All of them with --full, or
when the table is written; else on 2 ranks one of each kind of exchange and of rule, and of exchange alone where 3 ranks save or load. In one process
every one is saved and loaded always (tests/unit/test_state.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import reliability
from tests.cases import CASES, KINDS, PAIRS
from tests.ranks import REPO, horovodrun, mpirun
from tests.reliability import Results

PROGRAM = "tests/conformance/program_resume.py"
IN_ORDER = {"HOROVOD_FUSION_THRESHOLD": "0"}
"""For three ranks of Horovod, which then adds in one order, whatever becomes ready first. Two ranks have one order only."""

LAUNCH: dict[tuple[str, int], Callable[..., str]] = {("mpi", 2): mpirun, ("mpi", 3): mpirun, ("horovod", 2): horovodrun, ("horovod", 3): mpirun}
pytestmark = pytest.mark.timeout(3000)  # the first test of each backend starts four jobs; each has a limit of its own

OTHER = {2: 3, 3: 2}
SOME = ("none", "top_k", "random_block", "double_squeeze")
BACKENDS = ("mpi", "horovod")
Names = Callable[[int, int], list[str]]


def launch(backend: str, n: int, task: str, folder: Path, *sizes: int, in_order: bool = True) -> None:
    env = IN_ORDER if in_order and n > 2 else {}
    said = LAUNCH[backend, n](n, PROGRAM, backend, task, str(folder), *map(str, sizes), env=env)
    assert "done" in said, said


def found(folder: Path, n: int) -> dict[str, list[dict[str, Any]]]:
    everyone = [json.loads((folder / f"load-{n}-rank{r}.json").read_text()) for r in range(n)]
    return {name: [rank[name] for rank in everyone] for name in everyone[0]}


@pytest.fixture(scope="session")
def everything(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full") or pytestconfig.getoption("--reliability-table"))


@pytest.fixture(scope="session")
def names(everything: bool) -> Names:
    """By how many ranks saved, and how many load."""

    def of(saved: int, n: int) -> list[str]:
        return [c.name for c in CASES if everything or c in (PAIRS if saved == n == 2 else KINDS) or c.name in SOME]

    return of


@pytest.fixture(scope="session")
def loaded(everything: bool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """What the jobs of a backend found; they run once."""
    which = "" if everything else "-kinds"

    @cache
    def run(backend: str) -> Results:
        root = tmp_path_factory.mktemp(backend)
        for n in OTHER:
            (root / f"{backend}-{n}").mkdir()
            launch(backend, n, f"save{which}", root)
        for n, other in OTHER.items():
            launch(backend, n, f"load{which}", root, n, other)
        return {(before, n): found(root / f"{backend}-{before}", n) for n in OTHER for before in OTHER}

    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_in_new_processes_every_method_goes_on_bit_for_bit(backend: str, names: Names, loaded: Callable[[str], Results]) -> None:
    """4 steps, save, new processes, load, 2 steps: weights, optimizer and state of 6 steps, on 2 ranks and on 3 (of Horovod: without fusion)."""
    for n in OTHER:
        assert list(loaded(backend)[n, n]) == names(n, n)
        assert [name for name, ranks in loaded(backend)[n, n].items() if not all(r["bit-exact"] for r in ranks)] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_state_it_is_another_run(backend: str, loaded: Callable[[str], Results]) -> None:
    """Control: model and optimizer alone do not lead there."""
    for n in OTHER:
        off = {name: ranks[0]["off without the state"] for name, ranks in loaded(backend)[n, n].items() if "off" in ranks[0]}
        assert {name: value > 1e-4 for name, value in off.items()} == {"none": False, "top_k": True, "random_block": True, "double_squeeze": True}


def test_three_ranks_of_horovod_with_fusion_resume_to_rounding(tmp_path: Path) -> None:
    """By default Horovod fuses what is ready, and adds in an order that is a matter of timing. The control is the test above."""
    (tmp_path / "horovod-3").mkdir()
    launch("horovod", 3, "save-some", tmp_path, in_order=False)
    launch("horovod", 3, "load-some", tmp_path, 3, in_order=False)
    assert {name: max(r["off"] for r in ranks) < 1e-5 for name, ranks in found(tmp_path / "horovod-3", 3).items()} == dict.fromkeys(SOME, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_another_number_of_ranks_the_mean_residual_is_kept(backend: str, names: Names, loaded: Callable[[str], Results]) -> None:
    """2 → 3 and 3 → 2 ranks: to one rounding in float32, and all ranks go on with the same bits."""
    for n, other in OTHER.items():
        assert list(loaded(backend)[other, n]) == names(other, n)
        for name, ranks in loaded(backend)[other, n].items():
            assert all(r["equal"] for r in ranks), (backend, name, n)
            assert all(r["change"] <= 2.0**-24 for r in ranks), (backend, name, n, ranks)


def test_the_table_of_the_documentation_is_what_the_tests_find(loaded: Callable[[str], Results], pytestconfig: pytest.Config) -> None:
    """docs/reliability.md holds it; `pytest tests/conformance/test_resume.py --reliability-table` writes it anew.

    The last two columns, of one process, are what tests/unit/test_mixed_precision.py and test_invariants.py look at for every method.
    """
    found = {"MPI": loaded("mpi"), "Horovod": loaded("horovod")}
    document = REPO / "docs" / "reliability.md"
    before, _, rest = document.read_text(encoding="utf-8").partition(reliability.START)
    held, _, after = rest.partition(reliability.END)
    table = reliability.render(found, {} if pytestconfig.getoption("--reliability-table") else reliability.rows(held))
    if pytestconfig.getoption("--reliability-table"):
        document.write_text(f"{before}{reliability.START}\n{table}\n{reliability.END}{after}", encoding="utf-8")
    else:
        assert held.strip() == table, "run: python -m pytest tests/conformance/test_resume.py --reliability-table"
    rows = reliability.rows(table)
    assert list(rows) == [c.name for c in CASES]
    assert not [row for row in rows.values() if any(word in cell for cell in row for word in ("off by", "differ", "moves"))]
    assert not [row for row in rows.values() if len(row) != 4 or "" in row], "a row is not whole"
    assert [c.name for c in CASES if c.conserves and "nothing lost" not in rows[c.name]] == []
