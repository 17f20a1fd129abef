"""What happens behind `compress` and `decompress` on unmodified Horovod.

Horovod calls `compress(p.grad)` once per parameter and step, in an order that differs between ranks, and gives no name; after all of them it
calls `decompress` for each. A summable payload is returned from `compress` and reduced by Horovod itself. Everything else *rides along*: our own
named collectives are started in `compress`, and finished at the first `decompress` of the step, all of them together, since waiting
parameter by parameter would deadlock.

Every payload ends in three elements (c, c², 1) with a small integer c that depends on settings and step. After the reduction, a non-zero variance
of c is seen by every rank; the last element tells what Horovod multiplied by (1 for Average, n for Sum).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .aggregator import Aggregator, Bucket, Reduction, drive
from .errors import CompressionError, DisagreementError, UnboundParameterError
from .transport.horovod import SlotHandle, SlotTransport

__all__ = ["HorovodSlot"]

_TAIL = 3


@dataclass
class _Pending:
    """What travels from `compress` to `decompress` of one parameter."""

    name: str
    gradient: torch.Tensor
    reduction: Reduction | None
    """None while the learning rate is 0."""


class HorovodSlot:
    """The compress/decompress pair over an aggregator with one bucket per parameter.

    `check_skip` is called with a parameter's name when its step is skipped; it raises when the optimizer would move it nevertheless.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        transport: SlotTransport,
        frozen: Iterable[tuple[str, torch.nn.Parameter]],
        check_skip: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.aggregator = aggregator
        self.transport = transport
        self._frozen = list(frozen)
        self._check_skip = check_skip
        self._buckets: dict[str, Bucket] = {bucket.segments.names[0]: bucket for bucket in aggregator.buckets}
        self._by_shape: dict[torch.Size, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, parameter in aggregator.named:
            self._by_shape.setdefault(parameter.shape, []).append((name, parameter))
        self._pending: dict[str, _Pending] = {}
        self._draining = False
        self._in_backward = False
        self._written: dict[str, weakref.ref[torch.Tensor]] = {}
        self._decompressed = 0

    # -- compress ----------------------------------------------------------------------------------------------------------------

    def compress(self, gradient: torch.Tensor) -> tuple[torch.Tensor, _Pending]:
        name = self._name_of(gradient)
        if self._draining:
            raise CompressionError(
                f"parameter '{name}' is compressed before the results of the step before were all taken; call optimizer.step() from one thread only."
            )
        if name in self._pending:
            raise CompressionError(
                f"parameter '{name}' was compressed twice in one step. Give each Horovod optimizer a compression object of its own: "
                "Compression.….bind(model)."
            )
        if not self._pending:
            self._begin_step(name, gradient)
        self._in_backward = self._in_backward or _inside_backward()

        bucket = self._buckets[name]
        in_place = gradient.is_contiguous() and gradient.dtype == bucket.segments.dtype
        reduction = self.aggregator.start(bucket, [gradient], self.transport, gradient.view(-1) if in_place else None)
        pending = self._pending[name] = _Pending(name, gradient, reduction)
        c = self.aggregator.settings_hash()
        handle = None if reduction is None else reduction.pending
        if not isinstance(handle, SlotHandle):
            return torch.tensor([c, c * c, 1.0], device=gradient.device), pending
        payload = handle.payload
        if payload.dtype == torch.float16:
            c = (c - 1) % 4 + 1  # sums of squares stay exact in half precision
        return torch.cat([payload, torch.tensor([c, c * c, 1.0], dtype=payload.dtype, device=payload.device)]), pending

    def _begin_step(self, name: str, gradient: torch.Tensor) -> None:
        self.aggregator.use(self.transport)
        self._in_backward = _inside_backward()
        written = self._written.get(name)
        if not self._in_backward and written is not None and written() is gradient and bool(gradient.any()):
            raise CompressionError(
                f"the gradient of parameter '{name}' was averaged already, and no backward pass has run since. After optimizer.synchronize(), "
                "call optimizer.step() inside `with optimizer.skip_synchronize():`."
            )

    def _name_of(self, gradient: torch.Tensor) -> str:
        candidates = self._by_shape.get(gradient.shape, [])
        for name, parameter in candidates:
            if parameter.grad is gradient:
                return name
            if parameter is gradient:
                raise CompressionError(
                    f"parameter '{name}': Adasum combines parameters non-linearly and cannot carry error feedback; use op=hvd.Average."
                )
        dense_copies = [n for n, p in candidates if p.grad is not None and p.grad.is_sparse and n not in self._pending]
        if len(dense_copies) == 1:
            return dense_copies[0]
        if dense_copies:
            raise UnboundParameterError(
                f"sparse_as_dense: parameters {dense_copies} have the same shape {tuple(gradient.shape)} and cannot be told apart; use "
                "sparse=False in the embeddings."
            )
        for name, parameter in self._frozen:
            if parameter.grad is gradient:
                raise UnboundParameterError(
                    f"parameter '{name}' was frozen when the compression was bound; bind again after unfreezing it (and make a new optimizer)."
                )
        raise UnboundParameterError(
            f"a gradient of shape {tuple(gradient.shape)} belongs to no bound parameter. Bind the model that Horovod's optimizer trains: "
            f"compression = Compression.….bind(model). Bound: {[n for n, _ in candidates] or 'no parameter of this shape'}."
        )

    # -- decompress --------------------------------------------------------------------------------------------------------------

    def decompress(self, reduced: torch.Tensor, pending: _Pending) -> torch.Tensor:
        if self._pending.get(pending.name) is not pending:
            raise CompressionError(f"parameter '{pending.name}': decompress() was called with a context of another step.")
        if not self._draining:
            self._draining = True
            drive(p.reduction for p in self._pending.values() if p.reduction is not None and not isinstance(p.reduction.pending, SlotHandle))
        factor = self._check(reduced, pending.name)
        gradient, reduction = pending.gradient, pending.reduction
        if reduction is None:
            gradient.zero_()
        else:
            handle = reduction.pending
            if isinstance(handle, SlotHandle):
                handle.arrive(reduced[:-_TAIL])
                drive([reduction])
            elif factor != 1.0:
                assert reduction.out is not None
                reduction.out.mul_(factor)
            assert reduction.out is not None
            if reduction.task.skipped:
                self._check_skip(pending.name)
            if reduction.out.data_ptr() != gradient.data_ptr():
                gradient.copy_(reduction.out.view(gradient.shape))
        self._written[pending.name] = weakref.ref(gradient)
        self._decompressed += 1
        if self._decompressed == len(self._pending):
            self._end_step()
        return gradient

    def _end_step(self) -> None:
        reductions = [p.reduction for p in self._pending.values() if p.reduction is not None]
        self._pending = {}
        self._decompressed = 0
        self._draining = False
        self.aggregator.finish_step(reductions, gradients_gone=True)

    def _check(self, reduced: torch.Tensor, name: str) -> float:
        """Raise on every rank when c differed anywhere; return the factor that Horovod applied to a sum of ones, over n."""
        mean, mean_square, factor = reduced[-_TAIL:].tolist()
        variance = mean_square / factor - (mean / factor) ** 2 if factor else float("nan")
        # n ranks, one of which differs by 1: the variance is (n-1)/n². Rounding is below 16²·1e-6, in half precision 4²·1e-3.
        tolerance = max(0.25 / self.transport.size, 0.02 if reduced.dtype == torch.float16 else 0.0)
        if not variance <= tolerance:
            raise DisagreementError(
                f"parameter '{name}': ranks compressed with different settings or at different steps (seen by every rank). "
                "Use the same Compression arguments everywhere, and load the same step's state on every rank."
            )
        return float(factor)


def _inside_backward() -> bool:
    """True in a hook of a running backward pass."""
    return int(torch._C._current_graph_task_id()) != -1
