"""The `hvd-ecsgd` command says what is there, for every preset, without importing Horovod or MPI."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvd_ecsgd import Compression, __version__
from hvd_ecsgd.cli import PRESETS, main


def test_methods_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == list(PRESETS)


def test_presets_are_all_of_compression() -> None:
    """A preset that is missing in the command's list fails here."""
    callables = {
        name
        for name, value in vars(Compression).items()
        if not name.startswith("_") and (isinstance(value, staticmethod) or name in ("none", "fp16", "bf16"))
    }
    assert callables == set(PRESETS)


def test_env_prints_versions_and_imports_neither_backend() -> None:
    code = "import sys; from hvd_ecsgd.cli import main; main(['env']); print('loaded', [m for m in ('horovod', 'mpi4py') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"hvd-ecsgd  {__version__}" in printed and "torch" in printed
    assert printed.rstrip().endswith("loaded []")


def test_unknown_command_is_an_error() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compress"])
    assert stop.value.code == 2
