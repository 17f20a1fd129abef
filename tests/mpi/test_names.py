"""Names: program_names.py, which waits for stalls and for ranks that are late."""

from __future__ import annotations

import pytest

from tests.mpi.test_mpi_backend import CALLERS, HERE, concluded
from tests.ranks import mpirun


@pytest.mark.parametrize("n", [1, 4])
def test_names(n: int) -> None:
    assert concluded(mpirun(n, HERE / "program_names.py"))


def test_names_without_a_communication_thread() -> None:
    assert concluded(mpirun(3, HERE / "program_names.py", "unthreaded", env=CALLERS))
