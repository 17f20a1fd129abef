"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "markdown_row"]


@dataclass
class Table:
    """Rows of cells, which are text; the first column is aligned left."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def text(self) -> str:
        cells = [list(self.columns), *[list(row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
        return "\n".join([self.title, "-" * sum(widths, 2 * len(widths) - 2), lines[0], *lines[1:]])

    def markdown(self) -> str:
        return "\n".join([f"{self.title}:", "", markdown_row(self.columns), markdown_row(["---"] * len(self.columns)), *map(markdown_row, self.rows)])


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
