"""One rank of: whole scripts one after the other, as a launcher would start each.  program_migration.py PORT,… SCRIPT…

Each script has a port to meet at, and runs in a folder of its own that the ranks share.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from mpi4py import MPI  # which then ends MPI, and not the first of the scripts


def main(ports: str, *scripts: str) -> None:
    warnings.simplefilter("ignore")
    assert MPI.Is_initialized()
    os.environ |= {"RANK": os.environ["OMPI_COMM_WORLD_RANK"], "WORLD_SIZE": os.environ["OMPI_COMM_WORLD_SIZE"], "MASTER_ADDR": "127.0.0.1"}
    for port, script in zip(ports.split(","), scripts, strict=True):
        os.environ["MASTER_PORT"] = port
        folder = Path(script).with_suffix("")
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        sys.argv = [script]
        if os.environ["RANK"] == "0":
            print(f"== {Path(script).name}", flush=True)
        runpy.run_path(script, run_name="__main__")
        assert not dist.is_initialized()


if __name__ == "__main__":
    main(*sys.argv[1:])
