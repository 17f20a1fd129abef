"""Every method, saved by real ranks and loaded by new processes, as many or fewer or more: on MPI and on an unmodified Horovod."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases import CASES
from tests.ranks import horovodrun, mpirun

PROGRAM = "tests/conformance/program_resume.py"
ENV = {"OMPI_MCA_mpi_yield_when_idle": "1", "HOROVOD_FUSION_THRESHOLD": "0"}
"""Three ranks on two cores: let the others work while waiting. Horovod without fusion adds in one order, whatever becomes ready first."""

LAUNCH: dict[tuple[str, int], Callable[..., str]] = {("mpi", 2): mpirun, ("mpi", 3): mpirun, ("horovod", 2): horovodrun, ("horovod", 3): mpirun}
pytestmark = pytest.mark.timeout(1200)  # the first test of each backend starts four jobs; each has a limit of its own

OTHER = {2: 3, 3: 2}

Results = dict[str, list[dict[str, Any]]]
"""Method → what each rank found."""


def launch(backend: str, n: int, task: str, folder: Path, *sizes: int) -> None:
    said = LAUNCH[backend, n](n, PROGRAM, backend, task, str(folder), *map(str, sizes), timeout=280, env=ENV)
    assert "done" in said, said


@pytest.fixture(scope="session", params=["mpi", "horovod"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A backend, and what its jobs of 2 and of 3 ranks saved."""
    folder = tmp_path_factory.mktemp(request.param)
    for n in OTHER:
        (folder / f"{request.param}-{n}").mkdir()
        launch(request.param, n, "save", folder)
    return request.param, folder


def found(folder: Path, backend: str, saved_size: int, n: int) -> Results:
    everyone = [json.loads((folder / f"{backend}-{saved_size}" / f"load-{n}-rank{r}.json").read_text()) for r in range(n)]
    return {name: [rank[name] for rank in everyone] for name in everyone[0]}


@pytest.fixture(scope="session")
def loaded(saved: tuple[str, Path]) -> tuple[str, dict[tuple[int, int], Results]]:
    """(saved by, loaded by) so many ranks → results, on one backend."""
    backend, folder = saved
    results = {}
    for n, other in OTHER.items():
        launch(backend, n, "load", folder, n, other)
        for before in (n, other):
            results[before, n] = found(folder, backend, before, n)
    return backend, results


def expected(backend: str) -> list[str]:
    return [c.name for c in CASES if backend == "mpi" or c.stock_horovod]


def test_resumed_in_new_processes_every_method_goes_on_bit_for_bit(loaded: tuple[str, dict[tuple[int, int], Results]]) -> None:
    """4 steps, save, new processes, load, 3 steps: weights, optimizer and state of 7 steps, on 2 ranks and on 3."""
    backend, results = loaded
    for n in OTHER:
        assert list(results[n, n]) == expected(backend)
        assert [name for name, ranks in results[n, n].items() if not all(r["bit-exact"] for r in ranks)] == []


def test_without_the_state_it_is_another_run(loaded: tuple[str, dict[tuple[int, int], Results]]) -> None:
    """Control: model and optimizer alone do not lead there."""
    for n in OTHER:
        found = {name: ranks[0]["same without the state"] for name, ranks in loaded[1][n, n].items() if "same without the state" in ranks[0]}
        assert found == {"none": True, "top_k": False, "random_block": False, "double_squeeze": False}


def test_on_another_number_of_ranks_the_mean_residual_is_kept(loaded: tuple[str, dict[tuple[int, int], Results]]) -> None:
    """2 → 3 and 3 → 2 ranks: to one rounding in float32, and all ranks go on with the same bits."""
    backend, results = loaded
    for n, other in OTHER.items():
        assert list(results[other, n]) == expected(backend)
        for name, ranks in results[other, n].items():
            assert all(r["equal"] for r in ranks), (backend, name, n)
            assert all(r["change"] <= 2.0**-24 for r in ranks), (backend, name, n, ranks)
