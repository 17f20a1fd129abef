"""What a user passes as `compression=`: the presets, and any composition of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch

from .arguments import check_flag
from .compressors import QSGD, BlockTopK, Cast, GlobalRandomBlock, Identity, Natural, RandomBlock, RandomK, Sign, Ternary, Threshold, TopK
from .compressors.base import check_unbiased
from .core.bound import BoundCompression, Named
from .core.method import Method
from .core.tuner import DENSE, Tuner
from .errors import CompressionError
from .evidence import STEPS
from .exchange import (
    AllGather,
    AllReduce,
    Butterfly,
    Central,
    CompressedAllReduce,
    CompSkip,
    ErrorReset,
    Every,
    HorovodCompressor,
    PowerSGD,
    TwoPass,
    is_horovod_compressor,
)
from .exchange.skip import SkipPolicy
from .feedback import CSER, PEF, DistEFSGD, ErrorFeedback, GradientSquares, HessianAided, LocalMomentum, MemSGD, NoFeedback
from .feedback.curvature import Curvature
from .horovod.driver import HorovodDriver
from .horovod.transport import horovod_is_running
from .protocols import Compressor, Exchange, Feedback

__all__ = ["AnyCompression", "Compression", "bind", "double_squeeze_comparison"]


class Compression:
    """A method: compressor × feedback × exchange. Nothing is kept here; `bind` makes the object with state.

    `compressor`: an instance from `hvd_ecsgd.compressors`. `feedback`: from `hvd_ecsgd.feedback` (default: error feedback in gradient units).
    `exchange`: from `hvd_ecsgd.exchange` (default: all-reduce if payloads add up, else all-gather).
    `dense_below`, `dense_1d`: parameters with fewer elements, and one-dimensional ones, are sent uncompressed; 0 and False compress everything.
    `seed`: for shared randomness; the same on all ranks.
    `warmup_steps`: so many first steps are uncompressed. `ratio_schedule`: (step, ratio) pairs; from each of these steps on the compressor has this
    ratio (`hvd_ecsgd.exponential_ratios` makes some). A `server_compressor` of its own keeps its ratio.
    `exact`: an undone step leaves residuals and momentum as they were bit for bit, not to rounding, at the price of a copy of them in each step.
    `verify_every`: before every so many-th step all ranks compare a hash of x; drift is a `DisagreementError` on all that names the parameter.
    `clip_norm`, `clip_value`: clip this worker's gradient, in every step and in place, before it is accumulated (residual, momentum, weight decay)
    and compressed: the sum over backward_passes_per_step, of the unscaled loss under a GradScaler. It is local clipping, the usual one for
    compressed gradients, and the norm of the mean is another; the mean itself can be clipped between `synchronize()` and `step()`, of methods whose
    optimizer applies it.
    `clip_norm` scales the gradients of all parameters of the optimizer together to this L2 norm where it is larger, as `clip_grad_norm_` does. It is
    known when the backward pass has ended, so nothing is sent before (as with `overlap=False`), and it reads the gradients once more. It is not to be
    had on an unmodified Horovod, which compresses parameter by parameter. `clip_value` clamps each element to ± this.
    Raises `CompressionError` for parts that do not fit together.
    """

    def __init__(
        self,
        compressor: Compressor,
        feedback: Feedback | None = None,
        exchange: Exchange | None = None,
        *,
        dense_below: int = 1024,
        dense_1d: bool = True,
        seed: int = 0,
        warmup_steps: int = 0,
        ratio_schedule: Sequence[tuple[int, float]] = (),
        exact: bool = False,
        verify_every: int = 0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        if exchange is None:
            exchange = AllReduce() if getattr(compressor, "summable", False) else AllGather()
        rule = ErrorFeedback() if feedback is None else feedback
        options = (dense_below, dense_1d, seed, warmup_steps, ratio_schedule, exact, verify_every, clip_norm, clip_value)
        self.method = Method(compressor, rule, exchange, *options)

    def __repr__(self) -> str:
        m = self.method
        options = f"dense_below={m.dense_below}, dense_1d={m.dense_1d}, seed={m.seed}"
        if m.warmup_steps or m.ratio_schedule:
            options += f", warmup_steps={m.warmup_steps}, ratio_schedule={m.ratio_schedule}"
        for option in ("clip_norm", "clip_value"):
            options += f", {option}={getattr(m, option)}" if getattr(m, option) is not None else ""
        return f"Compression({m.compressor}, {m.feedback}, {m.exchange}, {options})"

    def bind(self, model: Named, process_set: Any = None) -> BoundCompression:
        """Tie the method to a module's parameters, or to (name, parameter) pairs, and give it state.

        With a module, methods that evaluate it at different points on different ranks (DEF) also average its batch-norm statistics.

        Bind once per model and optimizer. `process_set`: Horovod's, when the optimizer has one. Raises `CompressionError` for duplicate
        names, a parameter under two names, and complex parameters.
        """
        return BoundCompression(self.method, model, lambda bound: HorovodDriver(bound, process_set))

    if not TYPE_CHECKING:  # where it would hide misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            raise _unbound(name, self)

    # Horovod calls these two on whatever it is given as `compression=`.

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """For methods without state only (`none()`, `fp16()`, `bf16()`); all others need `bind`."""
        return self._stateless().compress(tensor)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return self._stateless().decompress(tensor, ctx)

    def _stateless(self) -> HorovodStylePreset:
        if isinstance(self.method.feedback, NoFeedback) and not self.method.exchange.approximates and not self.method.clips:
            if isinstance(self.method.compressor, Identity):
                return Compression.none
            if isinstance(self.method.compressor, Cast):
                return Compression.fp16 if self.method.compressor.dtype == torch.float16 else Compression.bf16
        raise CompressionError(f"{self!r} keeps state by parameter name: pass compression=Compression.….bind(model), not the unbound method.")

    # -- presets -----------------------------------------------------------------------------------------------------------------

    none: ClassVar[HorovodStylePreset]
    """No compression; as Horovod's, bare or called."""

    fp16: ClassVar[HorovodStylePreset]
    """Gradients rounded to float16; bare or called. `Compression.fp16(error_feedback=True).bind(model)` keeps the rounding errors."""

    bf16: ClassVar[HorovodStylePreset]
    """Gradients rounded to bfloat16, summed in float32 by the servers of the pieces, and rounded once more: the bytes of a 16-bit all-reduce.

    Bound (`Compression.bf16.bind(model)`) it works everywhere; bare it does with our own optimizers, but not on Horovod, which cannot reduce
    bfloat16. `bf16(error_feedback=True).bind(model)` keeps the rounding errors of both ways.
    """

    @staticmethod
    def random_block(ratio: float = 64.0, *, error_feedback: bool = True, **options: Any) -> Compression:
        """A random block of each parameter, d/ratio elements, the same on all workers; rides Horovod's own all-reduce."""
        return Compression(RandomBlock(ratio), _feedback(error_feedback), AllReduce(), **options)

    @staticmethod
    def global_random_block(ratio: float = 64.0, blocks: int = 1024, *, error_feedback: bool = True, **options: Any) -> Compression:
        """⌊`blocks`/ratio⌋ of the model's `blocks` equal blocks, the same on all workers; rides Horovod's own all-reduce, in payloads whose sizes
        vary by step."""
        return Compression(GlobalRandomBlock(ratio, blocks), _feedback(error_feedback), AllReduce(), **options)

    @staticmethod
    def random_k(ratio: float = 64.0, *, unbiased: bool = False, error_feedback: bool | None = None, **options: Any) -> Compression:
        """d/ratio random entries of each parameter, the same on all workers; rides Horovod's own all-reduce.

        `unbiased` scales them by d/k; then without error feedback only.
        """
        return Compression(RandomK(ratio, unbiased), _feedback(not unbiased if error_feedback is None else error_feedback), AllReduce(), **options)

    @staticmethod
    def top_k(
        ratio: float | None = None, *, k: int | None = None, block: int | None = None, error_feedback: bool = True, **options: Any
    ) -> Compression:
        """The d/ratio (100 by default) or `k` largest entries of each parameter, or of each `block` of entries; all-gather, so bytes received grow
        with n."""
        if k is not None and ratio is not None:
            raise CompressionError(f"top_k: give ratio (d/ratio entries of a parameter) or k (so many entries), not both; got {ratio!r} and {k!r}.")
        ratio = 100.0 if ratio is None else ratio
        if k is not None and block is not None:
            raise CompressionError("top_k: give k (entries of a parameter) or block (then ratio says how many of its entries), not both.")
        return Compression(TopK(ratio, k) if block is None else BlockTopK(ratio, block), _feedback(error_feedback), AllGather(), **options)

    @staticmethod
    def threshold(ratio: float = 100.0, sample: float = 0.01, *, two_bits: bool = False, error_feedback: bool = True, **options: Any) -> Compression:
        """Gradient dropping: about d/ratio largest entries of each parameter, by a threshold from a sample; all-gather of variable size.

        `two_bits`: of their values only the sign, and one of two magnitudes."""
        return Compression(Threshold(ratio, sample, two_bits), _feedback(error_feedback), AllGather(), **options)

    @staticmethod
    def one_bit(scale: Literal["l1", "l2"] = "l1", *, block: int | None = None, error_feedback: bool = True, **options: Any) -> Compression:
        """Signs and one scale per parameter, or per `block` of entries; all-gather.

        With many workers prefer `double_squeeze()`, whose payload does not grow with n.
        """
        return Compression(Sign(scale, block), _feedback(error_feedback), AllGather(), **options)

    @staticmethod
    def ternary(scale: Literal["l1", "l2"] = "l1", *, error_feedback: bool = True, **options: Any) -> Compression:
        """Signs, zeros stay zero, and one scale per parameter; all-gather.

        The DoubleSqueeze authors' own 1-bit is `double_squeeze(Ternary("l2"))`.
        """
        return Compression(Ternary(scale), _feedback(error_feedback), AllGather(), **options)

    @staticmethod
    def qsgd(levels: int = 127, bucket: int = 512, norm: Literal["l2", "max"] = "l2", *, error_feedback: bool = False, **options: Any) -> Compression:
        """QSGD (Alistarh et al. 2017): unbiased, so without feedback by default; 8 bits per entry, 4 for levels ≤ 7, 2 for 1; all-gather."""
        return Compression(QSGD(levels, bucket, norm), _feedback(error_feedback), AllGather(), **options)

    @staticmethod
    def natural(*, error_feedback: bool = False, **options: Any) -> Compression:
        """Powers of two (Horváth et al. 2019): unbiased, so without feedback by default; 9 bits per entry; all-gather."""
        return Compression(Natural(), _feedback(error_feedback), AllGather(), **options)

    @staticmethod
    def unbiased(compressor: Compressor | None = None, **options: Any) -> Compression:
        """Compressed SGD without feedback (Alistarh et al. 2017; Wangni et al. 2018) with any unbiased compressor, QSGD by default;
        `CompressionError` for others."""
        compressor = QSGD() if compressor is None else compressor
        check_unbiased(compressor, "unbiased")
        return Compression(compressor, NoFeedback(), **options)

    @staticmethod
    def double_squeeze(
        compressor: Compressor | None = None, server_compressor: Compressor | None = None, *, central: bool = False, **options: Any
    ) -> Compression:
        """DoubleSqueeze (Tang et al. 2019): compressed in both directions, feedback on both sides. 1-bit signs by default.

        Every rank is the server of a piece of each parameter; with `central`, rank 0 of everything."""
        check_flag(central, "double_squeeze: central")
        exchange = Central(server_compressor) if central else TwoPass(server_compressor)
        return Compression(Sign() if compressor is None else compressor, ErrorFeedback(), exchange, **options)

    @staticmethod
    def dist_ef_sgd(
        compressor: Compressor | None = None,
        server_compressor: Compressor | None = None,
        *,
        momentum: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool = False,
        **options: Any,
    ) -> Compression:
        """dist-EF-SGD(M) (Zheng, Huang, Kwok 2019): worker momentum before two-pass compression; signs with scale ‖v‖₁/d both ways by default.

        Without `momentum` and `weight_decay` the SGD optimizer's are read live. With them the optimizer, whose own must be 0, applies the
        update. On an unmodified Horovod call `attach` in either case.
        """
        feedback = DistEFSGD(momentum, weight_decay, nesterov)
        return Compression(Sign() if compressor is None else compressor, feedback, TwoPass(server_compressor), **options)

    @staticmethod
    def comp_skip(
        worker: SkipPolicy | None = None,
        server: SkipPolicy | None = None,
        compressor: Compressor | None = None,
        server_compressor: Compressor | None = None,
        *,
        momentum: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool = False,
        **options: Any,
    ) -> Compression:
        """CompSkipDSGD, a reconstruction: dist-EF-SGD in which workers and servers skip steps by `hvd_ecsgd.exchange`'s `Every`, `Rounds`,
        `Bernoulli` or `NormBased`, set independently. By default workers send in every second step, in turns, and servers always; `Rounds(2)` for
        both halves the bytes both ways, over SGD without momentum. Momentum as in `dist_ef_sgd`."""
        exchange = CompSkip(Every(2) if worker is None else worker, Every(1) if server is None else server, server_compressor)
        feedback = DistEFSGD(momentum, weight_decay, nesterov)
        return Compression(Sign() if compressor is None else compressor, feedback, exchange, **options)

    @staticmethod
    def hessian_aided(
        curvature: Curvature | None = None, compressor: Compressor | None = None, exchange: Exchange | None = None, **options: Any
    ) -> Compression:
        """Hessian-aided error compensation (Khirirat et al. 2019): the residual is multiplied by I − ηH. 1-bit signs by default.

        `curvature` from `hvd_ecsgd.feedback`: `Matrix`, `Product` (your Hessian-vector product), `Hutchinson` (a diagonal from products), or
        `GradientSquares` (a diagonal from gradients; the default). On an unmodified Horovod call `attach`, since η itself is needed. A gradient
        taken at x − η·e supplies H·e by itself, without double backward: `Compression(compressor, LocalMomentum(1.0))` with momentum 0.
        """
        feedback = HessianAided(GradientSquares() if curvature is None else curvature)
        return Compression(Sign() if compressor is None else compressor, feedback, exchange, **options)

    @staticmethod
    def local_momentum(ratio: float = 64.0, **options: Any) -> Compression:
        """EF with momentum on the worker, in update units, with random blocks. Over SGD, whose momentum it reads; on Horovod attached."""
        return Compression(RandomBlock(ratio), LocalMomentum(0.0), AllReduce(), **options)

    @staticmethod
    def detached(ratio: float = 64.0, lambda_: float = 0.3, *, period: int = 1, average_errors: int | None = None, **options: Any) -> Compression:
        """DEF with random blocks (Xu, Huang 2021); λ=1 is SAEF. Over SGD, whose momentum it reads; on Horovod attached.

        `period`: local steps per exchange. `average_errors`: steps after which the residuals are replaced by their mean (SAEF's option). Bind the
        module itself to have its batch-norm statistics averaged after each exchange.
        """
        return Compression(RandomBlock(ratio), LocalMomentum(lambda_, period, average_errors), AllReduce(), **options)

    @staticmethod
    def cser(compressor: Compressor | None = None, reset_compressor: Compressor | None = None, period: int = 8, **options: Any) -> Compression:
        """CSER (Xie et al. 2020): every worker moves by all of its own change at once, and the errors by which models then differ are reset in every
        `period`-th step. Random blocks of 1/64, and of 1/8 for resets, by default. Over SGD, whose momentum it reads; on Horovod attached."""
        exchange = ErrorReset(RandomBlock(8) if reset_compressor is None else reset_compressor, period)
        return Compression(RandomBlock(64) if compressor is None else compressor, CSER(), exchange, **options)

    @staticmethod
    def butterfly(compressor: Compressor | None = None, period: int = 64, **options: Any) -> Compression:
        """Butterfly mixing (Zhao, Canny 2013): in each step every worker averages its model with that of one other, and in every `period`-th with
        all; uncompressed by default. For links that are slow to answer. Over SGD, whose momentum it reads; on Horovod attached."""
        return Compression(Identity() if compressor is None else compressor, CSER(), Butterfly(period), **options)

    @staticmethod
    def auto(candidates: Mapping[str, Compression] | None = None, *, trial: int = 5, every: int | None = None, **options: Any) -> AutoCompression:
        """The fastest of several methods on this network, for this model; dense where compression saves less than a tenth of a step's time.

        Each is tried in `trial` steps of the training (the first is not counted), and all ranks go on with the same: after 15 steps with the default
        `candidates`, by name: "none", "fp16" and "power_sgd", which reach dense training's loss. PowerSGD may take more steps to it
        (`hvd_ecsgd.evidence`), and is chosen where it is first nevertheless; it may want a smaller learning rate. Name your own, among them
        "none", all with error feedback in gradient units; residuals are carried from one to the next. All is tried again after `every` steps,
        after loading, and when steps become slower or faster by half. `options` are those of the default candidates. The figures:
        `compression.tuner.decisions`, and the logger `hvd_ecsgd` (INFO, rank 0). Raises `CompressionError` for candidates that do not fit together.
        """
        if candidates is not None and options:
            raise CompressionError(f"auto(): {sorted(options)[0]} belongs to the default candidates; give it to those named.")
        if candidates is not None:
            return AutoCompression(candidates, trial, every, {})
        candidates = {
            DENSE: Compression(Identity(), ErrorFeedback(), **options),
            "fp16": Compression.fp16(error_feedback=True, **options),
            "power_sgd": Compression.power_sgd(2, **options),
        }
        return AutoCompression(candidates, trial, every, {DENSE: STEPS["none"], "fp16": STEPS["fp16"], "power_sgd": STEPS["power_sgd(2)"]})

    @staticmethod
    def power_sgd(
        approximation_rank: int = 2, *, residual: Literal["mean", "own"] = "mean", error_feedback: bool = True, **options: Any
    ) -> Compression:
        """PowerSGD (Vogels et al. 2019): matrices as the product of two thin ones, in two all-reduces; the paper's momentum is the optimizer's."""
        return Compression(Identity(), _feedback(error_feedback), PowerSGD(approximation_rank, residual), **options)

    @staticmethod
    def pef(ratio: float = 64.0, **options: Any) -> Compression:
        """PEF with random blocks (Xu, Huang 2021, baseline): momentum after the exchange. Over SGD, whose momentum it reads; on
        Horovod attached."""
        return Compression(RandomBlock(ratio), PEF(), AllReduce(), **options)

    @staticmethod
    def topk_sgd(ratio: float = 100.0, *, block: int | None = None, **options: Any) -> Compression:
        """TopK-SGD (Alistarh et al. 2018): top-k of η·gradient + error, of each parameter or, with `block`, of each block of so many entries
        (the authors use 512). No momentum. Over SGD; on Horovod attached."""
        return Compression(TopK(ratio) if block is None else BlockTopK(ratio, block), MemSGD(), AllGather(), **options)


