"""The tutorial's commands print what it says they print, but for numbers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import REPO, rank_environment, require_mpirun


@pytest.fixture(scope="module")
def tutorial() -> Any:
    spec = importlib.util.spec_from_file_location("tutorial", REPO / "docs" / "tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_numbers(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[-–\d][\d.e+%-]*(?=\s|,|$)", "N", text))


def test_it_runs_as_it_is_written(tutorial: Any, tmp_path: Path) -> None:
    """But for the number of steps: a third of them."""
    require_mpirun()
    written = tutorial.PAGE.read_text(encoding="utf-8")
    assert written.count("range(150)") == 1
    text = written.replace("range(150)", "range(50)")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hvd-ecsgd").write_text("#!/bin/sh\nexec python -c 'import sys; from hvd_ecsgd.cli import main; sys.exit(main())' \"$@\"\n")
    (tmp_path / "bin" / "hvd-ecsgd").chmod(0o755)  # of these sources, whatever is installed
    environment = rank_environment()
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    new = tutorial.updated(text, tmp_path, environment, lambda why: not why)
    assert without_numbers(new) == without_numbers(text)
    accuracy, sent = ([float(number) for number in re.findall(pattern, new)] for pattern in (r": accuracy ([\d.]+),", r"([\d.]+) MB sent of"))
    assert max(accuracy[:2]) - min(accuracy[:2]) < 0.15 and min(accuracy[:2]) > 0.35 and sent[0] > 20 * sent[1]


def test_outputs_are_replaced_and_failures_told(tutorial: Any, tmp_path: Path) -> None:
    text = "```python\n# a.py\nprint(1)\n```\n\n```bash\npython a.py\n```\n\n```\nold\n```\n"
    environment = rank_environment()
    assert tutorial.updated(text, tmp_path, environment, lambda why: not why) == text.replace("old", "1")
    assert tutorial.updated(text.replace("\n```\nold\n```\n", ""), tmp_path, environment, lambda why: not why) == text.replace("old", "1")
    marked = text.replace("```bash", "<!-- not run: why -->\n```bash")
    assert tutorial.updated(marked, tmp_path, environment, lambda why: not why) == marked
    with pytest.raises(subprocess.CalledProcessError):
        tutorial.updated(text.replace("python a.py", "false\npython a.py"), tmp_path, environment, lambda why: True)
