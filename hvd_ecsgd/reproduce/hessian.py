"""Hessian-aided error compensation (Khirirat, Magnússon, Johansson 2019): rounding to integers, on quadratics and logistic regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..feedback import ErrorFeedback, HessianAided, Hutchinson, Matrix, NoFeedback, Product
from ..protocols import Feedback
from .lockstep import Convex, Logistic, Quadratics, descend
from .report import Claim, Report, Spread, Table, seeds
from .simulation import Size, run_all

__all__ = ["claims", "run"]

PROBLEMS: dict[str, Callable[[int], Convex]] = {
    "n=1": lambda seed: Quadratics(1, seed=seed),
    "n=8, one H": lambda seed: Quadratics(8, seed=seed),
    "n=8, different H": lambda seed: Quadratics(8, same=False, seed=seed),
    "nearly diagonal H": lambda seed: Quadratics(1, rotated=False, off_diagonal=0.01, seed=seed),
    "rotated H": lambda seed: Quadratics(1, seed=seed),
    "logistic regression": lambda seed: Logistic(8, seed=seed),
}
TABLE = ("n=1", "n=8, one H", "n=8, different H")
DIAGONAL = ("nearly diagonal H", "rotated H", "logistic regression")
ROWS = ("A = 0", "A = I", "A = I - ηH_i (local)", "A = I - ηH (global)", "A = I - ηH_i with mean e")
DIAGONAL_ROWS = ("A = I", "A = I - η diag H", "A = I - ηH_i with mean e")


def rule(problem: Any, row: str, i: int) -> Feedback:
    """Worker i's. Products are evaluated where the descent is now; matrices are those of the quadratics."""

    def product(vectors: Any) -> Any:
        h = problem.h[i] if isinstance(problem, Quadratics) else problem.hessian(i, problem.x)
        return {"x": h @ vectors["x"]}

    made: dict[str, Callable[[], Feedback]] = {
        "A = 0": lambda: NoFeedback(),
        "A = I": lambda: ErrorFeedback(),
        "A = I - ηH_i (local)": lambda: HessianAided(Matrix({"x": problem.h[i]})),
        "A = I - ηH (global)": lambda: HessianAided(Matrix({"x": problem.mean_h})),
        "A = I - ηH_i with mean e": lambda: HessianAided(Product(product)),
        "A = I - η diag H": lambda: HessianAided(Hutchinson(product, 0.98)),
    }
    return made[row]()


