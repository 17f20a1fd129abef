"""What a user passes as `compression=`: presets, `bind`, `attach`, and saving of state."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .aggregator import Aggregator, Bucket, GroupSettings, Method, newcomers
from .agreement import Introduction
from .compressors import QSGD, BlockTopK, Cast, GlobalRandomBlock, Identity, Natural, RandomBlock, RandomK, Sign, Ternary, Threshold, TopK
from .compressors.base import check_unbiased
from .errors import CompressionError
from .exchange import AllGather, AllReduce, Central, CompressedAllReduce, CompSkip, ErrorReset, Every, HorovodCompressor, PowerSGD, TwoPass
from .exchange.skip import SkipPolicy
from .feedback import CSER, PEF, DistEFSGD, ErrorFeedback, GradientSquares, HessianAided, LocalMomentum, MemSGD, NoFeedback
from .feedback.curvature import Curvature
from .horovod_slot import HorovodSlot
from .protocols import Compressor, Exchange, Feedback, Traffic
from .transport import SelfTransport, Transport
from .transport.horovod import HorovodTransport, SlotTransport, horovod_is_running

__all__ = ["AnyCompression", "BoundCompression", "Compression", "bind", "double_squeeze_comparison"]

Named = torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]

_ATTACH = "call compression.attach(optimizer), with what hvd.DistributedOptimizer returned, before the first backward pass."


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
    ) -> None:
        if exchange is None:
            exchange = AllReduce() if getattr(compressor, "summable", False) else AllGather()
        rule = ErrorFeedback() if feedback is None else feedback
        self.method = Method(compressor, rule, exchange, dense_below, dense_1d, seed, warmup_steps, ratio_schedule, exact, verify_every)

    def __repr__(self) -> str:
        m = self.method
        options = f"dense_below={m.dense_below}, dense_1d={m.dense_1d}, seed={m.seed}"
        if m.warmup_steps or m.ratio_schedule:
            options += f", warmup_steps={m.warmup_steps}, ratio_schedule={m.ratio_schedule}"
        return f"Compression({m.compressor}, {m.feedback}, {m.exchange}, {options})"

    def bind(self, model: Named, process_set: Any = None) -> BoundCompression:
        """Tie the method to a module's parameters, or to (name, parameter) pairs, and give it state.

        With a module, methods that evaluate it at different points on different ranks (DEF) also average its batch-norm statistics.

        Bind once per model and optimizer. `process_set`: Horovod's, when the optimizer has one. Raises `CompressionError` for duplicate
        names, a parameter under two names, and complex parameters.
        """
        return BoundCompression(self.method, model, process_set)

    if not TYPE_CHECKING:  # where it would hide misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            raise _unbound(name, self)

    # Horovod calls these two on whatever it is given as `compression=`.

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """For methods without state only (`none()`, `fp16()`, `bf16()`); all others need `bind`."""
        return self._stateless().compress(tensor)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return self._stateless().decompress(tensor, ctx)

    def _stateless(self) -> _Bare:
        if isinstance(self.method.feedback, NoFeedback) and not self.method.exchange.approximates:
            if isinstance(self.method.compressor, Identity):
                return Compression.none
            if isinstance(self.method.compressor, Cast):
                return Compression.fp16 if self.method.compressor.dtype == torch.float16 else Compression.bf16
        raise CompressionError(f"{self!r} keeps state by parameter name: pass compression=Compression.….bind(model), not the unbound method.")

    # -- presets -----------------------------------------------------------------------------------------------------------------

    none: ClassVar[_Bare]
    """No compression; as Horovod's, bare or called."""

    fp16: ClassVar[_Bare]
    """Gradients rounded to float16; bare or called. `Compression.fp16(error_feedback=True).bind(model)` keeps the rounding errors."""

    bf16: ClassVar[_Bare]
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
        if not isinstance(central, bool):
            raise CompressionError(f"double_squeeze: central must be True or False, got {central!r:.100}.")
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
        """CompSkipDSGD, a reconstruction: dist-EF-SGD in which workers and servers skip steps by `hvd_ecsgd.exchange`'s `Every`, `Bernoulli` or
        `NormBased`, set independently. By default workers send in every second step, in turns, and servers always. Momentum as in `dist_ef_sgd`."""
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
    if not isinstance(wanted, bool):
        raise CompressionError(f"error_feedback must be True or False, got {wanted!r:.100}.")
    return ErrorFeedback() if wanted else NoFeedback()


