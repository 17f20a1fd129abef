"""The driver of an unmodified Horovod, which calls `compress` and `decompress` and tells nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..core.aggregator import Aggregator
from ..core.attached import ATTACH, check_plain_sgd
from ..core.bound import BoundCompression
from ..core.state import MethodState
from ..core.step_hooks import claim, hook_inner_step
from ..errors import CompressionError
from ..transport.base import Transport
from .introduction import Introduction
from .slot import HorovodSlot
from .transport import HorovodTransport, SlotTransport, horovod_is_running
from .waiting import let_synchronize_sleep

__all__ = ["HorovodDriver"]


class HorovodDriver:
    """Of `compression`; `process_set`: the one of Horovod's that trains it, None for all. Horovod shows itself at the first gradient (or in `attach`,
    or in what all ranks do together): then the slot is made, with the aggregator, which `compression` adopts."""

    optimizer = None
    """Hyper-parameters are those of the optimizer that is attached."""

    def __init__(self, compression: BoundCompression, process_set: Any = None) -> None:
        if process_set is not None and not callable(getattr(process_set, "size", None)):
            raise CompressionError(
                f"bind(): process_set must be a ProcessSet of Horovod's, the optimizer's, or None for all, got {process_set!r:.100}."
            )
        self._compression = compression
        self._process_set = process_set
        self._introduction = Introduction(compression.named, compression.frozen, process_set)
        self._slot: HorovodSlot | None = None
        if compression.method.feedback.takes.momentum:
            claim(self)

    @property
    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._compression.named

    @property
    def ids(self) -> frozenset[int]:
        return self._compression.ids

    def transport(self) -> Transport | None:
        return HorovodTransport(self._process_set) if horovod_is_running() else None

    @property
    def exchanging(self) -> bool:
        """See `Claimant`. Horovod's own step synchronizes before it evaluates a closure, and refuses the backward pass in it."""
        return False

    @property
    def begun(self) -> bool:
        return self._slot is not None and self._slot.accumulates

    # -- Horovod's protocol ------------------------------------------------------------------------------------------------------

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self.slot().compress(tensor)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return self.slot().decompress(tensor, ctx)

    def slot(self) -> HorovodSlot:
        """What is behind `compress` and `decompress`, made when it is needed first. Raises `CompressionError` when the compression object is another
        optimizer's."""
        if self._slot is None:
            compression = self._compression
            compression.check_free()
            self._check_clip()
            transport = SlotTransport(self._process_set)
            state = MethodState(
                compression.method,
                compression.named,
                rank=transport.rank,
                size=transport.size,
                settings=lambda bucket: compression.attached.settings(compression.method, bucket),
                transport=transport.direct,
            )
            aggregator = Aggregator(state, statistics=compression.statistics, averages=compression.averages)
            compression.adopt(aggregator, self)
            self._slot = HorovodSlot(aggregator, transport, compression.frozen, self._check_skip, self._introduction)
            claim(self)
        return self._slot

    def _check_clip(self) -> None:
        method = self._compression.method
        if method.clip_norm is not None:
            raise CompressionError(
                f"clip_norm={method.clip_norm} is not to be had on an unmodified Horovod: it compresses parameter by parameter, while the "
                "norm of the whole gradient is not known. Use clip_value=…, or `import mpi_backend as hvd`; a method in gradient units may clip the "
                "mean between synchronize() and step()."
            )

    def _check_skip(self, name: str) -> None:
        """In a skipped step x must not move; an unmodified Horovod steps its optimizer all the same."""
        optimizer = self._compression.attached.optimizer
        plain = optimizer is not None and not any(
            group.get(option, 0) for group in optimizer.param_groups for option in ("momentum", "weight_decay", "betas")
        )
        if not plain:
            raise CompressionError(
                f"parameter '{name}': this step is skipped, and the optimizer's own momentum and weight decay would move it nevertheless. Call "
                "compression.attach(optimizer) with momentum=0 and weight_decay=0 in the optimizer; dist_ef_sgd and comp_skip take them instead."
            )

    # -- the optimizer's step ----------------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        method = self._compression.method
        on_horovod = getattr(optimizer, "_compression", None) is self._compression
        if method.feedback.takes.update:  # in a hook before the step of Horovod's optimizer, in place of what SGD would do
            if not on_horovod:
                raise CompressionError(
                    f"attach(): {method.feedback} applies the update itself, and the optimizer given (a {type(optimizer).__name__}) is not the one "
                    "that horovod.torch.DistributedOptimizer(…, compression=this object) returned. Pass that one; without Horovod use "
                    "hvd_ecsgd.DistributedOptimizer(optimizer, compression=…) or `import mpi_backend as hvd`."
                )
            check_plain_sgd(method, getattr(type(optimizer).__base__, "step", None), type(optimizer).__name__)
        if on_horovod:
            hook_inner_step(optimizer)
            let_synchronize_sleep(optimizer)
        transport = self.transport() if on_horovod else None
        if transport is not None:
            self._check_clip()
        if method.feedback.takes.update:
            self.slot()  # now, so that state that is loaded shifts the parameters before the next forward pass
        elif transport is not None and transport.size == 1:
            warnings.warn(
                f"{method.compressor}: Horovod does not compress with one process, so this trains without it. "
                "hvd_ecsgd.DistributedOptimizer, and mpi_backend's, compress with one process too.",
                UserWarning,
                stacklevel=3,
            )

    def before_step(self) -> None:
        """Before a step of an optimizer that is not ours: apply the update where the method does that itself, and raise when it cannot."""
        attached = self._compression.attached
        if self._slot is not None:
            self._slot.before_step(scaled=attached.scaler is not None and attached.loss_scale != 1.0)
        elif self._compression.driven_by(self) and self._compression.method.feedback.takes.momentum:
            raise CompressionError(self._refusal())

    def _refusal(self) -> str:
        feedback, name = self._compression.method.feedback, self.named[0][0]
        if feedback.takes.update:
            return (
                f"{feedback} applies momentum, weight decay and the update itself, and has not seen a gradient of parameter "
                f"'{name}': {ATTACH} Without Horovod, use hvd_ecsgd.DistributedOptimizer or `import mpi_backend as hvd`."
            )
        return (
            f"{feedback} keeps momentum and weight decay itself, but has not been given a single gradient of parameter "
            f"'{name}': Horovod does not compress with one process, and the step would be plain SGD without momentum. "
            "Use hvd_ecsgd.DistributedOptimizer, or no compression with one process."
        )

    # -- together with the other ranks -------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Gradients are accumulated where Horovod hands them over."""

    def appear(self) -> None:
        if self._compression.driven_by(self) and self._slot is None:
            transport = self.transport()
            if transport is not None and transport.size > 1:
                self.slot()

    def meet(self, what: str) -> None:
        self.appear()
        if self._slot is not None:
            self._slot.meet(what)

    def discard(self) -> None:
        if self._slot is not None:
            self._slot.discard()
        else:
            for _, parameter in self.named:  # one process under Horovod: nothing was kept
                parameter.grad = None
