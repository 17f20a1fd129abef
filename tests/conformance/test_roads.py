"""Whether steps end in the same bits on every road: simulated, by mpi_backend, by Horovod, by torch_backend and by DDP's hook, on 2 and 3 ranks.

30 steps of all methods with --full, or when the table is written; else 6 of one method of every kind of exchange, on 3 ranks. That two ranks
are the simulation is tested always, too: tests/mpi/test_methods.py, tests/horovod/test_horovod.py, tests/torch/test_ddp.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import roads
from tests.cases import CASES, KINDS, Case, bound_method, by_name
from tests.ranks import REPO, mpirun, require_horovod
from tests.roads import END, HORIZON, ROADS, SHORT, SIZES, START, letters, letters_of, render, rows, simulated

PROGRAM = "tests/conformance/program_roads.py"
IN_ORDER = {"HOROVOD_FUSION_THRESHOLD": "0"}
"""Horovod then adds in one order, whatever becomes ready first."""


@pytest.fixture(scope="session")
def everything(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full") or pytestconfig.getoption("--roads-table"))


@pytest.fixture(scope="session")
def cases(everything: bool) -> tuple[Case, ...]:
    return CASES if everything else (*KINDS, by_name("top_k-k"))  # of which no all-reduce adds anything


@pytest.fixture(scope="session")
def steps(everything: bool) -> int:
    return HORIZON if everything else SHORT


@pytest.fixture(scope="session")
def found(everything: bool, steps: int, cases: tuple[Case, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """method → number of ranks → letters, one for each road. One start for each number of ranks."""
    require_horovod()
    results: dict[str, dict[int, str]] = {case.name: {} for case in cases}
    for n in SIZES if everything else [3]:
        folder = tmp_path_factory.mktemp(f"roads-{n}")
        said = mpirun(n, PROGRAM, str(folder), str(steps), *(c.name for c in cases), env=IN_ORDER)
        assert all(f"rank {r} of {n}: done" in said for r in range(n))
        first, *others = (json.loads((folder / f"rank{r}.json").read_text()) for r in range(n))
        assert all(other == first for other in others), "ranks hold different bits"
        for case in cases:
            results[case.name][n] = letters([simulated(case, n, steps).weights, *(first[road][case.name] for road in ROADS[1:])])
    return results


def test_on_three_ranks_only_horovods_sums_differ(cases: tuple[Case, ...], steps: int, found: dict[str, dict[int, str]]) -> None:
    """What no all-reduce added is the same on every road, and what one added on all but Horovod's: of messages as small as these. The control is a
    dense mean, whose three terms MPI adds in an order of its own there."""
    alone = [case for case in cases if not simulated(case, 3, steps).summed]
    assert alone and {c.name: set(found[c.name][3]) for c in alone} == {c.name: {"a"} for c in alone}
    assert simulated(CASES[0], 3, steps).summed and found["none"][3][ROADS.index("Horovod")] == "b"
    others = [i for i, road in enumerate(ROADS) if road != "Horovod"]
    assert {c.name: {found[c.name][3][i] for i in others} for c in cases} == {c.name: {"a"} for c in cases}


def test_what_runs_always_stands_for_every_kind_of_exchange() -> None:
    kinds = {(type(bound_method(c).exchange), c.exact) for c in CASES}
    assert {(type(bound_method(c).exchange), c.exact) for c in KINDS} == kinds and len(KINDS) == len(kinds)


def test_the_table_of_the_documentation_is_what_the_tests_find(found: dict[str, dict[int, str]], pytestconfig: pytest.Config) -> None:
    """docs/roads.md holds it; `pytest tests/conformance/test_roads.py --roads-table` writes it anew."""
    document = Path(REPO / "docs" / "roads.md")
    before, _, rest = document.read_text(encoding="utf-8").partition(START)
    held, _, after = rest.partition(END)
    table = render(found, {} if pytestconfig.getoption("--roads-table") else rows(held))
    if pytestconfig.getoption("--roads-table"):
        document.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    else:
        assert held.strip() == table, "run: python -m pytest tests/conformance/test_roads.py --roads-table"
    assert list(rows(table)) == [c.name for c in CASES]
    assert {c.name: set(letters_of(rows(table)[c.name])[2]) for c in CASES if c.exact} == {c.name: {"a"} for c in CASES if c.exact}
    assert [row for row in rows(table).values() if len(row) != len(ROADS) + 1 or "?" in row[-1] or set(row[0]) != {"a"}] == []
    assert [name for name, row in rows(table).items() if ("".join(row[:-1]).strip("a") == "") != (row[-1] == "")] == []


def test_letters_tell_equal_from_different() -> None:
    """Control."""
    assert letters(["x", "x", "y", "x", "z"]) == "aabac"
    assert roads.why(CASES[1], {2: "aabaa", 3: "aaaaa"}) != ""
    assert roads.why(CASES[0], {2: "aabaa", 3: "aaaaa"}) == "?"