def one(problem_name: str, row: str, seed: int, steps: int) -> dict[str, Any]:
    problem = PROBLEMS[problem_name](seed)
    curve: list[tuple[int, float]] = []

    def watch(t: int, eta: float, x: torch.Tensor, residuals: list[torch.Tensor]) -> None:
        if (t + 1) % max(1, steps // 100) == 0:
            curve.append((t + 1, float((x - eta * torch.stack(residuals).mean(0) - problem.best).norm())))

    x, z = descend(problem, lambda i: rule(problem, row, i), steps, watch=None if row == "A = 0" else watch)
    return {"x": x, "z": z, "curve": curve}


def claims(z: dict[str, dict[str, Spread]]) -> list[Claim]:
    """Of problem → row → |z − x*| at the end."""

    def of(problem: str, row: str) -> float:
        return z[problem][row].mean

    def beside(problem: str) -> str:
        diagonal, plain = z[problem]["A = I - η diag H"], z[problem]["A = I"]
        return f"{diagonal:.4f}, A = I {plain:.4f} (agreement: nearer by more than the spread)"

    def nearer(problem: str) -> bool:
        return z[problem]["A = I"].above(z[problem]["A = I - η diag H"])

    exact = [of("n=1", "A = I - ηH (global)"), of("n=8, one H", "A = I - ηH (global)"), of("n=8, different H", "A = I - ηH (global)")]
    local, plain = of("n=8, different H", "A = I - ηH_i (local)"), of("n=8, different H", "A = I")
    return [
        Claim(
            "error compensation helps: A = I ends nearer than A = 0",
            ", ".join(f"{p}: {of(p, 'A = I'):.3f} and {of(p, 'A = 0'):.3f}" for p in TABLE),
            all(of(p, "A = I") < of(p, "A = 0") for p in TABLE),
        ),
        Claim(
            "on quadratics A = I - ηH leaves no accumulated error: z = x − η·mean e converges exactly",
            f"|z − x*| at most {max(exact):.1e}, with A = I at least {min(of(p, 'A = I') for p in TABLE):.3f} (agreement: below 1e-10)",
            max(exact) < 1e-10,
        ),
        Claim(
            "(a contract of this library) with workers' own H_i and the mean error ē it is as exact; with their own e_i it is not",
            f"with ē {of('n=8, different H', 'A = I - ηH_i with mean e'):.1e}, without {local:.3f}, A = I {plain:.3f}",
            of("n=8, different H", "A = I - ηH_i with mean e") < 1e-10 < local,
        ),
        Claim(
            "the diagonal of H is enough: better than A = I where H is nearly diagonal",
            beside("nearly diagonal H"),
            nearer("nearly diagonal H"),
        ),
        Claim("the same on sparse logistic regression", beside("logistic regression"), nearer("logistic regression")),
        Claim("the same where H is rotated, so that its diagonal says little", beside("rotated H"), nearer("rotated H")),
    ]


def run(size: Size) -> Report:
    """Descend on quadratics with each rule, and measure the distance that remains."""
    steps = size.pick(20, 2000, 4000)
    pairs = [(p, r) for p in TABLE for r in ROWS] + [(p, r) for p in DIAGONAL for r in DIAGONAL_ROWS]
    keys = [(p, r, seed) for p, r in pairs for seed in range(size.seeds)]
    done = dict(zip(keys, run_all(one, [(*key, steps) for key in keys], size, "hessian"), strict=True))

    def spread(problem: str, row: str, what: str) -> Spread:
        return Spread(tuple(done[problem, row, s][what] for s in range(size.seeds)))

    def shown(spread: Spread) -> str:
        return f"{spread:.0e}" if spread.mean < 1e-3 else f"{spread:.4f}"

    def table(title: str, problems: tuple[str, ...], rows: tuple[str, ...]) -> Table:
        made = Table(f"{title}: distance to the optimum, {seeds(size.seeds)}", ("", "of x", "of z = x − η·mean e"))
        made.rows += [(f"{p}: {row}", shown(spread(p, row, "x")), shown(spread(p, row, "z"))) for p in problems for row in rows]
        return made

    z: dict[str, dict[str, Spread]] = {}
    x: dict[str, dict[str, Spread]] = {}
    for p, r in pairs:
        z.setdefault(p, {})[r] = spread(p, r, "z")
        x.setdefault(p, {})[r] = spread(p, r, "x")

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(2, 3, figsize=(14, 8), constrained_layout=True)
        for axis, problem in zip(axes.flat, (*TABLE, *DIAGONAL), strict=True):
            shown_rows = [r for p, r in pairs if p == problem and r != "A = 0"]
            for row, style in zip(shown_rows, ("-", "-", "--", ":"), strict=False):  # some curves lie on each other
                steps_seen, values = zip(*done[problem, row, 0]["curve"], strict=True)
                axis.plot(steps_seen, values, style, label=row, linewidth=2)
            axis.set(title=problem, xlabel="step", ylabel="|z − x*|", yscale="log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.suptitle("Hessian-aided error compensation, gradients rounded to integers (seed 0)")
        return figure

    setting = (
        f"d = 40, rounding to integers, {steps} steps, η = 2/(μ+L); quadratics with eigenvalues from 1 to 100; diagonals by Hutchinson's "
        "estimator; workers in lock-step"
    )
    tables = [table("Matrices", TABLE, ROWS), table("Diagonals", DIAGONAL, DIAGONAL_ROWS)]
    return Report("Hessian-aided error compensation (Khirirat et al. 2019)", setting, tables, claims(z), {"x": x, "z": z}, draw)
