"""What happens behind `compress` and `decompress` on unmodified Horovod.

Horovod calls `compress(p.grad)` once per parameter and step, in an order that differs between ranks, and gives no name; after all of them it
calls `decompress` for each. A summable payload is returned from `compress` and reduced by Horovod itself. Everything else *rides along*: our own
named collectives are started in `compress`, and finished at the first `decompress` of the step, all of them together, since waiting
parameter by parameter would deadlock.

Every payload ends in four bits of a hash of settings and step, as zeros and ones, and a one. After the reduction a bit that is neither 0 nor that of
the one differed somewhere, which every rank sees; the one tells what Horovod multiplied by (1 for Average, n for Sum).

Rules that apply the update themselves (worker momentum, DEF) do so in `before_step`, which the caller arranges to run before the inner optimizer's
step: x is moved by exactly the code that our own optimizer runs, and the inner optimizer is left without gradients, so it applies nothing.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..aggregator import Aggregator
from ..bucket import Bucket, BucketStep, drive
from ..errors import CompressionError, DisagreementError, SequenceError, UnboundParameterError
from ..guard import Guard, Noted
from ..talk import STEP, raise_if_apart, raise_if_joined
from ..transport import SelfTransport
from .introduction import Introduction
from .opening import Opening, await_others
from .transport import SlotHandle, SlotTransport

__all__ = ["HorovodSlot"]

_BITS = 4
_TAIL = _BITS + 1
_PATIENCE = 5.0
"""Seconds that the end of a backward pass waits for the other ranks to begin the step, while another slot is in none."""

_slots: weakref.WeakSet[HorovodSlot] = weakref.WeakSet()
"""Of this process. They tell when it is safe to wait, and nothing that is sent depends on them."""


@dataclass
class _Pending:
    """What travels from `compress` to `decompress` of one parameter."""

    name: str
    gradient: torch.Tensor
    reduction: BucketStep | None
    """None while the learning rate is 0."""
    noted: Noted | None = None
    """The gradient as it was when it was compressed."""


class HorovodSlot:
    """The compress/decompress pair over an aggregator with one bucket per parameter.

    `check_skip` is called with a parameter's name when its step is skipped; it raises when the optimizer would move it nevertheless.
    `introduction`: how the other ranks' counterparts are found, before the first step.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        transport: SlotTransport,
        frozen: Iterable[tuple[str, torch.nn.Parameter]],
        check_skip: Callable[[str], None] = lambda name: None,
        introduction: Introduction | None = None,
    ) -> None:
        self.aggregator = aggregator
        self.transport = transport
        self._introduction = introduction
        self._frozen = list(frozen)
        self._check_skip = check_skip
        self._buckets: dict[str, Bucket] = {bucket.segments.names[0]: bucket for bucket in aggregator.buckets}
        self._by_shape: dict[torch.Size, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, parameter in aggregator.named:
            self._by_shape.setdefault(parameter.shape, []).append((name, parameter))
        self._pending: dict[str, _Pending] = {}
        self._draining = False
        self._written: dict[str, weakref.ref[torch.Tensor]] = {}
        self._decompressed = 0
        self._accumulated = False
        self._undone = False
        self._applies = aggregator.method.feedback.takes.update
        self._guard = Guard(aggregator.method.feedback)
        self._ready: list[_Pending] | None = None
        """Of a rule that applies the update itself: what was exchanged and waits for the optimizer's step."""
        self._opening: Opening | None = None
        self._patient = True
        aggregator.outside = self.meet
        _slots.add(self)
        this = weakref.ref(self)

        def accumulated(parameter: torch.Tensor) -> None:
            slot = this()
            if slot is not None:
                slot._accumulated = True

        for _, parameter in aggregator.named:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]

    @property
    def accumulates(self) -> bool:
        """A backward pass has left gradients that Horovod has not taken yet (backward_passes_per_step)."""
        return self._accumulated

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

        bucket = self._buckets[name]
        in_place = gradient.is_contiguous() and gradient.dtype == bucket.segments.dtype
        # An update is applied later, and is not what belongs in the gradient.
        out = gradient.view(-1) if in_place and not self._applies else None
        taken = self.aggregator.take_(bucket, [gradient])
        noted = self._guard.note([(name, bucket.parameters[0])]) if bucket.parameters[0].grad is gradient else None  # else a copy of Horovod's
        reduction = self.aggregator.start(bucket, taken, self.transport, out)
        pending = self._pending[name] = _Pending(name, gradient, reduction, noted)
        c = self.aggregator.settings_hash(bucket)
        # Who cannot take the step says so, and is heard by every rank.
        tail = [float("nan") if self.aggregator.refuses else float(c >> i & 1) for i in range(_BITS)] + [1.0]
        handle = None if reduction is None else reduction.pending
        if not isinstance(handle, SlotHandle):
            return torch.tensor(tail, dtype=torch.float32, device=gradient.device), pending
        payload = handle.payload
        return torch.cat([payload, torch.tensor(tail, dtype=payload.dtype, device=payload.device)]), pending

    def _begin_step(self, name: str, gradient: torch.Tensor) -> None:
        self._raise_refusal()  # a GradScaler has left the optimizer's step out, where it would have been raised
        together = self._introduce(STEP) if self._introduction is not None else self._begun_all
        self.aggregator.note_frozen()
        self._open(together)
        written = self._written.get(name)
        if self._ready is not None and not self._undone:
            raise SequenceError(
                f"the update that was exchanged for parameter '{name}' was never applied, and nothing is exchanged a second time: call "
                "optimizer.step() (inside `with optimizer.skip_synchronize():` after synchronize()) before the next backward pass, or throw the step "
                "away by compression.discard(), on every rank."
            )
        computed = _inside_backward() or self._accumulated
        if not self._applies and self.aggregator.step_is_open:
            if self.aggregator.settings(self._buckets[name]).loss_scale == 1.0:
                raise SequenceError(
                    f"the gradient of parameter '{name}' was averaged already, and {'a backward pass' if computed else 'another exchange'} began "
                    "before step(): what the method keeps of it would come back in later steps. After optimizer.synchronize(), call optimizer.step() "
                    "inside `with optimizer.skip_synchronize():`, or throw the step away by compression.discard(), on every rank."
                )
            self.aggregator.keep_step()  # its GradScaler has skipped it
        self._undone = False
        self._guard.forget()  # a GradScaler does not call step() after an overflow
        if not computed and written is not None and written() is gradient and bool(gradient.any()):
            raise CompressionError(
                f"the gradient of parameter '{name}' was averaged already, and no backward pass has run since. After optimizer.synchronize(), "
                "call optimizer.step() inside `with optimizer.skip_synchronize():`. (Writing gradients by hand? Call zero_grad() first.)"
            )

    # -- together with the other ranks -------------------------------------------------------------------------------------------

    def meet(self, what: str) -> None:
        """All ranks call this before they do `what` together outside of a step. See `Aggregator.check_together`."""
        if self.transport.size == 1:
            return
        if self._introduction is not None:
            self._introduce(what)
        opening = Opening(self.transport.direct, what)
        await_others(opening.said, what, self.transport.rank)
        doing = opening.doing()
        raise_if_apart(doing)
        raise_if_joined(what, doing)

    def _introduce(self, doing: str) -> bool:
        """Find the other ranks; returns whether all have come with this method."""
        assert self._introduction is not None
        prefix, together = self._introduction.meet(self.transport.direct, doing)
        self.transport.rename(prefix)
        self._introduction = None
        return together

    @property
    def _begun_all(self) -> bool:
        """Steps of all slots of this process have begun, or are beginning, so that no rank waits for this one to begin one."""
        return all(slot is self or slot._pending for slot in list(_slots))

    def _open(self, together: bool) -> None:
        """Tell the other ranks that a step begins here, and find out whether one does there, before Horovod waits for what they would never send.

        That is as late as possible: at the end of the backward pass, or in `step()` before Horovod's. `together`: as in `Aggregator.use`.
        """
        direct = self.transport.direct
        self._check_same()  # of a step that an error has ended
        if self.transport.size > 1:
            self._opening = Opening(direct, STEP)
        self.aggregator.use(direct, together=together, check_same=self._check_same)
        if self._opening is None:
            return
        if _inside_backward():
            torch.autograd.Variable._execution_engine.queue_callback(self._check_same_if_safe)
        else:
            self._check_same_if_safe()

    def _check_same_if_safe(self) -> None:
        """`_check_same`, unless other ranks may be waiting for this one to begin a step of another slot: then it is looked for until patience ends,
        once, as models that each rank uses in turn would take that long in every step."""
        if not self._begun_all:
            give_up = time.monotonic() + (_PATIENCE if self._patient else 0.0)
            while self._opening is not None and not self._opening.said.done():
                if time.monotonic() > give_up:
                    self._patient = False
                    return
                time.sleep(0.001)
        self._check_same()

    def _check_same(self) -> None:
        """Raise `DisagreementError`, on every rank, where some do something else than a step. Waits for the other ranks to begin."""
        opening, self._opening = self._opening, None
        if opening is not None:
            raise_if_apart(opening.doing())

    # -- names -------------------------------------------------------------------------------------------------------------------

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

    def decompress(self, reduced: torch.Tensor, pending: _Pending | None) -> torch.Tensor:
        if pending is None:  # what Horovod gathered without calling compress()
            raise CompressionError(
                f"Horovod gathered a sparse gradient of shape {tuple(reduced.shape)} without compressing it; pass sparse_as_dense=True to "
                "hvd.DistributedOptimizer, or use sparse=False in the embedding."
            )
        if self._pending.get(pending.name) is not pending:
            raise CompressionError(f"parameter '{pending.name}': decompress() was called with a context of another step.")
        if not self._draining:
            self._check_same()
            self._guard.check_in_flight()
            self._draining = True
            self.aggregator.settle()
            drive(p.reduction for p in self._pending.values() if p.reduction is not None and not isinstance(p.reduction.pending, SlotHandle))
        factor = self._check(reduced, pending.name)
        gradient, reduction = pending.gradient, pending.reduction
        if abs(factor - 1.0) > 1e-5 and self.aggregator.method.feedback.takes.learning_rate:
            raise CompressionError(
                f"parameter '{pending.name}': {self.aggregator.method.feedback} averages updates; summing gradients (op=hvd.Sum) is not defined "
                "for it. Use op=hvd.Average."
            )
        if reduction is None:
            if not self._applies:
                gradient.zero_()
        else:
            handle = reduction.pending
            if isinstance(handle, SlotHandle):
                handle.arrive(reduced[:-_TAIL])
                drive([reduction])
            elif factor != 1.0:
                assert reduction.out is not None
                reduction.out.mul_(factor)
            if not self._applies:
                self._write(reduction, pending)
        if pending.noted is not None:
            pending.noted.versions = [gradient._version + 1]  # Horovod puts what we return into it: p.grad.set_(p.grad)
        self._written[pending.name] = weakref.ref(gradient)
        self._decompressed += 1
        if self._decompressed == len(self._pending):
            self._end_step()
        return gradient

    def _write(self, reduction: BucketStep, pending: _Pending) -> None:
        """The mean becomes the gradient."""
        assert reduction.out is not None
        gradient = pending.gradient
        if reduction.task.skipped:
            self._check_skip(pending.name)
        if reduction.out.data_ptr() != gradient.data_ptr():
            gradient.copy_(reduction.out.view(gradient.shape))
        if not reduction.bucket.parameters[0].requires_grad:
            gradient.zero_()  # frozen since: what is left of it in the residual must not move it

    def _end_step(self) -> None:
        exchanged = list(self._pending.values())
        reductions = [p.reduction for p in exchanged if p.reduction is not None]
        self._pending = {}
        self._decompressed = 0
        self._draining = False
        self._accumulated = False
        self._undone = not self.aggregator.finish_step(reductions, gradients_gone=not self._applies, transport=self.transport.direct)
        if not self._applies:
            self._guard.forget()
        else:
            self._ready = exchanged
            if self._undone:
                for pending in exchanged:
                    pending.gradient.fill_(float("nan"))  # what a GradScaler on any rank must see

    # -- the step ----------------------------------------------------------------------------------------------------------------

    def before_step(self, scaled: bool) -> None:
        """Before a step of the inner optimizer. Horovod's own step comes through here too, before it has synchronised; then nothing is ready.

        `scaled`: a GradScaler may have unscaled the gradients since they were exchanged.
        """
        self._check_same()  # Horovod's step would wait; it waits for no rank that this does not wait for
        if scaled and self._pending:
            self._guard.check_in_flight()
            raise CompressionError(
                "optimizer.step() with a GradScaler attached needs optimizer.synchronize() and scaler.unscale_(optimizer) before it: "
                "the mean would be applied with the loss scale in it. Then scaler.step(optimizer) inside `with optimizer.skip_synchronize():`."
            )
        if not self._applies:
            self._raise_refusal()
            if not self._pending:
                self.aggregator.keep_step()
            self._drop_what_stands_still()
            return
        if self._ready is None and self.transport.size == 1:
            self._exchange_alone()
        self._raise_refusal()
        if self._ready is None:
            return
        ready, self._ready = self._ready, None
        if not self._undone:
            # A GradScaler's unscale_ may have come in between.
            self._guard.check_exchanged([1.0, 1 / self.aggregator.settings(self.aggregator.buckets[0]).loss_scale] if scaled else [1.0])
            self.aggregator.apply_updates([p.reduction for p in ready if p.reduction is not None])
        self._undone = False
        self._let_go()

    def discard(self) -> None:
        """Undo the step that was exchanged and not applied. Raises `CompressionError` while it is being exchanged."""
        if self._pending or self._accumulated:
            raise CompressionError("discard(): gradients are on their way; call optimizer.synchronize() first, on every rank.")
        self.aggregator.discard_step()
        self._ready, self._undone = None, False
        self._let_go()

    def _let_go(self) -> None:
        """Nothing is left of the step's gradients."""
        self._guard.forget()
        for _, parameter in self.aggregator.named:
            parameter.grad = None

    def _raise_refusal(self) -> None:
        """Where Horovod's own bookkeeping of the step is over, so that training can go on."""
        if refusal := self.aggregator.take_refusal():
            self._ready, self._undone = None, False  # there is nothing to apply
            raise CompressionError(refusal)

    def _exchange_alone(self) -> None:
        """With one process Horovod never calls compress."""
        if all(p.grad is None for _, p in self.aggregator.named):
            return  # the optimizer's step inside Horovod's: done already
        alone = SelfTransport()
        self.aggregator.use(alone)
        self._ready, self._accumulated = [], False
        reductions = []
        for name, bucket in self._buckets.items():
            gradient = bucket.parameters[0].grad
            if gradient is None:
                gradient = torch.zeros_like(bucket.parameters[0])
            taken = self.aggregator.take_(bucket, [gradient.to_dense() if gradient.is_sparse else gradient])
            reduction = self.aggregator.start(bucket, taken, alone)
            self._ready.append(_Pending(name, gradient, reduction))
            if reduction is not None:
                reductions.append(reduction)
        drive(reductions)
        self._undone = not self.aggregator.finish_step(reductions)

    def _drop_what_stands_still(self) -> None:
        """Take away the gradients of an undone step, and of parameters frozen since, so that the optimizer's momentum does not move them either."""
        undone, self._undone = self._undone, False
        for name, parameter in self.aggregator.named:
            if not undone and parameter.requires_grad:
                continue
            written = self._written.get(name)
            if parameter.grad is not None and written is not None and written() is parameter.grad:
                parameter.grad = None

    def _check(self, reduced: torch.Tensor, name: str) -> float:
        """Raise on every rank when a bit differed anywhere; return the factor that Horovod applied to a sum of ones, over n."""
        *bits, factor = reduced[-_TAIL:].tolist()
        if all(math.isnan(bit) for bit in bits):
            self.aggregator.hear_refusal()
            return float(factor)
        # n ranks, one of which differs: a bit's share is 1/n or 1 - 1/n. Sums of zeros and ones are exact, also in half precision.
        if not factor or not all(min(abs(bit / factor), abs(bit / factor - 1)) <= 0.4 / self.transport.size for bit in bits):
            raise DisagreementError(
                f"parameter '{name}': ranks compressed with different settings or at different steps, or froze it on some ranks only (seen by every "
                "rank). Use the same Compression arguments everywhere, load the same step's state, and freeze the same parameters on every rank."
            )
        return float(factor)


def _inside_backward() -> bool:
    """True in a hook of a running backward pass."""
    return int(torch._C._current_graph_task_id()) != -1
