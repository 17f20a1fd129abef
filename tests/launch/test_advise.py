"""`hvd-ecsgd advise` on the ranks of a job. What it says of this machine is not looked at: other tests run beside."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hvd_ecsgd.advisor import CANDIDATES
from tests.ranks import mpirun, run_job

PROGRAM = """
    import sys
    from hvd_ecsgd.cli import main

    if __name__ == "__main__":
        sys.exit(main(["advise", *sys.argv[1:]]))
"""


def test_under_mpirun(tmp_path: Path) -> None:
    said = mpirun(2, PROGRAM, "--parameters", "1e5", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["methods"]) == set(CANDIDATES) and found["recommended"] in CANDIDATES
    assert all(row["seconds"] >= found["compute"] > 0 and row["kernels"] > 0 for row in found["methods"].values())
    assert said.count("<- recommended") == 1 and said.count("2 ranks; a small all-reduce takes") == 1, "one rank speaks for all"
    assert ("Do not compress" in said) == (found["recommended"] == "none")
    assert (tmp_path / "a.svg").stat().st_size > 10_000


def test_under_torchrun_with_a_model_of_ones_own() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    said = run_job(launcher, PROGRAM, ("--model", "tests.problems:mlp", "--compute", "10", "--methods", "none", "top_k(100)"))
    assert "1,669 parameters, 10000 ms of computation" in said
    assert "Do not compress: no method" in said, "ten seconds of computation hide everything"
