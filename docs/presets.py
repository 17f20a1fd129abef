"""Write the tables of presets into docs/choosing.md, methods.md, guarantees.md and algorithms.md, from `hvd_ecsgd.presets`: python docs/presets.py"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hvd_ecsgd.presets import KEPT, LEFT, PRESETS, PROVED, RULES, Preset, needs_attach

REPO = Path(__file__).resolve().parents[1]
START, END = "<!-- presets: written by docs/presets.py -->\n", "<!-- end of presets -->"


def in_short(presets: Sequence[Preset]) -> str:
    head = ("preset", "sent, per worker", "exchange", "unit", "paper")
    return table(head, [(f"`{p.call}`{' †' * needs_attach(p.method)}", p.sent, *exchange_and_unit(p), p.paper) for p in presets])


def in_full(presets: Sequence[Preset]) -> str:
    head = ("preset", "what is sent, per worker", "exchange", "residual in units of", "stock Horovod", "source")
    attached = {p: "yes, attached" if needs_attach(p.method) else "yes" for p in presets}
    return table(head, [(f"`{p.call}`", p.detail, *exchange_and_unit(p), attached[p] + p.horovod_note, p.paper) for p in presets])


def guarantees(presets: Sequence[Preset]) -> str:
    """A row for each preset, and one for those of which the same is kept and proved."""
    rows, groups = [], dict[tuple[str, ...], list[Preset]]()
    for p in presets:
        left = "what is not of a low rank" if p.name == "power_sgd" else LEFT[p.compressor]
        rows.append((f"`{p.call}`", left, exchange_and_unit(p)[1], p.paper))
        what = tuple(said.get(p.name, said[p.rule]) for said in (KEPT, PROVED))
        groups.setdefault(what, []).append(p)
    names = {what: ", ".join(dict.fromkeys(f"`{p.name}`" for p in group)) for what, group in groups.items()}
    sections = {what: ", ".join(dict.fromkeys(p.section for p in group)) for what, group in groups.items()}
    return (
        table(("preset", "left by C", "residual in units of", "paper"), rows)
        + "\n"
        + table(("presets", "kept", "proved", "§"), [(names[what], *what, sections[what]) for what in groups])
    )


def by_rule(presets: Sequence[Preset]) -> str:
    """A row for the presets that have feedback rule and section in common."""
    head = ("preset", "feedback rule", "unit", "momentum and wd", "gradient at", "exchange", "§")
    groups: dict[tuple[str, str, str], list[Preset]] = {}
    for p in presets:
        groups.setdefault((p.section, p.rule, p.unit), []).append(p)
    rows = []
    for (section, rule, unit), group in sorted(groups.items(), key=lambda item: item[0][0]):
        names = ", ".join(dict.fromkeys(f"`{p.name}`" for p in group))
        exchanges = dict.fromkeys(way for p in group for way in p.exchange.split(" or "))
        rows.append((names, f"`{rule}`", unit, *RULES[rule], in_words([*exchanges]), section))
    return table(head, rows)


def exchange_and_unit(preset: Preset) -> tuple[str, str]:
    return preset.exchange + preset.exchange_note, preset.unit + preset.unit_note


def in_words(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in (head, ["---"] * len(head), *rows)).replace(" --- ", "---")


TABLES: dict[str, Callable[[Sequence[Preset]], str]] = {
    "docs/choosing.md": in_short,
    "docs/methods.md": in_full,
    "docs/guarantees.md": guarantees,
    "docs/algorithms.md": by_rule,
}


def updated(file: str, presets: Sequence[Preset] = PRESETS) -> str:
    """The text of `file` with its table made anew."""
    before, _, rest = (REPO / file).read_text(encoding="utf-8").partition(START)
    return before + START + TABLES[file](presets) + END + rest.partition(END)[2]


if __name__ == "__main__":
    for file in TABLES:
        (REPO / file).write_text(updated(file), encoding="utf-8")
