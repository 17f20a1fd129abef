"""Telemetry on real ranks whose buckets are exchanged in a thread; on Horovod and DDP's hook it is in their programs."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import mpirun


def test_each_rank_may_write_a_file_of_its_own(tmp_path: Path) -> None:
    """And trains to the same bits as without."""
    assert "ok " in mpirun(2, "tests/mpi/program_telemetry.py", str(tmp_path))
    names = [f"{method}{rank}.jsonl" for method in ("detached", "double_squeeze") for rank in ("", ".rank1")]
    assert sorted(f.name for f in tmp_path.iterdir()) == names
