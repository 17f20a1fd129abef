"""The exchange without an optimizer, for training loops of one's own: gradients in, means out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .compression import AnyCompression, Compression, bind
from .core.aggregator import Aggregator
from .core.agreement import in_common_order
from .core.attached import refuse_other
from .core.bound import Named
from .core.bucket import Bucket
from .core.gradients import clip_factor, take_
from .core.state import MethodState
from .errors import CompressionError
from .optimizer.distributed import BUCKET_BYTES
from .optimizer.executor import Executor, Inline
from .optimizer.step import Outcome, StepExchange
from .protocols import GroupSettings
from .transport import Transport
from .transport.base import check_transport, workers_of
from .transport.self_ import alone

__all__ = ["GradientExchange"]


class GradientExchange:
    """Exchanges gradients that a loop of one's own has computed; no optimizer and no hooks. Making one is collective.

        exchange = GradientExchange(model.named_parameters(), Compression.top_k(100), transport)
        means = exchange.reduce(gradients)              # {name: mean over workers}, for the loop to apply

    `transport`: to the other workers, after the backend's `init()`: `mpi_backend.transport.MPITransport()`, or
    `hvd_ecsgd.transport.torch_dist.TorchTransport()`. Without it this process is alone, and nothing is exchanged.
    `compression`: any preset, bound or not. Methods that apply the update themselves (`detached`, `local_momentum`, `pef`, …) need `lr=…`, take
    `momentum=…`, `weight_decay=…` and `nesterov=…` as `torch.optim.SGD` does, and move the parameters within `reduce`. Methods in gradient units take
    `lr=…` too, if it changes. `param_groups[0]` holds these options and is read live. `executor`: as for `DistributedOptimizer`.

    `compression` (the attribute) is the bound method, with `state_dict`, `at`, `switch` and `traffic`; `save_checkpoint` and `load_checkpoint` take
    the exchange in the optimizer's place.
    Raises `CompressionError` as `bind` does, for what is no transport, and when a method that needs a learning rate is given none.
    """

    optimizer = None
    """There is none; see `Driver`."""

    def __init__(
        self,
        named_parameters: Named,
        compression: AnyCompression = Compression.none,
        transport: Transport | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        executor: Executor | None = None,
        **options: Any,
    ) -> None:
        transport = alone("GradientExchange()") if transport is None else transport
        check_transport(transport, "GradientExchange()")
        self.compression = bind(compression, named_parameters)
        feedback = self.compression.method.feedback
        if wrong := sorted(set(options) - {"lr", "momentum", "weight_decay", "nesterov"}):
            raise CompressionError(
                f"GradientExchange(): {wrong[0]}={options[wrong[0]]!r} is no option; there are lr, momentum, weight_decay and nesterov."
            )
        group = {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0, "nesterov": False, **options} if feedback.takes.momentum else options
        feedback.check_group(group, "GradientExchange()")
        self.param_groups: list[dict[str, Any]] = [{**group, "params": [p for _, p in self.compression.named]}]
        executor = Inline() if executor is None else executor
        state = MethodState(
            self.compression.method,
            in_common_order(self.compression.named, transport),
            rank=workers_of(transport).rank,
            size=workers_of(transport).size,
            process=transport.rank,
            bucket_bytes=bucket_bytes,
            settings=self._settings,
            transport=transport,
        )
        also = {"optimizer": type(self).__name__, "exchange in a thread": executor.concurrent}
        aggregator = Aggregator(state, also=also, statistics=self.compression.statistics, averages=self.compression.averages)
        self.compression.adopt(aggregator, self)
        self._step = StepExchange(aggregator, transport, executor, None, bytes)

    @property
    def outcome(self) -> Outcome:
        """What came of the last `reduce`, the same on all ranks."""
        return self._step.outcome

    @property
    def begun(self) -> bool:
        """A step is under way; see `Driver`."""
        return self._step.begun

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Driver`; options are those of this object."""
        refuse_other(self.compression.method, optimizer)

    def catch_up(self) -> None:
        """`reduce` returns when all is done."""

    def meet(self, what: str) -> None:
        """See `Driver`."""
        self._step.meeting.before(what)

    def discard(self) -> None:
        """`reduce` leaves no step open, so there is nothing to throw away."""

    def _settings(self, bucket: Bucket) -> GroupSettings:
        group, feedback = self.param_groups[0], self.compression.method.feedback
        feedback.check_group(group, "GradientExchange()")
        needs = feedback.takes.learning_rate
        return GroupSettings.of(group, self.compression.attached.loss_scale, "param group 0 of GradientExchange", needs)

    @torch.no_grad()
    def reduce(self, gradients: Mapping[str, torch.Tensor | None] | Iterable[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """One step: exchange this worker's `gradients`, by name or in the order bound, of the parameters' shapes. Collective.

        None, and a name that is missing, stand for zeros. Returns the mean over workers by name, in the parameter's shape and dtype; zeros where the
        method keeps state and the learning rate is 0, since nothing is sent then. There is nothing to apply, and {} is returned, when the method has
        applied the update itself, when the step was undone on all ranks because some held an inf or NaN (`Outcome.UNDONE`, with a warning), and when
        all stayed silent (`Outcome.SILENT`); a parameter for which nothing came is left out. Raises `CompressionError` for an unknown name and
        another shape, and whatever an optimizer's step raises.
        """
        step, state = self._step, self._step.aggregator.state
        given = dict(gradients) if isinstance(gradients, Mapping) else self._by_place(gradients)
        if unknown := [name for name in given if name not in dict(state.named)]:
            raise CompressionError(f"reduce(): '{unknown[0]}' is no bound parameter; bound are {', '.join(n for n, _ in state.named[:5])}, ….")
        for name, p in state.named:  # before anything of the step has begun
            if (g := given.get(name)) is not None and g.shape != p.shape:
                raise CompressionError(f"reduce(): the gradient of parameter '{name}' has shape {tuple(g.shape)}, expected {tuple(p.shape)}.")
        step.begin()
        factor, clips = clip_factor(state, [g for g in given.values() if g is not None]), self.compression.method.clips
        while (bucket := step.next_bucket) is not None:
            parts = [given.get(name) for name in bucket.segments.names]
            taken = [torch.zeros_like(p) if g is None else g.clone() if clips else g.detach() for g, p in zip(parts, bucket.parameters, strict=True)]
            step.submit(take_(state, bucket, taken, factor))
        step.drain()
        outcome, means = step.complete(), {}
        if outcome is not Outcome.UNDONE and self.compression.method.feedback.takes.update:
            step.aggregator.apply_updates(step.reductions)
        elif outcome is Outcome.STANDS:
            for bucket, reduction in zip(state.buckets, step.results, strict=True):
                if reduction is None:  # learning rate 0
                    means.update({name: torch.zeros_like(p) for name, p in zip(bucket.segments.names, bucket.parameters, strict=True)})
                elif reduction.out is not None and not reduction.task.skipped:
                    handed = reduction.hand_out()
                    means.update({n: m.to(p.dtype) for n, p, m in zip(bucket.segments.names, bucket.parameters, handed, strict=True)})
        step.forget()
        self.compression.after_step()
        return means

    def _by_place(self, gradients: Iterable[torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        named, given = self.compression.named, list(gradients)
        if len(given) != len(named):
            raise CompressionError(f"reduce(): expected {len(named)} gradients, one for each bound parameter in that order, got {len(given)}.")
        return {name: g for (name, _), g in zip(named, given, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The options, for checkpoints, in the form of an optimizer's; residuals and the like are `compression.state_dict()`."""
        return {"state": {}, "param_groups": [{**group, "params": list(range(len(group["params"])))} for group in self.param_groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the options that `state_dict` returned."""
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({option: value for option, value in saved.items() if option != "params"})
