"""A method tied to a model's parameters: what scripts, Horovod and the optimizers hold, with `attach`, `at`, `switch` and saving of state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Literal, NoReturn, Protocol

import torch

from ..errors import CompressionError
from ..protocols import Role, Traffic
from ..transport.base import Transport
from .aggregator import Aggregator
from .attached import Attached
from .copies import Averages, ShiftWarning
from .meter import Meter, check_unmeasured, metrics
from .method import Method
from .points import Point, check_point
from .saved_state import check_head
from .state import MethodState
from .step_hooks import follow
from .trees import is_unicode
from .tuner import Tuner

__all__ = ["BoundCompression", "Driver", "HorovodProtocol", "Named"]

Named = torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]


class Unbound(Protocol):
    """`Compression.<preset>(…)`."""

    @property
    def method(self) -> Method: ...


class Driver(Protocol):
    """Who feeds gradients to an aggregator and applies what comes of them: an own optimizer, an unmodified Horovod, a loop of one's own."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The one that the script holds, of a driver that reads its hyper-parameters by itself."""
        ...

    @property
    def begun(self) -> bool:
        """Gradients of a step have come that the aggregator has not seen yet."""
        ...

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """`compression.attach` was called with another optimizer than the driver's. Raises `CompressionError` where the method cannot work with it
        here."""
        ...

    def catch_up(self) -> None:
        """Return when nothing reads the parameters any more of gradients that were handed over: a thread may be behind the script."""
        ...

    def meet(self, what: str) -> None:
        """All ranks call this before they do `what` together outside of a step. Raises `DisagreementError`, on every rank, where ranks do different
        things, `CompressionError` where some have joined and will not come."""
        ...

    def discard(self) -> None:
        """Throw the step away that was exchanged and not applied, on all ranks, as one with an inf."""
        ...


class HorovodProtocol(Driver, Protocol):
    """The driver that a bound compression begins with: that of an unmodified Horovod, which calls these and says nothing before."""

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]: ...

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor: ...

    def appear(self) -> None:
        """Make what other ranks can be met by, also before the first step, where there are some."""
        ...

    def transport(self) -> Transport | None:
        """To Horovod's workers, while it runs."""
        ...


