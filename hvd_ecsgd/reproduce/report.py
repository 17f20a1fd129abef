"""What a reproduction ends with: tables, claims with their verdicts, a plot, and all of it as JSON."""

from __future__ import annotations

import importlib
import json
import math
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tables import Table, markdown_row

__all__ = ["Claim", "Report", "Spread", "Table", "need", "seeds"]


def need(module: str) -> Any:
    """Import what only examples need, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise SystemExit(f"hvd-ecsgd reproduce needs {package}: pip install '.[examples]' in a clone, or pip install {package}.") from error


@dataclass(frozen=True)
class Spread:
    """One figure over all seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Of the seeds, not of their mean; 0 with one seed, NaN where a run has diverged."""
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def above(self, other: Spread) -> bool:
        """By more than either spreads over the seeds."""
        return self.mean > other.mean + max(self.sd, other.sd)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.sd:{spec}}" if len(self.values) > 1 else f"{self.mean:{spec}}"


@dataclass(frozen=True)
class Claim:
    """What a paper claims (or a contract of ours predicts), what was measured here, and whether the numbers agree."""

    claim: str
    measured: str
    agrees: bool

    @property
    def verdict(self) -> str:
        return "agrees" if self.agrees else "DOES NOT AGREE"


@dataclass
class Report:
    """`figures` are the raw numbers by seed, for the JSON; `draw(pyplot)` returns the figure."""

    title: str
    setting: str
    tables: list[Table]
    claims: list[Claim]
    figures: dict[str, Any]
    draw: Callable[[Any], Any]
    seconds: float = 0.0

    def text(self) -> str:
        parts = [f"{self.title}\n{'=' * len(self.title)}", _wrapped(self.setting), *[table.text() for table in self.tables]]
        for c in self.claims:
            parts.append("\n".join([_wrapped(c.claim, "paper:  "), _wrapped(c.measured, "here:   "), f"        {c.verdict}"]))
        parts.append(f"{sum(c.agrees for c in self.claims)} of {len(self.claims)} claims agree ({self.seconds:.0f} s).")
        return "\n\n".join(parts)

    def markdown(self) -> str:
        claims = [markdown_row((c.claim, c.measured, c.verdict if c.agrees else f"**{c.verdict.lower()}**")) for c in self.claims]
        parts = [f"## {self.title}", f"{self.setting}. It took {self.seconds:.0f} s.", *[table.markdown() for table in self.tables]]
        return "\n\n".join([*parts, "\n".join([markdown_row(("the paper claims", "here", "")), markdown_row(["---"] * 3), *claims])]) + "\n"

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write name.json, name.md and name.png; the files."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "title": self.title,
            "setting": self.setting,
            "tables": [{"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]} for t in self.tables],
            "claims": [{"paper": c.claim, "measured": c.measured, "agrees": c.agrees} for c in self.claims],
            "figures": self.figures,
            "seconds": round(self.seconds, 1),
        }
        files = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
        files[0].write_text(json.dumps(_plain(data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        files[1].write_text(self.markdown(), encoding="utf-8")
        need("matplotlib").use("Agg")
        figure = self.draw(need("matplotlib.pyplot"))
        figure.savefig(files[2], dpi=120)
        return files


def _wrapped(text: str, label: str = "") -> str:
    return textwrap.fill(label + text, 110, subsequent_indent=" " * len(label), break_on_hyphens=False)


def seeds(n: int) -> str:
    """For titles."""
    return "1 seed" if n == 1 else f"{n} seeds, mean ± standard deviation"


def _plain(value: Any) -> Any:
    """What JSON can hold: no NaN or infinity, no dataclasses."""
    if isinstance(value, Spread):
        return {"mean": _plain(value.mean), "sd": _plain(value.sd), "by_seed": _plain(list(value.values))}
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
