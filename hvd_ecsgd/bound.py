"""A method tied to a model's parameters: what Horovod and the optimizers call, `attach`, and saving of state."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Literal, NoReturn, Protocol

import torch

from .aggregator import Aggregator
from .bucket import Bucket
from .errors import CompressionError
from .horovod.introduction import Introduction
from .horovod.slot import HorovodSlot
from .horovod.step_hooks import claim
from .horovod.transport import HorovodTransport, SlotTransport, horovod_is_running
from .method import Method
from .protocols import GroupSettings, Role, Traffic
from .saved_state import check_head
from .transport import SelfTransport, Transport
from .trees import is_unicode

__all__ = ["BoundCompression", "Named", "check_plain_sgd"]

Named = torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]

_ATTACH = "call compression.attach(optimizer), with what hvd.DistributedOptimizer returned, before the first backward pass."

_NO_COPY = (
    "a bound compression cannot be {}: it belongs to the parameters of one model. Keep its state_dict(), bind the method anew to the other model "
    "(Compression.….bind(model)), and load_state_dict() there; what is not bound can be copied and pickled."
)


class Unbound(Protocol):
    """`Compression.<preset>(…)`."""

    @property
    def method(self) -> Method: ...


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
        self._slot: HorovodSlot | None = None
        self._waiting: Mapping[str, Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._own: Callable[[], torch.optim.Optimizer | None] | None = None
        """The optimizer of ours, if it is one that holds this object's state."""
        self._warned = False
        if method.feedback.takes.momentum:
            claim(self)
        if Role.POINT in method.slot_names and isinstance(model, torch.nn.Module):
            with suppress(Exception):  # a convenience, which scripted modules and some wrappers do not offer
                model.register_state_dict_pre_hook(_ShiftWarning(self))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.method}, {len(self.named)} parameters>"

    def __copy__(self) -> NoReturn:
        raise CompressionError(_NO_COPY.format("copied"))

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise CompressionError(_NO_COPY.format("copied"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CompressionError(_NO_COPY.format("pickled"))

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
            self._check_clip()
            transport = SlotTransport(self._process_set)
            aggregator = Aggregator(
                self.method, self.named, rank=transport.rank, size=transport.size, settings=self._settings, transport=transport.direct
            )
            self.adopt(aggregator)
            self._slot = HorovodSlot(aggregator, transport, self._frozen, self._check_skip, self._introduction)
            claim(self)
        return self._slot

    def _check_clip(self) -> None:
        if self.method.clip_norm is not None:
            raise CompressionError(
                f"clip_norm={self.method.clip_norm} is not to be had on an unmodified Horovod: it compresses parameter by parameter, while the "
                "norm of the whole gradient is not known. Use clip_value=…, or `import mpi_backend as hvd`; a method in gradient units may clip the "
                "mean between synchronize() and step()."
            )

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
        if self._aggregator is None and self.method.feedback.takes.momentum:
            raise CompressionError(self._refusal())

    def _refusal(self) -> str:
        if self.method.feedback.takes.update:
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
        if self._own is not None and self._own() is optimizer:  # attached already
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
                feedback.check_group(group, _group_of(optimizer, g))
        if feedback.takes.update:
            self._check_applied_to(optimizer)
        self._optimizer = optimizer
        on_horovod = getattr(optimizer, "_compression", None) is self and horovod_is_running()
        if on_horovod:
            self._check_clip()
        if on_horovod and not feedback.takes.update and HorovodTransport(self._process_set).size == 1:
            warnings.warn(
                f"{self.method.compressor}: Horovod does not compress with one process, so this trains without it. "
                "hvd_ecsgd.DistributedOptimizer, and mpi_backend's, compress with one process too.",
                UserWarning,
                stacklevel=2,
            )
        if feedback.takes.update:
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
            if feedback.takes.momentum:
                raise CompressionError(
                    f"{feedback} applies momentum and weight decay itself and must see the optimizer's param groups (parameter "
                    f"'{bucket.segments.names[0]}'): {_ATTACH}"
                )
            if feedback.takes.learning_rate:
                raise CompressionError(
                    f"{feedback} needs the learning rate itself (parameter '{bucket.segments.names[0]}'): call compression.attach(optimizer) "
                    "before the first backward pass."
                )
            if not self._warned and Role.RESIDUAL in self.method.slot_names:
                self._warned = True
                warnings.warn(
                    "the learning rate is taken to be constant; call compression.attach(optimizer) if it changes.", UserWarning, stacklevel=2
                )
            return GroupSettings(loss_scale=self.loss_scale)
        g = self._group_index(bucket.parameters[0], self._optimizer.param_groups)
        if g is not None:
            feedback.check_group(self._optimizer.param_groups[g], _group_of(self._optimizer, g))
            return self.settings_of(self._optimizer, g)
        raise CompressionError(
            f"parameter '{bucket.segments.names[0]}' is in no param group of the attached optimizer; attach the optimizer that trains it."
        )

    def settings_of(self, optimizer: torch.optim.Optimizer, g: int) -> GroupSettings:
        """Of the optimizer's param group `g` now. Warns once where methods in gradient units must take its learning rate to be constant."""
        feedback = self.method.feedback
        group, where = optimizer.param_groups[g], _group_of(optimizer, g)
        needs = feedback.takes.learning_rate
        if not self._warned and group.get("lr") is None and Role.RESIDUAL in self.method.slot_names and not needs:
            self._warned = True
            warnings.warn(
                f"{where} has no learning rate; what the method holds back is taken to be worth the same in all steps. Give the optimizer a learning "
                "rate (lr=) if it has one that changes.",
                UserWarning,
                stacklevel=2,
            )
        return GroupSettings.of(group, self.loss_scale, where, needs)

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

    def switch(self, compression: Unbound) -> None:
        """Go on with another compressor and exchange, and its warm-up and ratio schedule, from the next step on: with `compression`'s, unbound.

        Residuals are carried over in their units, so the feedback rule must be the same (a method without one may switch to `ErrorFeedback`); what
        servers hold and the new exchange has no place for goes back to the workers' residuals. `dense_below`, `dense_1d` and `seed` stay.
        Call it between steps, on every rank; once training has begun it is collective. A script that resumes later binds the new method.
        Raises `CompressionError`, or `DisagreementError` on every rank, with nothing changed.
        """
        new = getattr(compression, "method", None)
        if not isinstance(new, Method) or isinstance(compression, BoundCompression):
            raise CompressionError(f"switch(): expected Compression.<preset>(…), not bound, got {compression!r:.100}.")
        self.check_between_steps("the method was switched")
        if self._waiting is not None:
            raise CompressionError("switch(): state was loaded and no optimizer has taken it over yet; make the optimizer first.")
        if self._aggregator is not None:
            self._aggregator.switch(new)
        self.method = self.method.switched(new)

    # -- state -------------------------------------------------------------------------------------------------------------------

    def adopt(self, aggregator: Aggregator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """The aggregator that holds this object's state from now on. State loaded before is handed over. `optimizer`: ours, that it belongs to."""
        if self._aggregator is not None:
            raise CompressionError("this compression object belongs to another optimizer already; bind one for each.")
        self._aggregator = aggregator
        self._own = None if optimizer is None else weakref.ref(optimizer)
        aggregator.expect_first_step()
        aggregator.statistics = self._statistics
        if Role.POINT in self.method.slot_names:  # they are averaged together
            aggregator.also_agree_on(**{"batch-norm statistics (bind the module itself on every rank)": [tuple(t.shape) for t in self._statistics()]})
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
        if self._aggregator is None:
            check_head(state, repr(self.method))
            # Rank and size are not known yet, so `adopt` will look at those, and we at the rest.
            Aggregator(self.method, self.named, rank=state["rank"], size=max(1, state["size"])).prepare_load(state)
            self._waiting = state
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

    def discard(self) -> None:
        """Throw the step away that was exchanged and not applied, on all ranks, as one with an inf; see `DistributedOptimizer`'s `discard`.

        Collective. On an unmodified Horovod it follows `optimizer.synchronize()`, and a method that leaves the update to the optimizer needs
        `exact=True`. Raises `CompressionError` otherwise.
        """
        own: Any = self._own() if self._own is not None else None
        if own is not None:
            own.discard()
        elif self._slot is not None:
            self._slot.discard()
        else:
            for _, parameter in self.named:  # one process under Horovod: nothing was kept
                parameter.grad = None

    def check_together(self, what: str) -> None:
        """See `Aggregator.check_together`."""
        self._meet_on_horovod()
        if self._aggregator is not None:
            self._aggregator.check_together(what)

    def _meet_on_horovod(self) -> None:
        """Before the first step on an unmodified Horovod: have what the other ranks can be met by."""
        if self._aggregator is None and horovod_is_running() and HorovodTransport(self._process_set).size > 1:
            self._slotted()

    def at(self, point: Literal["averaged", "virtual", "local"]) -> AbstractContextManager[None]:
        """Hold the parameters at a point for evaluation or saving; see `Aggregator.at`."""
        if self._aggregator is None and self.method.feedback.unit == "gradient" and point != "virtual":
            Aggregator.check_point(point)
            return nullcontext()  # one process under Horovod, which does not call us then; nothing is shifted
        if point == "virtual":
            self._meet_on_horovod()
        return self.aggregator.at(point)

    @property
    def replicas(self) -> Literal["equal", "equal_at_x"]:
        """What is equal on all ranks between steps: the parameters, or (DEF, SAEF) only x, which `at("averaged")` shows."""
        return "equal_at_x" if Role.POINT in self.method.slot_names else "equal"

    @property
    def traffic(self) -> Traffic:
        """Bytes of this worker so far."""
        return self._aggregator.traffic if self._aggregator is not None else Traffic()

    @property
    def undone_steps(self) -> int:
        """Steps that were undone on all ranks because some rank held an inf or NaN, or because the script discarded them."""
        return self._aggregator.undone if self._aggregator is not None else 0


def _group_of(optimizer: torch.optim.Optimizer, g: int) -> str:
    return f"param group {g} of {type(optimizer).__name__}"


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


def check_plain_sgd(method: Method, step: Any, name: str) -> None:
    """`step`, of the optimizer named `name`, is torch.optim.SGD's, which a method that applies the update itself stands in for."""
    if getattr(step, "__func__", step) is not torch.optim.SGD.step:
        raise CompressionError(
            f"{method.feedback} works with torch.optim.SGD, whose lr, momentum and weight_decay it applies itself; got {name} with another step()."
        )


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
        if not is_unicode(name):
            raise CompressionError(
                f"bind(): the parameter name {name!a} holds half of a surrogate pair, which no file or network carries as text; rename its module."
            )
        if name in names:
            raise CompressionError(f"bind(): two parameters are named '{name}'; give them different names, e.g. prefixed by their module's.")
        if id(parameter) in owners:
            raise CompressionError(
                f"bind(): '{name}' and '{owners[id(parameter)]}' are the same (tied) parameter; bind it once. model.named_parameters() lists it once."
            )
        if torch.nn.parameter.is_lazy(parameter):
            raise CompressionError(f"bind(): parameter '{name}' of a lazy module has no shape yet; run a batch through the model first.")
        if parameter.is_complex() and parameter.requires_grad:
            raise CompressionError(
                f"bind(): parameter '{name}' is {parameter.dtype}; complex gradients are not supported. Keep real and imaginary part as "
                "two parameters (torch.view_as_real), or freeze it (requires_grad_(False))."
            )
        if parameter.is_meta and parameter.requires_grad:
            raise CompressionError(f"bind(): parameter '{name}' is on the meta device and has no values; give it some by model.to_empty(…) first.")
        if parameter.requires_grad and not parameter.is_leaf:
            raise CompressionError(f"bind(): '{name}' is not a leaf tensor and never gets a gradient; pass the parameter it was computed from.")
        names.add(name)
        owners[id(parameter)] = name
    trainable = [(n, p) for n, p in pairs if p.requires_grad]
    if not trainable:
        raise CompressionError("bind(): there is no parameter that requires a gradient.")
    return trainable, [(n, p) for n, p in pairs if not p.requires_grad]
