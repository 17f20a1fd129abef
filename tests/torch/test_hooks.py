"""What torch asks of a hook of DDP, of its own hooks and of ours: the same gradients as without one, however DDP is used.

Torch's own are measured with --full, or when the table is written; else those that end soon, with one bucket.
"""

from __future__ import annotations

import json

import pytest

from tests.ranks import REPO, run_job

Outcomes = dict[tuple[str, str], str]
START, END = "<!-- table of hooks: made by the tests -->", "<!-- end of the table of hooks -->"


@pytest.fixture(scope="module")
def everything(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full") or pytestconfig.getoption("--roads-table"))


@pytest.fixture(scope="module")
def found(everything: bool) -> dict[str, Outcomes]:
    said = run_job([], "tests/torch/program_hooks.py", ("everything" if everything else "some",), timeout=1200)
    line = next(line for line in said.splitlines() if line.startswith("{"))
    return {whose: {(row, situation): text for row, situation, text in triples} for whose, triples in json.loads(line).items()}


def test_our_hooks_give_the_gradients_of_ddp_however_it_is_used(found: dict[str, Outcomes]) -> None:
    assert {pair: text for pair, text in found["ours"].items() if text != "yes"} == {}
    assert len(found["ours"]) == 49


def test_of_torchs_own_some_do_and_some_do_not(found: dict[str, Outcomes]) -> None:
    """Control: failures are noticed, and successes are not ours only."""
    one_bucket = {row: text for (row, situation), text in found["torch's"].items() if situation == "one bucket"}
    assert one_bucket["float16"] == "yes"
    assert one_bucket["8 bits, by tensor"] == "IndexError"


def render(found: dict[str, Outcomes]) -> str:
    rows, situations = (list(dict.fromkeys(pair[i] for pair in found["ours"])) for i in range(2))
    lines = [f"| hook | whose | {' | '.join(situations)} |", "|---" * (2 + len(situations)) + "|"]
    for row in rows:
        for whose, outcomes in found.items():
            lines.append(f"| {row} | {whose} | {' | '.join(outcomes[row, s] for s in situations)} |")
    return "\n".join(lines)


def test_the_table_of_the_documentation_is_what_the_tests_find(everything: bool, found: dict[str, Outcomes], pytestconfig: pytest.Config) -> None:
    """docs/roads.md holds it; `pytest tests/torch/test_hooks.py --roads-table` writes it anew. What was not run now is taken from there."""
    document = REPO / "docs" / "roads.md"
    before, _, rest = document.read_text(encoding="utf-8").partition(START)
    held, _, after = rest.partition(END)
    if pytestconfig.getoption("--roads-table"):
        document.write_text(f"{before}{START}\n{render(found)}\n{END}{after}", encoding="utf-8")
        return
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in held.strip().splitlines())
    table: dict[str, Outcomes] = {"torch's": {}, "ours": {}}
    for row, whose, *cells in lines:
        table[whose] |= {(row, situation): cell for situation, cell in zip(head[2:], cells, strict=True)}
    now = {whose: table[whose] | found[whose] for whose in table}
    assert held.strip() == render(now), "run: python -m pytest tests/torch/test_hooks.py --roads-table"
