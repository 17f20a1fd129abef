"""`hvd-ecsgd reproduce`: every command runs, and its verdicts follow the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_ecsgd.cli import main
from hvd_ecsgd.reproduce import PAPERS, asynchronous, compskip, detached, doublesqueeze, hessian, skips, stale, topk
from hvd_ecsgd.reproduce.report import Claim, Report, Spread, Table, need
from hvd_ecsgd.reproduce.simulation import Size, run_all


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_runs(paper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At smoke size: a table, a verdict for each claim, JSON that says the same, and a plot."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert main(["reproduce", paper, "--smoke", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / f"{paper}.json").read_text())
    assert (tmp_path / f"{paper}.png").stat().st_size > 10_000
    assert saved["claims"] and saved["tables"] and saved["figures"]
    for table in saved["tables"]:
        for row in table["rows"]:
            assert all(cell in printed for cell in row)
    agreeing = sum(claim["agrees"] for claim in saved["claims"])
    assert f"{agreeing} of {len(saved['claims'])} claims agree" in printed
    assert printed.count("DOES NOT AGREE") == len(saved["claims"]) - agreeing
    page = (tmp_path / f"{paper}.md").read_text()
    assert page.count("**does not agree**") == len(saved["claims"]) - agreeing
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(t["rows"]) + 2 for t in saved["tables"]) + len(saved["claims"]) + 2


def spread(value: float) -> Spread:
    return Spread((value - 0.001, value + 0.001))


def squeeze(double: float = 0.11, mem: float = 0.11, worker: float = 0.2, megabytes: float = 1.0) -> Any:
    loss = {"vanilla": 0.1, "mem_sgd": mem, "double_squeeze": double, "worker_only": worker, "uncompensated": 0.4}
    sent = {"vanilla": 30.0, "mem_sgd": 15.0, "double_squeeze": megabytes, "worker_only": 1.0, "uncompensated": 1.0}
    return {"1 bit": {m: {"loss": spread(loss[m]), "megabytes": spread(sent[m])} for m in loss}}


def clean_and_noisy(none: float = 0.5, ef: float = 0.6, def_: float = 0.75, noisy: float = 0.7) -> Any:
    clean = {"dense": spread(0.79), "no feedback": spread(none), "EF": spread(ef), "DEF": spread(def_)}
    return {"clean, ratio 64": clean, "noisy labels, ratio 16": {"EF": spread(0.65), "DEF": spread(noisy)}}


def silences(accuracy: float = 0.95, sent: float = 0.5, eighth: float = 0.3) -> Any:
    made = {m: {"accuracy": spread(accuracy), "loss": spread(0.2), "megabytes": spread(sent)} for m in compskip.METHODS}
    made["dense"] |= {"accuracy": spread(0.95), "megabytes": spread(30.0)}
    made["1 bit, no skips"] |= {"loss": spread(0.1), "megabytes": spread(1.0)}
    made["workers every 8th"]["loss"] = spread(eighth)
    return made


def promises(shipped: float = 0.95, broken: float = 0.945, down: float = 4.0, none: float = 1.4, ahead: float = 20.0) -> Any:
    def row(accuracy: float, up: float = 4.0, down: float = 4.0) -> Any:
        return {"accuracy": spread(accuracy), "up": spread(up), "down": spread(down)}

    made = {task: {skips.PLAIN: row(0.95, 8.0, 8.0), skips.BROKEN: row(broken)} for task in skips.TASKS}
    for rows in made.values():
        rows |= {m: row(shipped, down=down) for m in skips.SHIPPED}
    return made, {p: {"δ = .6": 0.4, "δ = .6, μ = 0": none, "δ = .6, step-ahead": ahead} for p in skips.PATTERNS}


def quadratics(**changed: float) -> Any:
    z = {p: {r: spread(0.05) for r in hessian.ROWS} for p in hessian.TABLE}
    for p in hessian.TABLE:
        z[p]["A = 0"] = spread(0.5)
        z[p]["A = I - ηH (global)"] = Spread((1e-14,))
    z["n=8, different H"]["A = I - ηH_i with mean e"] = Spread((1e-15,))
    z |= {p: {"A = I": spread(0.05), "A = I - η diag H": spread(0.01)} for p in hessian.DIAGONAL}
    for key, value in changed.items():
        problem, row = {"global_": ("n=1", "A = I - ηH (global)"), "ec": ("n=1", "A = I"), "rotated": ("rotated H", "A = I - η diag H")}[key]
        z[problem][row] = spread(value)
    return z


def text(with_feedback: float = 3.1, violation: float = 1e-6, z: float = 3.1) -> Any:
    made: Any = {m: {"bits": spread(with_feedback)} for m in topk.METHODS}
    for m in ("TopK-SGD", "TopK-SGD, blocks of 512"):
        made[m] |= {"violation": Spread((violation,)), "bits at z": spread(z)}
    return made | {"dense": {"bits": spread(3.0)}, "top-k, no feedback": {"bits": spread(4.0)}}


def arrivals(accuracy: float = 0.95, stalest: float = 7.0, eight: float = 10.0, slow: float = 12.0, cut: float = 12.0) -> Any:
    rows = {f"{m}, τ_max {tau}": {"accuracy": spread(0.95), "stalest": spread(7.0)} for m in asynchronous.METHODS for tau in asynchronous.TAUS}
    rows["1 bit, τ_max 16"]["accuracy"] = spread(accuracy)
    rows |= {f"{m}, τ_max 7": {**rows[f"{m}, τ_max 7"], "stalest": Spread((stalest,))} for m in asynchronous.METHODS}
    time = {f"{m}, {n}": {"time": spread(t)} for m in asynchronous.METHODS[:2] for n, t in (("1 worker", 75.0), ("8 workers", eight))}
    time |= {"1 bit, 8 workers, one 5x slower": {"time": spread(slow)}, "synchronous, 8 workers, one 5x slower": {"time": spread(50.0)}}
    time["cutoff, 8 workers, one 5x slower"] = {"time": spread(cut)}
    return {"grid": rows, "time": time}


def delays(share: float = 0.8, at_zero: float = 1.0, suggested: float = -5.0, beyond: float = 3.0, again: float = 0.01) -> Any:
    rows = {f"{c}, τ = {tau}": share if tau else at_zero for c in stale.COMPRESSORS for tau in stale.TAUS}
    runs = {row: {"suggested": spread(suggested), "beyond": spread(beyond)} for row in rows}
    return {"limits": rows, "runs": runs, "reuse": {"none": spread(0.8), "none, used again": spread(again)}}


Verdicts = tuple[Callable[..., list[Claim]], Callable[..., Any], tuple[dict[str, float], ...]]
LOGIC: dict[str, Verdicts] = {
    "doublesqueeze": (doublesqueeze.claims, squeeze, ({"double": 0.2}, {"mem": 0.2}, {"worker": 0.5}, {"megabytes": 20.0})),
    "def": (detached.claims, clean_and_noisy, ({"none": 0.61}, {"def_": 0.62}, {"def_": 0.66}, {"noisy": 0.6})),
    "compskip": (compskip.claims, silences, ({"accuracy": 0.9}, {"sent": 0.95}, {"eighth": 0.15})),
    "skips": (lambda of: skips.claims(*of), promises, ({"shipped": 0.93}, {"broken": 0.93}, {"down": 8.0}, {"none": 0.8}, {"ahead": 0.8})),
    "hessian": (hessian.claims, quadratics, ({"global_": 0.01}, {"ec": 0.6}, {"rotated": 0.2})),
    "async": (asynchronous.claims, arrivals, ({"accuracy": 0.93}, {"stalest": 8.0}, {"eight": 20.0}, {"slow": 30.0}, {"cut": 30.0})),
    "stale": (stale.claims, delays, ({"share": 1.2}, {"at_zero": 0.9}, {"suggested": -1.0}, {"beyond": -1.0}, {"again": 0.3})),
    "topk": (topk.claims, text, ({"with_feedback": 3.5}, {"violation": 0.1}, {"z": 3.4})),
}


@pytest.mark.parametrize("paper", LOGIC)
def test_verdicts_follow_the_numbers(paper: str) -> None:
    """All claims agree with numbers as the papers have them; each change of a number turns some verdict (the control)."""
    claims, numbers, changes = LOGIC[paper]
    assert all(claim.agrees for claim in claims(numbers()))
    for change in changes:
        wrong = [claim for claim in claims(numbers(**change)) if not claim.agrees]
        assert wrong, change
        assert len(wrong) < len(claims(numbers())), "not all of them"
    assert set(LOGIC) == set(PAPERS)


def test_a_report_says_what_it_holds(tmp_path: Path) -> None:
    """Also what JSON has no number for."""
    pytest.importorskip("matplotlib")
    claims = [Claim("a", "1 < 2", True), Claim("b", "2 < 1", False)]
    table = Table("t", ("name", "value"), [("x", f"{Spread((1.0, 3.0)):.1f}")])
    figures = {"x": Spread((1.0, 3.0)), "diverged": float("inf"), "one diverged": Spread((1.0, float("inf")))}
    report = Report("title", "setting", [table], claims, figures, lambda pyplot: pyplot.figure())
    assert "2.0 ± 1.4" in report.text() and "1 of 2 claims agree" in report.text()
    report.save(tmp_path, "r")
    saved = json.loads((tmp_path / "r.json").read_text())
    one_diverged = {"mean": "inf", "sd": "nan", "by_seed": [1.0, "inf"]}
    x = {"mean": 2.0, "sd": pytest.approx(2**0.5), "by_seed": [1.0, 3.0]}
    assert saved["figures"] == {"x": x, "diverged": "inf", "one diverged": one_diverged}
    assert [c["agrees"] for c in saved["claims"]] == [True, False]


def test_jobs_keep_their_order_in_processes() -> None:
    assert run_all(divmod, [(7, 2), (9, 4), (1, 1)], Size(processes=2), "test") == [(3, 1), (2, 1), (1, 0)]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SystemExit, match=r"'\.\[examples\]' in a clone"):
        need("no_such_module_of_examples")


def test_wrong_arguments(tmp_path: Path) -> None:
    for wrong in (["reproduce", "adam"], ["reproduce", "topk", "--seeds", "0"], ["reproduce", "topk", "--full", "--smoke"]):
        with pytest.raises(SystemExit) as stop:
            main([*wrong, "--out", str(tmp_path)])
        assert stop.value.code == 2