class _Bare:
    """`Compression.none`, `.fp16` and `.bf16`: compressors in Horovod's sense as they stand, and callable like every other preset."""

    def __init__(self, compressor: Compressor, dtype: torch.dtype | None) -> None:
        self._compressor, self._dtype = compressor, dtype

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


Compression.none = _Bare(Identity(), None)
Compression.fp16 = _Bare(Cast(), torch.float16)
Compression.bf16 = _Bare(Cast(torch.bfloat16), torch.bfloat16)


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


class BoundCompression:
    """A method tied to a model's parameters: residuals, step counter, seed. Made by `Compression.….bind(model)`.

    Pass it as `compression=` to an unmodified `horovod.torch.DistributedOptimizer`, or to hvd_ecsgd's or mpi_backend's.
    """

    def __init__(self, method: Method, model: Named, process_set: Any = None) -> None:
        self.method = method
        if process_set is not None and not callable(getattr(process_set, "size", None)):
            raise CompressionError(
                f"bind(): process_set must be a ProcessSet of Horovod's, the optimizer's, or None for all, got {process_set!r:.100}."
            )
        self._process_set = process_set
        self.named, self._frozen = _checked(model)
        modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        self._modules: list[Any] = [m for m in modules if hasattr(m, "running_mean") and hasattr(m, "running_var")]
        self.ids = frozenset(id(p) for _, p in self.named)
        self.scaler: Any = None
        """The GradScaler that was attached."""
        self._places: dict[int, tuple[int, int]] = {}
        self._introduction = Introduction(self.named, self._frozen, process_set)
        self._aggregator: Aggregator | None = None
        newcomers.add(self)
        self._slot: HorovodSlot | None = None
        self._waiting: Mapping[str, Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._warned = False
        if method.feedback.owns_momentum:
            _claim(self)
        if method.feedback.shifts and isinstance(model, torch.nn.Module):
            model.register_state_dict_pre_hook(_ShiftWarning(self))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.method}, {len(self.named)} parameters>"

    # -- Horovod's protocol ------------------------------------------------------------------------------------------------------

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Called by Horovod with `p.grad`; returns what Horovod reduces, and a context."""
        return self._slotted().compress(tensor)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Called by Horovod with what it reduced; writes the mean into the gradient and returns it."""
        return self._slotted().decompress(tensor, ctx)

    def _slotted(self) -> HorovodSlot:
        if self._slot is None:
            if self._aggregator is not None:
                raise CompressionError("this compression object belongs to another optimizer; bind one for each.")
            transport = SlotTransport(self._process_set)
            aggregator = Aggregator(
                self.method, self.named, rank=transport.rank, size=transport.size, settings=self._settings, transport=transport.direct
            )
            self.adopt(aggregator)
            self._slot = HorovodSlot(aggregator, transport, self._frozen, self._check_skip, self._introduction)
            _claim(self)
        return self._slot

    def _check_skip(self, name: str) -> None:
        """In a skipped step x must not move; an unmodified Horovod steps its optimizer all the same."""
        plain = self._optimizer is not None and not any(
            group.get(option, 0) for group in self._optimizer.param_groups for option in ("momentum", "weight_decay", "betas")
        )
        if not plain:
            raise CompressionError(
                f"parameter '{name}': this step is skipped, and the optimizer's own momentum and weight decay would move it nevertheless. Call "
                "compression.attach(optimizer) with momentum=0 and weight_decay=0 in the optimizer; dist_ef_sgd and comp_skip take them instead."
            )

    def before_step(self) -> None:
        """Before a step of an optimizer that is not ours: apply the update where the method does that itself, and raise when it cannot."""
        if self._slot is not None:
            self._slot.before_step(scaled=self.scaler is not None and self.loss_scale != 1.0)
        if self._aggregator is None and self.method.feedback.owns_momentum:
            raise CompressionError(self._refusal())

    def _refusal(self) -> str:
        if self.method.feedback.applies_update:
            return (
                f"{self.method.feedback} applies momentum, weight decay and the update itself, and has not seen a gradient of parameter "
                f"'{self.named[0][0]}': {_ATTACH} Without Horovod, use hvd_ecsgd.DistributedOptimizer or `import mpi_backend as hvd`."
            )
        return (
            f"{self.method.feedback} keeps momentum and weight decay itself, but has not been given a single gradient of parameter "
            f"'{self.named[0][0]}': Horovod does not compress with one process, and the step would be plain SGD without momentum. "
            "Use hvd_ecsgd.DistributedOptimizer, or no compression with one process."
        )

    # -- hyper-parameters --------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> BoundCompression:
        """Read learning rates live from `optimizer` (Horovod's, the one that steps). May be called again. Returns self.

        `scaler`: the GradScaler that scales the loss. Gradients are unscaled when they are compressed, so that all state is in true units whatever
        the scale does, and the mean that the optimizer gets is scaled again. Own optimizers with a method without state attach it by themselves, in
        its first `step`.

        Own optimizers attach by themselves. Without it, methods in gradient units assume a constant learning rate and say so once. Methods that
        apply the update themselves (`detached`, `local_momentum`, `pef`, …) need it: they read lr, momentum and weight decay of the SGD inside
        Horovod's optimizer, move the parameters just before that would, and leave it no gradients (`p.grad` is None after the step).
        Raises `CompressionError` when the optimizer holds none of the bound parameters, when such a method is given another optimizer than
        Horovod's around a plain SGD, and for momentum both in the method and in the optimizer (looked at again in every step).
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise CompressionError(f"attach(): expected the optimizer that hvd.DistributedOptimizer returned, got {optimizer!r:.100}.")
        if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
            raise CompressionError(f"attach(): scaler must be a torch.amp.GradScaler, got {scaler!r:.100}.")
        self.scaler = scaler if scaler is not None else self.scaler
        ours: object = getattr(optimizer, "compression", None)
        if ours is self:  # ours: attached already
            return self
        feedback = self.method.feedback
        bound = {id(p) for _, p in self.named}
        if not any(id(p) in bound for group in optimizer.param_groups for p in group["params"]):
            raise CompressionError(
                f"attach(): the optimizer holds none of the bound parameters ('{self.named[0][0]}', …). Pass the optimizer that "
                "hvd.DistributedOptimizer returned for this model."
            )
        for g, group in enumerate(optimizer.param_groups):
            if any(id(p) in bound for p in group["params"]):
                feedback.check_group(group, f"param group {g}")
        if feedback.applies_update:
            self._check_applied_to(optimizer)
        self._optimizer = optimizer
        on_horovod = getattr(optimizer, "_compression", None) is self and horovod_is_running()
        if on_horovod and not feedback.applies_update and HorovodTransport(self._process_set).size == 1:
            warnings.warn(
                f"{self.method.compressor}: Horovod does not compress with one process, so this trains without it. "
                "hvd_ecsgd.DistributedOptimizer, and mpi_backend's, compress with one process too.",
                UserWarning,
                stacklevel=2,
            )
        if feedback.applies_update:
            self._slotted()  # now, so that state that is loaded shifts the parameters before the next forward pass
        return self

    def _check_applied_to(self, optimizer: torch.optim.Optimizer) -> None:
        """The update is applied in a hook before the step of Horovod's optimizer, in place of what SGD would do."""
        if getattr(optimizer, "_compression", None) is not self:
            raise CompressionError(
                f"attach(): {self.method.feedback} applies the update itself, and the optimizer given (a {type(optimizer).__name__}) is not the one "
                "that horovod.torch.DistributedOptimizer(…, compression=this object) returned. Pass that one; without Horovod use "
                "hvd_ecsgd.DistributedOptimizer(optimizer, compression=…) or `import mpi_backend as hvd`."
            )
        check_plain_sgd(self.method, getattr(type(optimizer).__base__, "step", None), type(optimizer).__name__)

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by now; 1 without a scaler."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _settings(self, bucket: Bucket) -> GroupSettings:
        feedback = self.method.feedback
        if self._optimizer is None:
            if feedback.owns_momentum:
                raise CompressionError(
                    f"{feedback} applies momentum and weight decay itself and must see the optimizer's param groups (parameter "
                    f"'{bucket.segments.names[0]}'): {_ATTACH}"
                )
            if feedback.needs_learning_rate:
                raise CompressionError(
                    f"{feedback} needs the learning rate itself (parameter '{bucket.segments.names[0]}'): call compression.attach(optimizer) "
                    "before the first backward pass."
                )
            if not self._warned and feedback.keeps_residual:
                self._warned = True
                warnings.warn(
                    "the learning rate is taken to be constant; call compression.attach(optimizer) if it changes.", UserWarning, stacklevel=2
                )
            return GroupSettings(loss_scale=self.loss_scale)
        g = self._group_index(bucket.parameters[0], self._optimizer.param_groups)
        if g is not None:
            group = self._optimizer.param_groups[g]
            feedback.check_group(group, f"param group {g}")
            return GroupSettings.of(group, self.loss_scale)
        raise CompressionError(
            f"parameter '{bucket.segments.names[0]}' is in no param group of the attached optimizer; attach the optimizer that trains it."
        )

    def _group_index(self, parameter: torch.Tensor, groups: list[dict[str, Any]]) -> int | None:
        """Looked up live, since load_state_dict replaces the groups and add_param_group adds some; where it was last time first."""
        g, i = self._places.get(id(parameter), (0, 0))
        if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is parameter:
            return g
        for g, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if p is parameter:
                    self._places[id(parameter)] = (g, i)
                    return g
        return None

    def switch(self, compression: Compression | _Bare) -> None:
        """Go on with another compressor and exchange, and its warm-up and ratio schedule, from the next step on: with `compression`'s, unbound.

        Residuals are carried over in their units, so the feedback rule must be the same (a method without one may switch to `ErrorFeedback`); what
        servers hold and the new exchange has no place for goes back to the workers' residuals. `dense_below`, `dense_1d` and `seed` stay.
        Call it between steps, on every rank; once training has begun it is collective. A script that resumes later binds the new method.
        Raises `CompressionError`, or `DisagreementError` on every rank, with nothing changed.
        """
        if not isinstance(compression, (Compression, _Bare)):
            raise CompressionError(f"switch(): expected Compression.<preset>(…), not bound, got {compression!r:.100}.")
        new = (compression if isinstance(compression, Compression) else compression()).method
        self.check_between_steps("the method was switched")
        if self._waiting is not None:
            raise CompressionError("switch(): state was loaded and no optimizer has taken it over yet; make the optimizer first.")
        if self._aggregator is not None:
            self._aggregator.switch(new)
        self.method = self.method.switched(new)

    # -- state -------------------------------------------------------------------------------------------------------------------

    def adopt(self, aggregator: Aggregator) -> None:
        """For optimizers: the aggregator that holds this object's state from now on. State loaded before is handed over."""
        if self._aggregator is not None:
            raise CompressionError("this compression object belongs to another optimizer already; bind one for each.")
        self._aggregator = aggregator
        aggregator.statistics = self._statistics
        if self.method.feedback.shifts:  # they are averaged together
            aggregator.also_agree_on(**{"batch-norm statistics (bind the module itself on every rank)": [tuple(t.shape) for t in self._statistics()]})
        newcomers.discard(self)
        if self._waiting is not None:
            state, self._waiting = self._waiting, None
            aggregator.load_state_dict(state)

    def _statistics(self) -> list[torch.Tensor]:
        """Running means and variances of the module that was bound."""
        return [t for m in self._modules for t in (m.running_mean, m.running_var) if isinstance(t, torch.Tensor)]

    @property
    def aggregator(self) -> Aggregator:
        if self._aggregator is None:
            raise CompressionError("this compression object has not been used by an optimizer yet.")
        return self._aggregator

    def state_dict(self) -> dict[str, Any]:
        """Copies of all state by parameter name: residuals, server residuals, momentum, step. Differs between ranks: save one per rank.

        Raises `CompressionError` between a backward pass and its `step()`.
        """
        self.check_between_steps("the compression's state was asked for")
        if self._aggregator is None:
            return dict(self._waiting) if self._waiting is not None else Aggregator(self.method, self.named).state_dict()
        return self._aggregator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over state saved by the same rank of a group of the same size.

        Raises `CompressionError`, with nothing changed, when it does not fit.
        """
        if self._aggregator is None and isinstance(state, Mapping) and state.get("method") == repr(self.method):
            self._waiting = state  # rank and size are not known yet; `adopt` will look at the rest
        else:
            self.prepare_load(state)()

    def prepare_load(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check `state` now; calling the result takes it over and cannot fail. Raises as `load_state_dict`."""
        self.check_between_steps("state was loaded")
        if self._aggregator is not None:
            return self._aggregator.prepare_load(state)
        self.template().prepare_load(state)

        def keep() -> None:
            self._waiting = state

        return keep

    def template(self) -> Aggregator:
        """The aggregator, or while no optimizer has one, a stateless one of the same layout."""
        if self._aggregator is not None:
            return self._aggregator
        transport = self.transport if horovod_is_running() else SelfTransport()
        return Aggregator(self.method, self.named, rank=transport.rank, size=transport.size)

    @property
    def transport(self) -> Transport:
        """Between the workers that train together: the optimizer's; on an unmodified Horovod, Horovod's."""
        if self._aggregator is not None:
            return self._aggregator.transport
        if horovod_is_running():
            return HorovodTransport(self._process_set)
        raise CompressionError("this compression object has not been used by an optimizer yet; make the DistributedOptimizer first.")

    def check_between_steps(self, what: str) -> None:
        """Raise `CompressionError` when a step is under way, from its first gradient on; `what` says what was tried."""
        if self._aggregator is not None:
            self._aggregator.check_between_steps(what, begun=self._slot is not None and self._slot.accumulates)

    def check_together(self, what: str) -> None:
        """See `Aggregator.check_together`."""
        if self._aggregator is not None:
            self._aggregator.check_together(what)

    def at(self, point: Literal["averaged", "virtual", "local"]) -> AbstractContextManager[None]:
        """Hold the parameters at a point for evaluation or saving; see `Aggregator.at`."""
        if self._aggregator is None and self.method.feedback.unit == "gradient" and point != "virtual":
            Aggregator.check_point(point)
            return nullcontext()  # one process under Horovod, which does not call us then; nothing is shifted
        return self.aggregator.at(point)

    @property
    def replicas(self) -> Literal["equal", "equal_at_x"]:
        """What is equal on all ranks between steps: the parameters, or (DEF, SAEF) only x, which `at("averaged")` shows."""
        return "equal_at_x" if self.method.feedback.shifts else "equal"

    @property
    def traffic(self) -> Traffic:
        """Bytes of this worker so far."""
        return self._aggregator.traffic if self._aggregator is not None else Traffic()

    @property
    def undone_steps(self) -> int:
        """Steps that were undone on all ranks because some rank held an inf or NaN."""
        return self._aggregator.undone if self._aggregator is not None else 0