class BoundCompression:
    """A method tied to a model's parameters: residuals, step counter, seed. Made by `Compression.….bind(model)`.

    Pass it as `compression=` to an unmodified `horovod.torch.DistributedOptimizer`, or to hvd_ecsgd's or mpi_backend's. `horovod` makes the driver
    that it begins with; an own optimizer's takes its place.
    """

    def __init__(self, method: Method, model: Named, horovod: Callable[[BoundCompression], HorovodProtocol], tuner: Tuner | None = None) -> None:
        self.named, self.frozen = _checked(model)
        modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        self._modules: list[Any] = [m for m in modules if hasattr(m, "running_mean") and hasattr(m, "running_var")]
        self.ids = frozenset(id(p) for _, p in self.named)
        self.attached = Attached()
        self.averages = Averages(self.ids)
        self._aggregator = Aggregator(MethodState(method, self.named))
        """Until a driver brings one, one without state."""
        self._loaded_state: Mapping[str, Any] | None = None
        """What was loaded before a driver has come."""
        self._horovod = horovod(self)
        self._driver: Driver = self._horovod
        self._used = False
        """A driver has brought its aggregator."""
        self.tuner = tuner
        """Of `Compression.auto`, which chooses the method."""
        if tuner is not None:
            follow(self)
        if Role.POINT in method.slot_names and isinstance(model, torch.nn.Module):
            with suppress(Exception):  # a convenience, which scripted modules and some wrappers do not offer
                model.register_state_dict_pre_hook(ShiftWarning(partial(_shift, weakref.ref(self))))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.method}, {len(self.named)} parameters>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """`copy` and `deepcopy` come here, too."""
        raise CompressionError(
            "a bound compression cannot be copied or pickled: it belongs to the parameters of one model. Keep its state_dict(), bind the method anew "
            "to the other model (Compression.….bind(model)), and load_state_dict() there; what is not bound can be copied and pickled."
        )

    @property
    def method(self) -> Method:
        """What is done now; see `switch`."""
        return self._aggregator.state.method

    # -- Horovod's protocol ------------------------------------------------------------------------------------------------------

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Called by Horovod with `p.grad`; returns what Horovod reduces, and a context."""
        return self._horovod.compress(tensor)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Called by Horovod with what it reduced; writes the mean into the gradient and returns it."""
        return self._horovod.decompress(tensor, ctx)

    # -- hyper-parameters --------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> BoundCompression:
        """Read learning rates live from `optimizer` (Horovod's, the one that steps). May be called again. Returns self.

        `scaler`: the GradScaler that scales the loss. Gradients are unscaled when they are compressed, so that all state is in true units whatever
        the scale does, and the mean that the optimizer gets is scaled again. Own optimizers with a method without state attach it by themselves, in
        its first `step`.

        Own optimizers attach by themselves. Without it, methods in gradient units assume a constant learning rate and say so once. Methods that
        apply the update themselves (`detached`, `local_momentum`, `pef`, …) need it: they read lr, momentum and weight decay of the SGD inside
        Horovod's optimizer, move the parameters just before that would, and leave it no gradients (`p.grad` is None after the step). Step hooks of
        Horovod's optimizer, and global ones, then run once in its step, after the exchange; over Gloo its `synchronize` sleeps while it waits.
        Raises `CompressionError` when the optimizer holds none of the bound parameters, when such a method is given another optimizer than
        Horovod's around a plain SGD, and for momentum both in the method and in the optimizer (looked at again in every step).
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise CompressionError(f"attach(): expected the optimizer that hvd.DistributedOptimizer returned, got {optimizer!r:.100}.")
        if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
            raise CompressionError(f"attach(): scaler must be a torch.amp.GradScaler, got {scaler!r:.100}.")
        self.scaler = scaler if scaler is not None else self.scaler
        if self._driver.optimizer is not optimizer:  # else it is attached already
            self.attached.check(optimizer, self.method, self.named)
            self._driver.attach(optimizer)
            self.attached.optimizer = optimizer
        return self

    @property
    def scaler(self) -> Any:
        """The GradScaler that was attached, or None."""
        return self.attached.scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self.attached.scaler = scaler

    # -- state -------------------------------------------------------------------------------------------------------------------

    def adopt(self, aggregator: Aggregator, driver: Driver) -> None:
        """`aggregator`, of `driver`, holds this object's state from now on. State loaded before is handed over."""
        self.check_free()
        aggregator.meter = self._aggregator.meter
        self._aggregator, self._driver, self._used = aggregator, driver, True
        aggregator.agreement.expect_first_step()
        if self.tuner is not None:
            aggregator.agreement.also_agree_on(auto=repr(self.tuner))
        if self._loaded_state is not None:
            state, self._loaded_state = self._loaded_state, None
            aggregator.prepare_load(state)()

    def check_free(self) -> None:
        """Raise `CompressionError` when a driver has brought its aggregator already."""
        if self._used:
            raise CompressionError("this compression object belongs to another optimizer already; bind one for each.")

    def driven_by(self, driver: Driver) -> bool:
        """`driver` is the one that feeds this object its gradients, or would."""
        return self._driver is driver

    def statistics(self) -> list[torch.Tensor]:
        """Running means and variances of the module that was bound."""
        return [t for m in self._modules for t in (m.running_mean, m.running_var) if isinstance(t, torch.Tensor)]

    @property
    def aggregator(self) -> Aggregator:
        """Raises `CompressionError` before an optimizer has brought one."""
        if not self._used:
            raise CompressionError("this compression object has not been used by an optimizer yet.")
        return self._aggregator

    def state_dict(self) -> dict[str, Any]:
        """Copies of all state by parameter name: residuals, server residuals, momentum, step. Differs between ranks: save one per rank.

        Raises `CompressionError` between a backward pass and its `step()`.
        """
        self.check_between_steps("the compression's state was asked for")
        return self._aggregator.state_dict() if self._loaded_state is None else dict(self._loaded_state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over state saved by the same rank of a group of the same size.

        Raises `CompressionError`, with no state changed, when it does not fit; `Compression.auto` goes on with the method that it was saved of.
        """
        if isinstance(state, Mapping):
            self.go_on_as(lambda method: repr(method) == state.get("method"))
        if self._used:
            self.prepare_load(state)()
        else:
            check_head(state, repr(self.method))
            # Rank and size are not known yet, so `adopt` will look at those, and we at the rest.
            Aggregator(MethodState(self.method, self.named, rank=state["rank"], size=max(1, state["size"]))).prepare_load(state)
            self._loaded_state = state

    def prepare_load(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check `state` now; calling the result takes it over and cannot fail. Raises as `load_state_dict`."""
        self.check_between_steps("state was loaded")
        if self._used:
            return self._aggregator.prepare_load(state)
        Aggregator(self.layout()).prepare_load(state)

        def keep() -> None:
            self._loaded_state = state

        return keep

    def layout(self) -> MethodState:
        """The record, or while there is none with state, one of the same layout for the workers that Horovod knows."""
        if self._used:
            return self._aggregator.state
        transport = self._horovod.transport()
        return MethodState(self.method, self.named, rank=transport.rank if transport else 0, size=transport.size if transport else 1)

    @property
    def transport(self) -> Transport:
        """Between the workers that train together: the optimizer's; on an unmodified Horovod, Horovod's."""
        transport = self._aggregator.state.transport if self._used else self._horovod.transport()
        if transport is None:
            raise CompressionError("this compression object has not been used by an optimizer yet; make the DistributedOptimizer first.")
        return transport

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
        if self._loaded_state is not None:
            raise CompressionError("switch(): state was loaded and no optimizer has taken it over yet; make the optimizer first.")
        self._aggregator.switch(new, self.check_together)

    def go_on_as(self, fits: Callable[[Method], bool]) -> None:
        """Where the method is chosen in training: before state is loaded, switch to the candidate that it belongs to, if one does."""
        if self.tuner is not None and fits(self.method):
            self.tuner.went_back()
        elif self.tuner is not None:
            candidate = self.tuner.went_on_as(fits, self.method)
            if candidate is not None and self._used:
                self.switch(candidate)
            elif candidate is not None:
                self._aggregator = Aggregator(MethodState(self.method.switched(candidate.method), self.named))

    @property
    def steps_taken(self) -> int:
        """Steps so far, undone ones too."""
        return self._aggregator.state.step

    def after_step(self) -> None:
        """A step of an optimizer that holds bound parameters has ended."""
        if self.tuner is not None and self._used:
            self.tuner.after_step(self)

    # -- together with the other ranks -------------------------------------------------------------------------------------------

    def check_between_steps(self, what: str) -> None:
        """Raise `CompressionError` when a step is under way, from its first gradient on; `what` says what was tried."""
        self._aggregator.check_between_steps(what, begun=self._driver.begun)

    def check_together(self, what: str) -> None:
        """All ranks call this before they do `what` together outside of a step, also before the first one. Raises as `Driver.meet`, and
        `CompressionError` within a step."""
        self.check_between_steps(f"{what} was called")
        self._driver.meet(what)

    def discard(self) -> None:
        """Throw the step away that was exchanged and not applied, on all ranks, as one with an inf; see `DistributedOptimizer`'s `discard`.

        Collective. On an unmodified Horovod it follows `optimizer.synchronize()`, and a method that leaves the update to the optimizer needs
        `exact=True`. Raises `CompressionError` otherwise.
        """
        self._driver.discard()

    def at(self, point: Point) -> AbstractContextManager[None]:
        """Hold the parameters at a point for evaluation or saving; see `Points.at`."""
        check_point(point)
        if point == "virtual":
            self._horovod.appear()
        if not self._used and self.method.feedback.unit == "gradient":  # one process under Horovod, which does not call us then
            return self._held_at(self._aggregator, point)
        return self._held_at(self.aggregator, point)

    @contextmanager
    def _held_at(self, aggregator: Aggregator, point: Point) -> Iterator[None]:
        self._driver.catch_up()
        with aggregator.at(point, self.check_together):
            yield

    @property
    def replicas(self) -> Literal["equal", "equal_at_x"]:
        """What is equal on all ranks between steps: the parameters, or (DEF, SAEF) only x, which `at("averaged")` shows."""
        return "equal_at_x" if Role.POINT in self.method.slot_names else "equal"

    @property
    def traffic(self) -> Traffic:
        """Bytes of this worker so far."""
        return self._aggregator.state.traffic

    def metrics(self) -> dict[str, Any]:
        """Plain numbers, by name with their units; any time, on one rank or all: nothing is sent, and nothing is computed of the gradients' size.

        `steps` and `undone_steps` so far, those of a state that was loaded included; bytes of this worker since the object was made
        (`total_sent_bytes`, …; docs/telemetry.md explains all names). While a `telemetry.Logger` looks, `last` is its record of the last step that is
        over. What there is nothing of yet, or by this method, is absent.
        """
        return metrics(self._aggregator.state, self._loaded_state, self._aggregator.meter)

    def measure_by(self, meter: Meter | None) -> None:
        """`meter` looks at the steps, from the next one on; None: nobody does any more. Raises `CompressionError` where another one does."""
        if meter is not None:
            check_unmeasured(self._aggregator.meter)
        self._aggregator.meter = meter

    @property
    def undone_steps(self) -> int:
        """Steps that were undone on all ranks because some rank held an inf or NaN, or because the script discarded them."""
        return self._aggregator.state.undone


def _shift(bound: weakref.ref[BoundCompression]) -> tuple[bool, object] | None:
    """As `ShiftWarning` wants it."""
    compression = bound()
    return None if compression is None else (compression._aggregator.points.shifted, compression.method.feedback)


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