def _feedback(wanted: bool) -> Feedback:
    check_flag(wanted, "error_feedback")
    return ErrorFeedback() if wanted else NoFeedback()


class AutoCompression(Compression):
    """`Compression.auto(…)`: begins dense."""

    def __init__(self, candidates: Mapping[str, Compression], trial: int, every: int | None, steps: Mapping[str, float]) -> None:
        if not isinstance(candidates, Mapping):
            raise CompressionError(f"auto(): candidates must be {{name: Compression.<preset>(…)}}, one of them '{DENSE}', got {candidates!r:.100}.")
        for name, candidate in candidates.items():
            if not isinstance(getattr(candidate, "method", None), Method) or isinstance(candidate, BoundCompression):
                raise CompressionError(f"auto(): candidate '{name}' must be Compression.<preset>(…), not bound, got {candidate!r:.100}.")
        self._options = (candidates, trial, every, steps)
        self.tuner()  # which looks at them
        self.method = candidates[DENSE].method

    def __repr__(self) -> str:
        return f"Compression.{self.tuner()!r}"

    def tuner(self) -> Tuner:
        """A new one, as each bound object has."""
        return Tuner(*self._options)

    def bind(self, model: Named, process_set: Any = None) -> BoundCompression:
        """See `Compression.bind`."""
        return BoundCompression(self.method, model, lambda bound: HorovodDriver(bound, process_set), self.tuner())


