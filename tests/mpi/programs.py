"""One rank of several programs, one after the other: `programs.py NAME…` runs program_NAME.py. A start takes longer than most of them.

Rank 0 prints the name of each that begins. The first that fails ends the job, so its name is the last one.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch  # noqa: F401  # tests/ranks.py looks for it here
from mpi4py import MPI

import mpi_backend

for name in sys.argv[1:]:
    if MPI.COMM_WORLD.Get_rank() == 0:
        print(f"program {name}", flush=True)
    runpy.run_path(str(Path(__file__).with_name(f"program_{name}.py")), run_name="__main__")
    if mpi_backend.is_initialized():
        mpi_backend.shutdown()
