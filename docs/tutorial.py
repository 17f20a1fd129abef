"""Run the commands of docs/tutorial.md as a reader would, and write what they print below them: python docs/tutorial.py [FOLDER]

Needs mpi_backend's requirements, for the slow network root, and a machine that does nothing else, since the outputs have seconds. FOLDER: where the
commands run (default: a temporary one).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "tutorial.md"
SUDO = 'sudo -E env PATH="$PATH" '
"""Before a command in the page that needs root; who runs this has it."""

PROGRAM = re.compile(r"^```python\n# (?P<name>\w+\.py)\n.*?^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]*) -->\n)?```bash\n(?P<code>(?:(?!```).*\n)+)```\n(?P<output>\n```\n(?:(?!```).*\n)*```\n)?", re.MULTILINE
)


def updated(text: str, folder: Path, environment: Mapping[str, str], runs: Callable[[str], bool]) -> str:
    """`text` with new outputs: programs are written to `folder`, and there those commands run whose reason for not being run ("": none) `runs` takes;
    those that have a reason run in a folder in there, so that they add nothing to the files of the others.

    Raises CalledProcessError, with what was printed, for commands that fail.
    """
    apart = folder / "apart"
    apart.mkdir(exist_ok=True)
    for place, program in product((folder, apart), PROGRAM.finditer(text)):
        (place / program["name"]).write_text(program[0].removeprefix("```python\n").removesuffix("```"), encoding="utf-8")

    def run(found: re.Match[str]) -> str:
        if not runs(found["why"] or ""):
            return found[0]
        code = found["code"].replace(SUDO, "").replace("benchmarks/", f"{REPO}/benchmarks/")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=apart if found["why"] else folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, code, done.stdout, done.stderr)
        return found[0].removesuffix(found["output"] or "") + f"\n```\n{done.stdout}```\n"

    return COMMANDS.sub(run, text)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    from hvd_ecsgd.doctor.processes import environment_of_ranks

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        new = updated(PAGE.read_text(encoding="utf-8"), folder, environment_of_ranks(os.environ), lambda why: not why or "needs root" in why)
    PAGE.write_text(new, encoding="utf-8")