class HorovodStylePreset:
    """`Compression.none`, `.fp16` and `.bf16`: compressors in Horovod's sense as they stand, and callable like every other preset."""

    def __init__(self, name: str, compressor: Compressor, dtype: torch.dtype | None) -> None:
        self._name, self._compressor, self._dtype = name, compressor, dtype

    def __repr__(self) -> str:
        return f"Compression.{self._name}"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise _unbound(name, self)

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type]:
        """With Horovod it is a class, that scripts derive their own compressors from."""
        return (type(self._name, (), {"compress": staticmethod(self.compress), "decompress": staticmethod(self.decompress)}),)

    @property
    def method(self) -> Method:
        return self().method

    def __call__(self, *, error_feedback: bool = False, **options: Any) -> Compression:
        exchange = TwoPass(server_feedback=error_feedback) if self._dtype == torch.bfloat16 else AllReduce()
        compressor = replace(self._compressor, saturate=error_feedback) if isinstance(self._compressor, Cast) else self._compressor
        return Compression(compressor, _feedback(error_feedback), exchange, **options)

    def bind(self, model: Named, process_set: Any = None) -> BoundCompression:
        """As `none().bind(model)`."""
        return self().bind(model, process_set)

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        """The tensor as it travels, and its own type."""
        if self._dtype == torch.bfloat16 and horovod_is_running():
            raise CompressionError(
                "Compression.bf16 as it stands returns bfloat16 tensors, which Horovod cannot reduce; pass "
                "compression=Compression.bf16.bind(model), which sends them by itself."
            )
        return (tensor if self._dtype is None or not tensor.is_floating_point() else tensor.to(self._dtype)), tensor.dtype

    def decompress(self, tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        return tensor.to(ctx)


Compression.none = HorovodStylePreset("none", Identity(), None)
Compression.fp16 = HorovodStylePreset("fp16", Cast(), torch.float16)
Compression.bf16 = HorovodStylePreset("bf16", Cast(torch.bfloat16), torch.bfloat16)


def double_squeeze_comparison(
    compressor: Compressor | None = None, server_compressor: Compressor | None = None, **options: Any
) -> dict[str, Compression]:
    """The five methods that the DoubleSqueeze paper compares (Tang et al. 2019, section 5), by name, in the order of the paper's argument.

    `vanilla`: no compression. `uncompensated`: compressed both ways, no feedback. `worker_only`: feedback on the worker, and the server compresses
    again without. `mem_sgd`: feedback on the worker, and the server answers uncompressed (Stich et al. 2018). `double_squeeze`: feedback on both.
    `compressor` and `server_compressor` are any pair, as in `Compression.double_squeeze`; `options` are those of every preset.
    """
    worker = Sign() if compressor is None else compressor
    lossy_server, dense_server = TwoPass(server_compressor, server_feedback=False), TwoPass(Identity(), server_feedback=False)
    return {
        "vanilla": Compression.none(**options),
        "uncompensated": Compression(worker, NoFeedback(), lossy_server, **options),
        "worker_only": Compression(worker, ErrorFeedback(), lossy_server, **options),
        "mem_sgd": Compression(worker, ErrorFeedback(), dense_server, **options),
        "double_squeeze": Compression.double_squeeze(worker, server_compressor, **options),
    }


def _unbound(name: str, what: object) -> AttributeError:
    """Forgetting to bind is the usual mistake."""
    if not name.startswith("_") and hasattr(BoundCompression, name):
        return AttributeError(f"'{name}' is for a bound compression: compression = Compression.….bind(model), then compression.{name}(…).")
    return AttributeError(f"{type(what).__name__!r} object has no attribute {name!r}")


AnyCompression = HorovodStylePreset | Compression | BoundCompression | HorovodCompressor


def bind(compression: AnyCompression, named: Named) -> BoundCompression:
    """`compression`, bound to `named` unless it is bound already. A user's own `compress` and `decompress` do what they do on Horovod."""
    if isinstance(compression, BoundCompression):
        return compression
    if isinstance(compression, (Compression, HorovodStylePreset)):
        return compression.bind(named)
    if is_horovod_compressor(compression):
        return Compression(Identity(), NoFeedback(), CompressedAllReduce(compression), dense_below=0, dense_1d=False).bind(named)
    raise CompressionError(
        f"compression: expected Compression.<preset>(…), bound or not, or what has compress(tensor) and decompress(tensor, context) as Horovod's "
        f"have, got {compression!r}."
    )
