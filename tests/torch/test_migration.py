"""The scripts of docs/from_*.md: each page is the difference of two whole ones, both of which train."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

from tests.ranks import REPO, mpirun, require_horovod

PAGES = ("from_ddp", "from_fsdp2", "from_horovod")


def sides(text: str) -> tuple[str, str]:
    """The script before, and after, of the page's one diff."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = diff.splitlines()
    assert all(line == "" or line[0] in " +-" for line in lines)
    before, after = ("\n".join(line[1:] for line in lines if line == "" or line[0] in signs) + "\n" for signs in (" -", " +"))
    return before, after


def test_both_sides_of_every_page_train(tmp_path: Path) -> None:
    """In one start; what was compressed ends near what was not, and says how much less it has sent."""
    require_horovod()
    scripts = []
    for page in PAGES:
        for side, text in zip(("before", "after"), sides((REPO / "docs" / f"{page}.md").read_text(encoding="utf-8")), strict=True):
            scripts.append(tmp_path / f"{page}-{side}.py")
            scripts[-1].write_text(text, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in scripts]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = ",".join(str(one.getsockname()[1]) for one in sockets)
    said = mpirun(2, "tests/torch/program_migration.py", ports, *map(str, scripts))
    _, *parts = re.split(r"^== ", said, flags=re.MULTILINE)
    assert [part.split("\n")[0] for part in parts] == [s.name for s in scripts]
    losses = [float(re.search(r"loss (\d\.\d+)", part)[1]) for part in parts]  # type: ignore[index]
    assert max(losses) < 1.0 < 2.3, (losses, "2.3 is chance")
    for before, after in zip(parts[::2], parts[1::2], strict=True):
        ratio = re.search(r"a dense exchange would send (\d+\.\d) times as much", after)
        assert ratio is not None and float(ratio[1]) > 5 and "times as much" not in before


def test_a_page_that_is_no_difference_is_noticed() -> None:
    """Control."""
    before, after = sides("x\n```diff\n a\n-b\n+c\n\n d\n```\n")
    assert (before, after) == ("a\nb\n\nd\n", "a\nc\n\nd\n")
