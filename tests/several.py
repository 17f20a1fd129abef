"""One rank of several scripts: `several.py "SCRIPT [ARGUMENT…]"…` runs one after the other, as Python would. A start takes longer than many do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch  # noqa: F401  # tests/ranks.py looks for it here

for line in sys.argv[1:]:
    sys.argv = line.split()
    folder = str(Path(sys.argv[0]).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
