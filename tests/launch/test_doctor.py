"""`hvd-ecsgd doctor` as a script calls it, on real ranks of every road."""

from __future__ import annotations

import json
import subprocess
import sys

from hvd_ecsgd.kernels.native import native_library
from tests.ranks import REPO, rank_environment, require_horovod, require_mpirun


def test_every_road_is_found_to_work() -> None:
    require_mpirun()
    require_horovod()
    command = [sys.executable, "-c", "import sys; from hvd_ecsgd.cli import main; sys.exit(main(['doctor', '--json', '--limit', '400']))"]
    done = subprocess.run(command, cwd=REPO, env=rank_environment(), capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    by_name = {(f["part"], f["name"]): f for f in found["findings"]}
    states = {name: f["state"] for (part, name), f in by_name.items() if part == "roads"}
    assert states == dict.fromkeys(("mpi_backend under mpirun", "Horovod under horovodrun", "torch.distributed under torchrun"), "ok")
    assert found["ok"] and "gloo" in by_name["Horovod", "build"]["what"] and "gloo" in by_name["torch", "distributed"]["what"]
    library = native_library()
    assert library is None or library.variant in by_name["kernels", "compiled"]["what"]
    assert all(f["remedy"] for f in found["findings"] if f["state"] == "broken")
