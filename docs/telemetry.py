"""Write the table of fields into docs/telemetry.md, from `hvd_ecsgd.telemetry.FIELDS`: python docs/telemetry.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvd_ecsgd.tables import markdown_row
from hvd_ecsgd.telemetry import FIELDS, Field

FILE = Path(__file__).with_suffix(".md")
START, END = "<!-- fields: written by docs/telemetry.py -->\n", "<!-- end of fields -->"
PLACES = {"step": "record", "group": "group", "both": "record, group"}


def updated(fields: Sequence[Field] = FIELDS) -> str:
    """The text of docs/telemetry.md with its table made anew."""
    before, _, rest = FILE.read_text(encoding="utf-8").partition(START)
    rows = [("name", "in", "meaning"), ("---",) * 3, *((f"`{f.name}`", PLACES[f.where], f.meaning) for f in fields)]
    return before + START + "".join(markdown_row(row) + "\n" for row in rows) + END + rest.partition(END)[2]


if __name__ == "__main__":
    FILE.write_text(updated(), encoding="utf-8")
