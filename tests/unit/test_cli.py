"""The `hvd-ecsgd` command says what is there, for every preset."""

from __future__ import annotations

import pytest

from hvd_ecsgd import __version__
from hvd_ecsgd.cli import main
from tests.cases import CASES


def test_methods_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in printed[1:]]
    assert named[:3] == ["none", "fp16", "bf16"] and len(named) == len(set(named)) > 20
    assert {case.name.split("-")[0] for case in CASES} == set(named), "the table of methods has every preset, and no other"


def test_env_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    """(That it imports neither backend is in test_rooms.py.)"""
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"hvd-ecsgd  {__version__}" in printed and "torch" in printed


def test_unknown_command_is_an_error() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compress"])
    assert stop.value.code == 2
