"""What the documentation says of each preset: the one source of the tables in docs/choosing.md, methods.md, guarantees.md and algorithms.md.

`python docs/presets.py` writes them. What the code knows itself (rule, unit, whether it must be attached) is asked of the preset.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .compression import Compression
from .core.method import Method
from .feedback import NoFeedback

__all__ = ["KEPT", "LEFT", "PRESETS", "PROVED", "RULES", "Preset", "needs_attach"]


@dataclass(frozen=True)
class Preset:
    """One row: a preset, or a form of it."""

    call: str
    """How it is written, with the names of its arguments."""
    sent: str
    """What one worker sends, in a few words."""
    detail: str
    """The same, exactly."""
    exchange: str
    section: str
    """Of docs/algorithms.md."""
    paper: str = ""
    exchange_note: str = ""
    unit_note: str = ""
    horovod_note: str = ""

    @property
    def name(self) -> str:
        return re.split(r"\W", self.call)[0]

    @property
    def method(self) -> Method:
        """With the default arguments."""
        method: Method = getattr(Compression, self.name)().method
        return method

    @property
    def rule(self) -> str:
        return type(self.method.feedback).__name__

    @property
    def compressor(self) -> str:
        return type(self.method.compressor).__name__

    @property
    def unit(self) -> str:
        """What the residual measures."""
        return "–" if isinstance(self.method.feedback, NoFeedback) else self.method.feedback.unit


def needs_attach(method: Method) -> bool:
    """Whether it must know the optimizer, so that on an unmodified Horovod `compression.attach(optimizer)` comes first."""
    return method.feedback.takes.momentum or method.feedback.takes.learning_rate


RULES = {
    "ErrorFeedback": ("the optimizer's, after", "x"),
    "LocalMomentum": ("worker, before C", "x − λe_i"),
    "CSER": ("worker, before C", "x − e_i"),
    "PEF": ("after the exchange", "x"),
    "DistEFSGD": ("worker, before C", "x"),
    "HessianAided": ("the optimizer's, after", "x"),
    "MemSGD": ("none; wd before C", "x"),
    "NoFeedback": ("the optimizer's, after", "x"),
}
"""Feedback rule → whose momentum and weight decay, and when; where gradients are taken."""

LEFT = {
    "Identity": "nothing",
    "Cast": "rounding, δ ≥ 1 − 2⁻²² (fp16), 1 − 2⁻¹⁶ (bf16)",
    "RandomBlock": "δ = k/d",
    "GlobalRandomBlock": "δ = K/B of the model",
    "RandomK": "δ = k/d; unbiased: ω = d/k − 1",
    "TopK": "δ ≥ k/d",
    "BlockTopK": "δ ≥ the smallest block's k/length",
    "Threshold": "δ ≥ 0, by the entries; about TopK's",
    "Sign": "δ = ‖v‖₁²/(d‖v‖₂²) ≥ 1/d",
    "Ternary": "δ = ‖v‖₁²/(nnz‖v‖₂²) ≥ 1/nnz",
    "QSGD": "ω = min(b/s², √b/s), b the bucket's length, s = levels",
    "Natural": "ω = 1/8",
}
"""Compressor → what C(v) leaves of v: a contraction δ, or the variance ω of one that is unbiased."""

KEPT = {
    "ErrorFeedback": "x − η·(mean e_i + E) moves as SGD on the mean gradient",
    "LocalMomentum": "x − mean e_i moves as momentum SGD on the workers' gradients",
    "CSER": "the mean of the workers' models moves as momentum SGD on their gradients",
    "PEF": "with constant η and μ, x less what waits moves as momentum SGD on the mean gradient",
    "DistEFSGD": "x − η·(mean e_i + E) moves as momentum SGD on the mean gradient",
    "HessianAided": "on quadratics whose H is given, x − η·mean e_i moves as gradient descent",
    "MemSGD": "x − mean e_i moves as SGD on the mean gradient",
    "NoFeedback": "the mean that arrives is right in expectation, if C is unbiased; what is not sent is lost",
    "none": "all",
    "fp16": "the mean, to 16 bits",
    "bf16": "the mean, to 16 bits",
}
"""Feedback rule, or preset where that is another matter → what is the same as without compression, whatever C does; the tests hold it to rounding."""

PROVED = {
    "ErrorFeedback": "SGD's rate: δ enters by a term of order (1 − δ)/(δ²T) only (Karimireddy et al. 2019, one worker)",
    "double_squeeze": "SGD's rate, 1/√(nT): both compressions enter by terms of order 1/T^⅔ and less",
    "power_sgd": "nothing for the warm start; it runs under error feedback",
    "threshold": "nothing; it was found by trying",
    "LocalMomentum": "SGD's rate",
    "CSER": "SGD's rate, 1/√(nT), with errors that the resets bound",
    "butterfly": "nothing here: compression and meetings are a reconstruction",
    "PEF": "nothing: a baseline",
    "DistEFSGD": "SGD's rate, 1/√(nT)",
    "comp_skip": "nothing here: a reconstruction; sending with probability q makes δ′ = qδ",
    "HessianAided": "on quadratics errors do not add up",
    "MemSGD": "SGD's rate for strongly convex f (Stich et al. 2018)",
    "NoFeedback": "SGD's rate, with a variance of at most (1 + ω) times",
    "none": "it is SGD",
    "fp16": "nothing",
    "bf16": "nothing",
}
"""The same → what its paper proves, for smooth f; T steps, n workers."""

_SERVER = ", on worker and server"

PRESETS = (
    Preset("none", "all", "all of it", "all-reduce", "9", horovod_note=", bare or called"),
    Preset(
        "fp16", "half", "half of it", "all-reduce", "9",
        unit_note=" (`fp16(error_feedback=True)`: gradient)", horovod_note=", bare or called",
    ),
    Preset(
        "bf16", "half", "half of it, summed in float32", "two-pass", "9",
        unit_note=" (`bf16(error_feedback=True)`: gradient)", horovod_note=", bound",
    ),
    Preset(
        "random_block(ratio)", "one random block, the same place everywhere", "d/ratio consecutive entries, the same place on all workers",
        "all-reduce", "2", "Xu, Huang 2021 (block); Stich et al. 2018 (EF)",
    ),
    Preset(
        "global_random_block(ratio, blocks)", "random blocks of the whole model",
        "a share 1/ratio of the model's `blocks` equal blocks, the same on all workers",
        "all-reduce", "2", "Xie et al. 2020 (GRBS)", horovod_note="; payload sizes change by step",
    ),
    Preset(
        "random_k(ratio)", "random entries, the same everywhere",
        "d/ratio random entries, the same on all workers; `unbiased=True`: times d/k",
        "all-reduce", "2", "Stich et al. 2018; Wangni et al. 2018", unit_note="; none if unbiased",
    ),
    Preset(
        "top_k(ratio)", "the largest entries of each parameter", "the largest d/ratio entries, or `k=…` of them, and their positions",
        "all-gather", "2", "Aji, Heafield 2017; Stich et al. 2018",
    ),
    Preset(
        "top_k(ratio, block=512)", "the largest entries of each block", "the largest entries of each block of 512, positions in 2 bytes",
        "all-gather", "2", "Alistarh et al. 2018",
    ),
    Preset(
        "threshold(ratio)", "entries above a sampled quantile (gradient dropping)",
        "entries above the quantile of a sample, about d/ratio, variable size; `two_bits=True`: sign and one of two magnitudes",
        "all-gather", "2", "Aji, Heafield 2017",
    ),
    Preset("one_bit()", "signs and a scale", "signs and a scale per parameter", "all-gather", "2", "Seide et al. 2014; Karimireddy et al. 2019"),
    Preset("one_bit(block=…)", "signs and scales", "signs and a scale per block", "all-gather", "2", "Zheng, Huang, Kwok 2019"),
    Preset(
        "ternary()", "2 bits an entry", "signs, zeros stay zero, 2 bits an entry; ℓ1 scale (`Ternary()` itself has its authors' ℓ2)",
        "all-gather", "2", "Tang et al. 2019",
    ),
    Preset(
        "qsgd(levels, bucket, norm)", "2, 4 or 8 bits an entry", "8, 4 or 2 bits an entry, rounded at random, and a norm per bucket",
        "all-gather", "9", "Alistarh et al. 2017", unit_note=" (unbiased)",
    ),
    Preset(
        "natural()", "9 bits an entry", "powers of two, 9 bits an entry, rounded at random",
        "all-gather", "9", "Horváth et al. 2019", unit_note=" (unbiased)",
    ),
    Preset(
        "unbiased(compressor)", "any unbiased compressor's payload", "any unbiased compressor's payload",
        "all-reduce or all-gather", "9", "Alistarh et al. 2017; Wangni et al. 2018", unit_note=" (unbiased)",
    ),
    Preset(
        "power_sgd(approximation_rank)", "two thin factors of each matrix", "matrices as the product of two thin ones",
        "two all-reduces", "1", "Vogels et al. 2019",
    ),
    Preset(
        "double_squeeze(compressor, server_compressor)", "1 bit, or any compressor, both ways", "any compressor both ways; default 1 bit",
        "two-pass", "2", "Tang et al. 2019, algorithm 1", exchange_note="; `central=True`: through rank 0", unit_note=_SERVER,
    ),
    Preset(
        "dist_ef_sgd(momentum, weight_decay)", "signs of momentum + error, both ways", "signs both ways of worker momentum + error; Nesterov too",
        "two-pass", "5", "Zheng, Huang, Kwok 2019", unit_note=_SERVER,
    ),
    Preset(
        "comp_skip(worker, server, compressor)", "as before, in steps that are not skipped",
        "as `dist_ef_sgd`, in steps that are not skipped (`Every`, `Rounds`, `Bernoulli`, `NormBased`; each side its own)",
        "two-pass", "4", "CompSkipDSGD, a reconstruction", exchange_note="; or `exchange.SkipAllReduce`, all workers together", unit_note=_SERVER,
    ),
    Preset(
        "hessian_aided(curvature, compressor, exchange)", "any compressor; the residual is carried by I − ηH",
        "any compressor; the residual is carried by I − ηH, H a matrix, your Hessian-vector product, Hutchinson's diagonal, or squared gradients",
        "all-gather or all-reduce", "6", "Khirirat et al. 2019",
        exchange_note=", and for most a dense all-reduce beside it, with which more is sent than without compression",
    ),
    Preset(
        "local_momentum(ratio)", "random block of η·momentum", "random block of η·momentum",
        "all-reduce", "3", "Xu, Huo, Huang 2020 (EF baseline)",
    ),
    Preset(
        "detached(ratio, lambda_)", "the same; gradients are taken at x − λe (DEF; λ = 1: SAEF)",
        "the same, gradients at x − λe (DEF; λ = 1: SAEF); `period`: local steps; `average_errors`",
        "all-reduce", "3", "Xu, Huang 2021, authors' code",
    ),
    Preset(
        "cser(compressor, reset_compressor, period)", "compressed η·momentum; errors are reset now and then",
        "compressed η·momentum; every worker moves by all of its own at once, and every `period` steps errors are reset, compressed",
        "all-reduce or all-gather", "3", "Xie et al. 2020",
    ),
    Preset(
        "butterfly(compressor, period)", "the model's difference, to one other worker",
        "what the models differ by, to one other worker in each step, whole or compressed; all meet every `period` steps",
        "one to one", "3", "Zhao, Canny 2013", exchange_note="; an all-reduce every `period` steps",
    ),
    Preset(
        "pef(ratio)", "random block of η·gradient; momentum after the exchange", "random block of η·gradient + error; momentum after the exchange",
        "all-reduce", "3", "Xu, Huang 2021 (PEF baseline)",
    ),
    Preset(
        "topk_sgd(ratio, block)", "the largest entries of η·gradient + error",
        "the largest d/ratio entries of η·gradient + error, per parameter or block; no momentum",
        "all-gather", "7", "Alistarh et al. 2018; Stich et al. 2018",
    ),
)  # fmt: skip
