"""DoubleSqueeze (Tang et al. 2019): five ways to compress, on real images."""

from __future__ import annotations

import warnings
from typing import Any

from ..compression import double_squeeze_comparison
from ..compressors import Ternary, TopK
from ..protocols import Compressor
from .problems import Digits
from .report import Claim, Report, Spread, Table, need, seeds
from .simulation import Size, Trained, run_all, train

__all__ = ["claims", "run"]

METHODS = ("vanilla", "mem_sgd", "double_squeeze", "worker_only", "uncompensated")
COMPRESSORS: dict[str, Compressor] = {"1 bit": Ternary("l2"), "top-k 2.7 %": TopK(1 / 0.027)}
LR = 0.1


def one(compressor: str, method: str, seed: int, steps: int, width: int) -> Trained:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Ternary")  # the authors' scale is no contraction in general
        made = double_squeeze_comparison(COMPRESSORS[compressor], dense_below=0, dense_1d=False)[method]
        return train(Digits(width), lambda: made, steps=steps, lr=LR, seed=seed)


Figures = dict[str, dict[str, dict[str, Spread]]]
"""compressor → method → figure → over seeds"""


def claims(figures: Figures) -> list[Claim]:
    """What the paper says of its methods, compressor by compressor, and whether these figures agree."""
    result = []
    for compressor, by_method in figures.items():
        loss = {m: by_method[m]["loss"].mean for m in METHODS}
        megabytes = {m: by_method[m]["megabytes"].mean for m in METHODS}
        gap = loss["uncompensated"] - loss["vanilla"]
        for method, said in (("double_squeeze", "compensated on both sides"), ("mem_sgd", "compensated on the worker, with a dense server,")):
            left = loss[method] - loss["vanilla"]
            result.append(
                Claim(
                    f"{compressor}: {said} converges as fast as without compression",
                    f"final loss {loss[method]:.4f}, vanilla {loss['vanilla']:.4f}, uncompensated {loss['uncompensated']:.4f} (agreement: at most a "
                    "tenth of the uncompensated method's distance is left)",
                    gap > 0 and left <= 0.1 * gap,
                )
            )
        result.append(
            Claim(
                f"{compressor}: compensation on the worker only, with a server that compresses too, is worse than both and better than none",
                f"final loss {loss['double_squeeze']:.4f} < {loss['worker_only']:.4f} < {loss['uncompensated']:.4f} is expected",
                loss["double_squeeze"] < loss["worker_only"] < loss["uncompensated"],
            )
        )
        result.append(
            Claim(
                f"{compressor}: DoubleSqueeze sends less than MEM-SGD, which sends less than no compression",
                f"{megabytes['double_squeeze']:.2f} MB < {megabytes['mem_sgd']:.2f} MB < {megabytes['vanilla']:.2f} MB is expected",
                megabytes["double_squeeze"] < megabytes["mem_sgd"] < megabytes["vanilla"],
            )
        )
    return result


def run(size: Size) -> Report:
    """Train with the five methods of the paper, for each compressor."""
    steps, width = size.pick(6, 400, 1500), size.pick(64, 256, 512)
    keys = [(c, m, seed) for c in COMPRESSORS for m in METHODS for seed in range(size.seeds)]
    jobs = [(*key, steps, width) for key in keys]
    trained = dict(zip(keys, run_all(one, jobs, size, "doublesqueeze"), strict=True))

    def spread(compressor: str, method: str, figure: str) -> Spread:
        results = [trained[compressor, method, seed] for seed in range(size.seeds)]
        return Spread(tuple(r.sent / 1e6 if figure == "megabytes" else r.figures[figure] for r in results))

    figures: Figures = {c: {m: {f: spread(c, m, f) for f in ("loss", "accuracy", "megabytes")} for m in METHODS} for c in COMPRESSORS}
    tables = []
    for compressor, by_method in figures.items():
        table = Table(f"{compressor}, {seeds(size.seeds)}", ("method", "final training loss", "test accuracy", "MB sent per worker"))
        for method, f in by_method.items():
            table.rows.append((method, f"{f['loss']:.4f}", f"{f['accuracy']:.3f}", f"{f['megabytes'].mean:.2f}"))
        tables.append(table)

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True, sharey=True)
        for axis, compressor in zip(axes, COMPRESSORS, strict=True):
            for method in METHODS:
                curves = [trained[compressor, method, seed].curve for seed in range(size.seeds)]
                mean = [sum(c[i][1]["loss"] for c in curves) / len(curves) for i in range(len(curves[0]))]
                axis.plot([step for step, _ in curves[0]], mean, label=method.replace("_", " "), linestyle="--" if method == "vanilla" else "-")
            axis.set(title=compressor, xlabel="step", yscale="log")
            for choose in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                choose(need("matplotlib.ticker").LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("training loss (mean of seeds)")
        axes[0].legend()
        figure.suptitle("DoubleSqueeze's comparison: digits, 8 workers, SGD")
        return figure

    setting = f"digits (real images), network 64-{width}-10, 8 workers × 16, SGD at {LR}, {steps} steps; the paper: ResNet-18 on CIFAR-10, 8 × 256"
    return Report("DoubleSqueeze (Tang et al. 2019)", setting, tables, claims(figures), {"figures": figures}, draw)
