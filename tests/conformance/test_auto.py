"""`Compression.auto` on real ranks of each road; what it chooses by which times is tested with simulated clocks (tests/unit/test_auto.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import horovodrun, mpirun


@pytest.mark.parametrize(("backend", "launch"), [("mpi", mpirun), ("horovod", horovodrun), ("ddp", mpirun)], ids=["mpi", "horovod", "ddp"])
def test_all_ranks_choose_the_same(backend: str, launch: Callable[..., str], tmp_path: Path) -> None:
    said = launch(2, "tests/conformance/program_auto.py", backend, str(tmp_path / "meet"))
    assert all(f"rank {r} of 2: all right" in said for r in range(2)), said
