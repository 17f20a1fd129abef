"""What real scripts do around the optimizer, on two real ranks of both backends; docs/reliability.md says what each means."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.ranks import REPO, horovodrun, mpirun

PROGRAM = "tests/conformance/program_lifecycle.py"


def checks() -> list[str]:
    """Their names, in order, from the program's own list (importing it would start a backend)."""
    text = (REPO / PROGRAM).read_text()
    return [name for line in re.findall(r"^CHECKS \+?= \((.*)\)$", text, re.MULTILINE) for name in line.split(", ")]


@pytest.mark.parametrize(("backend", "launch"), [("mpi", mpirun), ("horovod", horovodrun)], ids=["mpi", "horovod"])
def test_what_scripts_do(backend: str, launch: Callable[..., str]) -> None:
    said = launch(2, PROGRAM, backend)
    assert re.findall(r"^passed (\S+)$", said, re.MULTILINE) == checks()
    assert len(checks()) >= 16
