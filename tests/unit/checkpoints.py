"""What tests of checkpoints share: saving and loading a training, and looking at its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvd_ecsgd import checkpoint, load_checkpoint, save_checkpoint
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import by_name
from tests.unit.test_state import Setup

N = 3


CASE = by_name("double_squeeze-everything")


def save(setup: Setup, folder: Path, **options: Any) -> None:
    save_checkpoint(folder, setup.model, setup.optimizer, setup.compression, **options)


def load(setup: Setup, folder: Path) -> checkpoint.Loaded:
    return load_checkpoint(folder, setup.model, setup.optimizer, setup.compression)


def trained(folder: Path, steps: int = 3, name: str = CASE.name, n: int = N, **options: Any) -> None:
    """`folder` holds what n workers saved after so many steps."""

    def worker(transport: Transport) -> None:
        setup = Setup(by_name(name), transport)
        setup.train(0, steps)
        save(setup, folder, **options)

    run_simulated(n, worker)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())  # type: ignore[no-any-return]


def part(folder: Path, r: int) -> Path:
    return folder / str(manifest(folder)["parts"][r]["file"])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "saving.lock"}