class _ShiftWarning:
    """Says that `model.state_dict()` was called where the parameters are shifted. A copied or unpickled module leaves the warning behind."""

    def __init__(self, bound: BoundCompression | None) -> None:
        self._bound = (lambda: None) if bound is None else weakref.ref(bound)

    def __call__(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        bound = self._bound()
        if bound is not None and bound._aggregator is not None and bound._aggregator.shifted:
            warnings.warn(
                f"{bound.method.feedback} holds the parameters at a shifted point that differs between ranks; "
                "save and evaluate inside `with compression.at('averaged'):`.",
                UserWarning,
                stacklevel=3,
            )

    def __reduce__(self) -> tuple[type[_ShiftWarning], tuple[None]]:
        return (_ShiftWarning, (None,))

    def __deepcopy__(self, memo: Any) -> _ShiftWarning:
        return _ShiftWarning(None)


# Steps of optimizers that are not ours, for parameters of a method that must know. With one process an unmodified Horovod never calls compress,
# and a method with momentum inside would vanish silently; and Horovod steps after an undone exchange. The hook is registered at the first such
# bind and never removed: torch iterates over its hooks unlocked.
_claims: dict[int, weakref.ref[BoundCompression]] = {}
_claims_lock = threading.Lock()
_claims_watched = False


def _claim(bound: BoundCompression) -> None:
    global _claims_watched
    with _claims_lock:
        if not _claims_watched:
            register_optimizer_step_pre_hook(_before_step)
            _claims_watched = True
        for _, parameter in bound.named:
            _claims[id(parameter)] = weakref.ref(bound)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    claimed: dict[int, BoundCompression] = {}
    late: torch.Tensor | None = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            claim = _claims.get(id(parameter))
            bound = None if claim is None else claim()
            if bound is not None and id(parameter) in bound.ids:  # while it lives it holds its parameters, so the id is theirs
                claimed[id(bound)] = bound
            else:
                if claim is not None:
                    _claims.pop(id(parameter), None)
                if parameter.requires_grad and parameter.grad is not None:
                    late = parameter
    if late is not None and claimed:
        raise CompressionError(
            f"a parameter of shape {tuple(late.shape)} takes part in training but was frozen or absent when the compression was bound; Horovod does "
            "not average its gradients, and ranks would drift apart. Bind and wrap while everything is trainable and freeze afterwards, or bind "
            "again and make a new optimizer after unfreezing or adding parameters."
        )
    for bound in claimed.values():
        bound.before_step()


def check_plain_sgd(method: Method, step: Any, name: str) -> None:
    """`step`, of the optimizer named `name`, is torch.optim.SGD's, which a method that applies the update itself stands in for."""
    if getattr(step, "__func__", step) is not torch.optim.SGD.step:
        raise CompressionError(
            f"{method.feedback} works with torch.optim.SGD, whose lr, momentum and weight_decay it applies itself; got {name} with another step()."
        )


AnyCompression = _Bare | Compression | BoundCompression | HorovodCompressor


def bind(compression: AnyCompression, named: Named) -> BoundCompression:
    """`compression`, bound to `named` unless it is bound already. A user's own `compress` and `decompress` do what they do on Horovod."""
    if isinstance(compression, BoundCompression):
        return compression
    if isinstance(compression, (Compression, _Bare)):
        return compression.bind(named)
    if _takes(compression, "compress", 1) and _takes(compression, "decompress", 2):
        return Compression(Identity(), NoFeedback(), CompressedAllReduce(compression), dense_below=0, dense_1d=False).bind(named)
    raise CompressionError(
        f"compression: expected Compression.<preset>(…), bound or not, or what has compress(tensor) and decompress(tensor, context) as Horovod's "
        f"have, got {compression!r}."
    )


def _takes(what: object, function: str, arguments: int) -> bool:
    """It has this function, for so many arguments: a class of whose objects that is true has not."""
    found = getattr(what, function, None)
    if not callable(found):
        return False
    try:
        inspect.signature(found).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # compiled, and says nothing of itself
        pass
    return True


def _checked(model: Named) -> tuple[list[tuple[str, torch.nn.Parameter]], list[tuple[str, torch.nn.Parameter]]]:
    """(trainable, frozen) pairs, or an error that names the parameter."""
    if not isinstance(model, (torch.nn.Module, Iterable)):
        raise CompressionError(f"bind(): expected a module or (name, parameter) pairs such as model.named_parameters(), got {model!r:.100}.")
    pairs = list(model.named_parameters()) if isinstance(model, torch.nn.Module) else list(model)
    names: set[str] = set()
    owners: dict[int, str] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], torch.Tensor)):
            raise CompressionError(f"bind(): expected a module or (name, parameter) pairs such as model.named_parameters(), got {pair!r:.100}.")
        name, parameter = pair
        if name in names:
            raise CompressionError(f"bind(): two parameters are named '{name}'; give them different names, e.g. prefixed by their module's.")
        if id(parameter) in owners:
            raise CompressionError(
                f"bind(): '{name}' and '{owners[id(parameter)]}' are the same (tied) parameter; bind it once. model.named_parameters() lists it once."
            )
        if torch.nn.parameter.is_lazy(parameter):
            raise CompressionError(f"bind(): parameter '{name}' of a lazy module has no shape yet; run a batch through the model first.")
        if parameter.is_complex():
            raise CompressionError(
                f"bind(): parameter '{name}' is {parameter.dtype}; complex gradients are not supported. Keep real and imaginary part as "
                "two parameters (torch.view_as_real)."
            )
        if parameter.is_meta:
            raise CompressionError(f"bind(): parameter '{name}' is on the meta device and has no values; give it some by model.to_empty(…) first.")
        if parameter.requires_grad and not parameter.is_leaf:
            raise CompressionError(f"bind(): '{name}' is not a leaf tensor and never gets a gradient; pass the parameter it was computed from.")
        names.add(name)
        owners[id(parameter)] = name
    trainable = [(n, p) for n, p in pairs if p.requires_grad]
    if not trainable:
        raise CompressionError("bind(): there is no parameter that requires a gradient.")
    return trainable, [(n, p) for n, p in pairs if not p.requires_grad]
