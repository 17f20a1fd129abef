"""What the documentation shows is true: its code runs, its links lead somewhere, its chart is the advisor's, and the README fits a terminal."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_ecsgd.torch_backend as backend
from hvd_ecsgd import Compression
from hvd_ecsgd.advisor import Cost, Network, recommended, step_seconds
from hvd_ecsgd.transport import SelfTransport
from hvd_ecsgd.transport.echo import Sent

REPO = Path(__file__).resolve().parents[2]
TUTORIAL = "docs/tutorial.md"
"""Its programs and commands are run by tests/launch/test_tutorial.py."""

PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f.relative_to(REPO).as_posix() for f in (REPO / "docs").glob("*.md")))
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]{10,}) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, code, the reason why it is not run) of each block that names its language; others are outputs and drawings."""
    return [(m["language"], m["code"], m["why"] or "") for m in BLOCK.finditer(text)]


def unmarked(text: str) -> list[str]:
    """Blocks that nothing runs, and that do not say why."""
    return [code for language, code, why in blocks(text) if not why and language != "python"]


@pytest.mark.parametrize("page", PAGES)
def test_code_is_run_or_says_why_not(page: str) -> None:
    assert page == TUTORIAL or unmarked((REPO / page).read_text(encoding="utf-8")) == []


def test_what_is_not_marked_is_seen() -> None:
    assert unmarked("a\n\n```bash\nls\n```\n") == ["ls\n"] and unmarked("<!-- not run: it has no reason -->\n```bash\nls\n```\n") == []
    assert blocks("```\noutput\n```\n```python\n1\n```\n") == [("python", "1\n", "")]


def names() -> dict[str, Any]:
    """What the code of the pages takes for granted: a model and what belongs to it."""
    model = torch.nn.Linear(64, 32, device="cpu", dtype=torch.float32)
    compression = Compression.double_squeeze().bind(model)
    optimizer = backend.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compression)
    parallel = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 32, device="cpu", dtype=torch.float32))
    return {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "epoch": 3,
        "compression": compression,
        "parallel_model": parallel,
        "optimizer_of_parallel_model": torch.optim.SGD(parallel.parameters(), lr=0.1),
        "transport": SelfTransport(),
        "gradients": {name: torch.ones_like(p) for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != TUTORIAL and any(b[0] == "python" and not b[2] for b in blocks((REPO / p).read_text(encoding="utf-8")))]
)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, on torch_backend in place of Horovod: the blocks of a page one after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    backend.init()
    try:
        known = names()
        for language, code, why in blocks((REPO / page).read_text(encoding="utf-8")):
            if language == "python" and not why:
                code = code.replace("import horovod.torch as hvd", "import hvd_ecsgd.torch_backend as hvd")
                exec(compile(code, page, "exec"), known)
        if page == "README.md":
            assert set(known["means"]) == set(known["gradients"]) and (tmp_path / "checkpoint" / "manifest.json").exists()
        elif page == "docs/reliability.md":
            assert known["loaded"].extras["epoch"] == 3
    finally:
        backend.shutdown()


def dead_links(page: str, text: str) -> list[str]:
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL))
    return [link for link in found if "://" not in link and not (REPO / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert dead_links(page, (REPO / page).read_text(encoding="utf-8")) == []
    assert dead_links(page, "[a](no/such.md#x)") == ["no/such.md"]


def test_the_readme_fits_a_terminal() -> None:
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


# The example of docs/choosing.md: seconds of kernels, and what a worker sends, as shares of the model's bytes.
MODEL = 100_000_000
KERNELS = {"none": 0.0, "fp16": 0.03, "power_sgd(2)": 0.1, "detached(64)": 0.03}
SENT: Mapping[str, list[tuple[str, float]]] = {
    "none": [("allreduce", 1.0)],
    "fp16": [("allreduce", 0.5)],
    "power_sgd(2)": [("allreduce", 1 / 800), ("allreduce", 1 / 800)],
    "detached(64)": [("allreduce", 1 / 64)],
}
RATES = (("100 Mbit/s", 1e8), ("1 Gbit/s", 1e9), ("5 Gbit/s", 5e9), ("10 Gbit/s", 1e10), ("25 Gbit/s", 2.5e10), ("100 Gbit/s", 1e11))


def chart() -> str:
    """A row for each rate: milliseconds of a step of each method, and what is recommended."""
    rows = [["link", *(f"`{name}`" for name in KERNELS), "recommended"], ["---"] * (2 + len(KERNELS))]
    for name, rate in RATES:
        # Seconds of 100 MB for each operation: of an all-reduce 2·3/4 of them go over a link, of an all-to-all 3/4, of an all-gather 3 times as many.
        times = {"allreduce": 1.5, "alltoall": 0.75, "allgather": 3.0}
        network = Network(4, {op: [(0, 2e-4), (MODEL, 2e-4 + factor * 8 * MODEL / rate)] for op, factor in times.items()}, 1.0)
        costs = {m: Cost(KERNELS[m], [Sent(op, int(share * MODEL)) for op, share in sent], 0) for m, sent in SENT.items()}
        seconds = {m: step_seconds(0.25, cost, network, MODEL) for m, cost in costs.items()}
        rows.append([name, *(f"{1e3 * seconds[m]:.0f}" for m in KERNELS), f"`{recommended(seconds)}`"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_chart_is_the_advisors() -> None:
    assert chart() in (REPO / "docs" / "choosing.md").read_text(encoding="utf-8"), f"docs/choosing.md should have\n{chart()}"
    recommendations = [row.split("|")[-2].strip() for row in chart().splitlines()[2:]]
    assert "`none`" in recommendations and len(set(recommendations)) > 1


def test_links_that_leave_the_pages_of_the_site_are_text() -> None:
    """`mkdocs build --strict`, a part of launch/test.sh, fails at those that are left and lead nowhere."""
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location("pages_of_the_site", REPO / "docs" / "site" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.rewritten("[a](docs/design.md#rooms) [b](CONTRIBUTING.md) [c](https://c.org)", "") == (
        "[a](design.md#rooms) [b](contributing.md) [c](https://c.org)"
    )
    assert module.rewritten("[a](design.md) [README](../README.md) [it](../setup.py) [`setup.py`](../setup.py) [x](no.md)", "docs") == (
        "[a](design.md) [README](index.md) it (`setup.py`) `setup.py` [x](no.md)"
    )
