"""The hook of torch's DistributedDataParallel: every method on torch.distributed, in place of DDP's own all-reduce.

model = DistributedDataParallel(model)
hook = hvd_ecsgd.ddp.register(model, Compression.double_squeeze())
hook.compression.attach(optimizer)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from .compression import AnyCompression, bind
from .core.attached import check_plain_sgd, groups_of
from .core.bound import BoundCompression
from .core.bucket import Bucket
from .core.gradients import clip_factor, scale_of, take_
from .core.guard import Guard
from .core.state import Layout
from .core.step_hooks import claim
from .errors import CompressionError, SequenceError
from .optimizer.background import Background
from .optimizer.distributed import BUCKET_BYTES
from .optimizer.step import Phase
from .optimizer.torch_hook import TorchHook, mean_of
from .protocols import Lent
from .transport.torch_dist import TorchTransport, takes_gpus

__all__ = ["DDPHook", "hook", "register"]


def register(model: DistributedDataParallel, compression: AnyCompression) -> DDPHook:
    """Exchange the gradients of `model` by `compression`, bound or not, from now on. Returns the hook, whose `compression` is the bound method.

    The same as `model.register_comm_hook(DDPHook(model, compression), hook)`. Collective: every process of the model's group calls it.
    Raises `CompressionError` as `DDPHook` does.
    """
    state = DDPHook(model, compression)
    model.register_comm_hook(state, hook)
    return state


def hook(state: DDPHook, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP calls with each of its buckets."""
    return state.take(bucket)


# DDP compares the annotations with these objects.
hook.__annotations__.update(bucket=GradBucket, **{"return": torch.futures.Future[torch.Tensor]})


@dataclass
class _Waiting:
    """A bucket of DDP's that waits for what comes of its gradients."""

    buffer: torch.Tensor
    future: torch.futures.Future[torch.Tensor]
    others: int
    """How many of its gradients are in no bucket that its memory was lent to."""
    missing: int
    """Of how many the mean is not there, as far as is known before the step's end."""

    def arrived(self, means: int) -> None:
        """So many of the means are there."""
        self.missing -= means
        if self.missing == 0:
            self.fulfil()

    def fulfil(self) -> None:
        """Let DDP go on with what is there."""
        if not self.future.done():
            self.future.set_result(self.buffer)


def _in_backward() -> bool:
    """Autograd calls, and not DDP for a worker that has joined."""
    return int(torch._C._current_graph_task_id()) != -1


def _after_backward(work: Callable[[], object]) -> None:
    """Run `work` at the end of the backward pass that calls this, after DDP has put its buffers into `p.grad`: DDP queues that after its last hook,
    and what is queued then comes behind it."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(partial(engine.queue_callback, work))


class DDPHook(TorchHook):
    """Feeds the gradients of `model` to the exchange, bucket by bucket while the backward pass goes on, and gives DDP the means. Collective.

    State is kept by parameter name, so it does not matter that DDP forms its buckets anew after the first step. After `backward()` the mean over
    workers is in `p.grad`, and may be clipped there. Methods that apply the update themselves (`detached`, `local_momentum`, `pef`, …) leave this
    worker's own gradient there instead, and move the parameters when the attached `torch.optim.SGD` steps. A step in which some worker held an inf or
    NaN is undone on all of them: `p.grad` is NaN then, as a GradScaler expects, and None once the optimizer steps, so that it moves nothing.
    Where a step is skipped, and nothing came, it is zero, and None likewise. Each param group of the optimizer that is attached when the first step
    begins is exchanged by its own settings; what is attached, or moved between groups, later must not part what travels together by then.

    Raises `CompressionError` where `model` is no DistributedDataParallel, has a hook already, or trains other parameters than are bound.
    """

    def __init__(self, model: DistributedDataParallel, compression: AnyCompression) -> None:
        if not isinstance(model, DistributedDataParallel):
            raise CompressionError(
                f"register(): expected a DistributedDataParallel, got a {type(model).__name__}. Wrap the model first: DistributedDataParallel(model)."
            )
        if getattr(model, "_comm_hooks", None):
            raise CompressionError(
                "register(): this model has a communication hook already, and DDP takes one only. Another method can take its place by "
                "hook.compression.switch(…)."
            )
        ignored = getattr(model, "parameters_to_ignore", ())
        trained = [(n, p) for n, p in model.module.named_parameters() if p.requires_grad and n not in ignored]
        bound = bind(compression, trained if ignored else model.module)
        _check_all_bound(bound, trained)
        _check_devices(trained, model.process_group)
        transport = TorchTransport.lent(model.process_group)
        background = Background("DDP's hook")
        weakref.finalize(self, background.close)  # at the end of the process before the transport, which it uses, is closed
        super().__init__(
            bound,
            transport,
            background,
            lambda bucket: bound.attached.settings(bound.method, bucket),
            "DistributedDataParallel's hook",
        )
        self._model = weakref.ref(model)  # which holds this object where the garbage collector does not see it
        self._apart: bool | None = None
        """Means have memory of their own, which is given to `p.grad`, and DDP writes nothing there; None before the first bucket has come."""
        self._gradients: dict[int, torch.Tensor] = {}
        """Of the step that accumulates, by parameter."""
        self._waiting: list[_Waiting] = []
        self._layout: list[list[torch.nn.Parameter]] = []
        """What DDP's buckets hold in this step, as far as they have come."""
        self._first_layout: list[list[int]] | None = None
        """What they held in the first one, before DDP formed them by what it saw, by id: in no order that a later process would have."""
        self._guard = Guard(self.compression.method.feedback)
        claim(self)

    # -- Driver ------------------------------------------------------------------------------------------------------------------

    @property
    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self.compression.named

    @property
    def ids(self) -> frozenset[int]:
        return self.compression.ids

    @property
    def _applies(self) -> bool:
        return self.compression.method.feedback.takes.update

    @property
    def _delivers(self) -> bool:
        """Means are decoded into memory that is lent."""
        return not self._applies and getattr(self.compression.method.exchange, "delivers", False)

    def _waits(self) -> bool:
        return bool(self._gradients)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Driver`."""
        if self._applies:
            check_plain_sgd(self.compression.method, type(optimizer).step, type(optimizer).__name__)
        self._step.aggregator.check_groups(groups_of(optimizer))

    # -- DDP's backward pass -----------------------------------------------------------------------------------------------------

    def take(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Take a bucket of DDP's; the future becomes its buffer, with the means in it where DDP is to copy them to `p.grad`."""
        if bucket.buffer().is_sparse:
            name = next(n for n, p in self.named if p is bucket.parameters()[0])
            raise CompressionError(
                f"the gradient of parameter '{name}' is sparse, and DDP's hook takes dense ones: use sparse=False in the embedding, or an optimizer "
                "of mpi_backend or torch_backend, which sends sparse gradients as dense ones."
            )
        if bucket.index() == 0:
            self._begin()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self._gradients[id(parameter)] = gradient
        self._layout.append([p for p in bucket.parameters() if isinstance(p, torch.nn.Parameter)])
        buffer = bucket.buffer()
        # Of a GPU the future knows, so that whoever waits for it waits for what writes the buffer.
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        if self._apart:
            future.set_result(buffer)
        else:
            self._waiting.append(_Waiting(buffer, future, others=len(bucket.gradients()), missing=len(bucket.gradients())))
        self._submit_ready(last=bucket.is_last())
        if bucket.is_last():
            self._finish()
        return future

    def _begin(self) -> None:
        if self.begun:
            raise SequenceError(
                "a backward pass before this one was broken off, and half of its gradients were sent. Make the DDP model and hook anew."
            )
        if self._applies and self._step.phase is Phase.EXCHANGED and not self._undone:
            raise SequenceError(
                f"a second backward pass before optimizer.step(): {self.compression.method.feedback} applies what was exchanged in the first one. "
                "Accumulate gradients inside `with model.no_sync():`, or throw the step away by hook.compression.discard(), on every rank."
            )
        self._raise_refusal()
        if self._apart is None:
            self._apart = (model := self._model()) is not None and _writes_no_gradients(model)
        self._step.forget()
        self._step.aggregator.form_buckets(BUCKET_BYTES, groups_of(self.compression.attached.optimizer), self._next_layout())
        self._step.begin()

    def _next_layout(self) -> Layout | None:
        """That of DDP's buckets, once it has formed them; before, and where it never does, None: that which was loaded. Where means are not decoded
        into them, none."""
        layout, self._layout = self._layout, []
        if not self._delivers:
            return ()
        ids = [[id(p) for p in buffer] for buffer in layout]
        if self._first_layout is None and layout:
            self._first_layout = ids
        return None if not layout or ids == self._first_layout else layout

    def _submit_ready(self, last: bool) -> None:
        state = self._step.aggregator.state
        if self.compression.method.clip_norm is not None and not last:
            return  # the norm is of the whole gradient
        factor = clip_factor(state, list(self._gradients.values()))
        while (bucket := self._step.next_bucket) is not None and all(id(p) in self._gradients for p in bucket.parameters):
            gradients = [self._gradients[id(p)] for p in bucket.parameters]
            if self._applies and not self._apart and (state.method.clips or scale_of(state, state.settings(bucket)) != 1.0):
                gradients = [g.clone() for g in gradients]  # what stays in p.grad is as the script's loss made it
            again = partial(take_, state, bucket, factor=factor)
            lent = None if self._applies or self._apart else self._lent(bucket, gradients, again)
            self._step.submit(take_(state, bucket, gradients, factor), lent)

    def _lent(self, bucket: Bucket, gradients: Sequence[torch.Tensor], take: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Lent | None:
        """DDP's memory in which these gradients are, if it is one buffer's and of the type that the mean comes in: that is written there. `take`: as
        they are taken, in place."""
        memory = gradients[0].untyped_storage().data_ptr()
        one = next((one for one in self._waiting if one.buffer.untyped_storage().data_ptr() == memory), None)
        if one is None or one.buffer.dtype != bucket.segments.dtype:
            return None
        buffer = one.buffer
        if not all(g.is_contiguous() and g.untyped_storage().data_ptr() == memory for g in gradients):
            return None
        places = [int(g.storage_offset() - buffer.storage_offset()) for g in gradients]
        shifts = tuple(place - segment.start for place, segment in zip(places, bucket.segments, strict=True))
        one.others -= len(gradients)
        given: dict[str, Any] = {"again": _again(bucket.parameters, gradients, take)}
        if not buffer.is_cuda:
            given["arrived"] = partial(one.arrived, len(gradients))
        return Lent(buffer, shifts, **given) if len(set(shifts)) > 1 else Lent(buffer[places[0] : places[0] + bucket.segments.numel], **given)

    def _finish(self) -> None:
        """DDP's last bucket has come. Where nobody asks for gradients again, and means are made in DDP's memory, it copies those of one bucket to
        `p.grad` while others travel; else the step ends before it copies any."""
        waiting = list(self._waiting)
        if self.compression.method.stateful or not self._delivers or not _in_backward() or any(one.others or one.buffer.is_cuda for one in waiting):
            self._end()
            return

        def fulfil() -> None:
            for one in waiting:
                one.fulfil()

        self._step.carry_on(fulfil)
        _after_backward(partial(self._end, [p for _, p in self.named]))

    def _end(self, copied: Sequence[torch.nn.Parameter] = ()) -> None:
        """`copied`: to whose gradients DDP has copied what came."""
        waiting, self._waiting = self._waiting, []
        gradients, self._gradients = self._gradients, {}
        self._complete()
        if self._apart and not _in_backward():
            pass  # for a worker that has joined, and has no use for means
        elif self._undone:
            copied = [p for _, p in self.named] if self._apart else copied
            for t in [*(one.buffer for one in waiting), *(p.grad for p in copied if p.grad is not None)]:
                t.fill_(float("nan"))
        elif not self._applies:
            if self._apart:
                self._give_means()
            else:
                self._write_means(gradients)
        else:
            _after_backward(partial(self._guard.note, self.named))
        for one in waiting:
            one.fulfil()

    def _write_means(self, gradients: dict[int, torch.Tensor]) -> None:
        for bucket, reduction in zip(self._step.aggregator.state.buckets, self._step.results, strict=True):
            views = [gradients[id(p)] for p in bucket.parameters]
            if reduction is not None and reduction.lent is not None and not reduction.task.skipped:
                reduction.lent.settle()
            elif (mean := mean_of(reduction)) is None:
                torch._foreach_zero_(views)
            else:
                torch._foreach_copy_(views, bucket.segments.shaped_views(mean))
        self._step.aggregator.gradients_are_gone()

    def _give_means(self) -> None:
        for bucket, reduction in zip(self._step.aggregator.state.buckets, self._step.results, strict=True):
            if reduction is None or mean_of(reduction) is None:
                torch._foreach_zero_([p.grad for p in bucket.parameters if p.grad is not None])
                continue
            for parameter, mean in zip(bucket.parameters, reduction.hand_out(), strict=True):
                _give(parameter, mean)

    # -- the optimizer's step ----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Before the step of an optimizer that holds these parameters: the method's own update, or nothing where the step was undone."""
        self._raise_refusal()
        if self._step.phase is not Phase.EXCHANGED:
            return
        if self._undone:
            self._let_go()
        elif self._applies:
            scaled = self.compression.attached.loss_scale  # a GradScaler may have unscaled the gradients
            self._guard.check_exchanged([1.0] if scaled == 1.0 else [1.0, 1 / scaled])
            self._step.aggregator.apply_updates(self._step.reductions)
            self._let_go()
        else:
            for reduction in self._step.reductions:
                if reduction.task.skipped:  # nor must the optimizer's momentum move it
                    for parameter in reduction.bucket.parameters:
                        parameter.grad = None
        self._step.forget()

    def _let_go(self) -> None:
        self._guard.forget()
        for _, parameter in self.named:
            parameter.grad = None

    # -- state -------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `BoundCompression.state_dict`: this rank's residuals and the like."""
        return self.compression.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BoundCompression.load_state_dict`."""
        self.compression.load_state_dict(state)


def _again(
    parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor], take: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> Callable[[], list[torch.Tensor]] | None:
    """What gives the `gradients` in DDP's memory again, taken as they were: it has copied them from `p.grad`, and writes there when its backward pass
    ends. None where it has not: `p.grad` is that memory (`gradient_as_bucket_view=True`) or nothing, or DDP has put in zeros for a worker that has
    joined, outside of a backward pass."""
    own = [p.grad for p in parameters]
    if not _in_backward():
        return None
    for mine, copied in zip(own, gradients, strict=True):
        if mine is None or mine.dtype != copied.dtype or mine.untyped_storage().data_ptr() == copied.untyped_storage().data_ptr():
            return None
    return lambda: take([mine.clone() for mine in own if mine is not None])


def _writes_no_gradients(model: DistributedDataParallel) -> bool:
    """Keep DDP from copying what a hook returns to `p.grad`, as it does for optimizers that step within the backward pass, and tell whether that can
    be: not where DDP alone knows which gradients nobody has, where `p.grad` is its buffer, or has another type, nor on a GPU."""
    keep = getattr(model.reducer, "_set_optimizer_in_backward", None)  # torch has had it since 2.0, and not said that it stays
    knows = model.find_unused_parameters or model.static_graph or getattr(model, "mixed_precision", None) is not None
    if keep is None or knows or model.gradient_as_bucket_view or any(p.is_cuda for p in model.parameters()):
        return False
    keep()
    return True


def _give(parameter: torch.nn.Parameter, mean: torch.Tensor) -> None:
    """Make `mean` the gradient. One that was there before the backward pass, which has added to it, is written to: others may know it."""
    own = parameter.grad
    if own is None:
        parameter.grad = mean.to(parameter.dtype) if parameter.requires_grad else None
    elif own._version == 0 and own.dtype is mean.dtype and own.is_contiguous():
        parameter.grad = mean
    else:
        own.copy_(mean)


def _check_all_bound(compression: BoundCompression, trained: list[tuple[str, torch.nn.Parameter]]) -> None:
    ids = {id(p) for _, p in trained}
    for name, p in trained:
        if id(p) not in compression.ids:
            raise CompressionError(f"register(): parameter '{name}' is trained by the model and not bound; bind the model that DDP wraps.")
    for name, p in compression.named:
        if id(p) not in ids:
            raise CompressionError(f"register(): parameter '{name}' is bound and not trained by the model; bind the model that DDP wraps.")


def _check_devices(trained: list[tuple[str, torch.nn.Parameter]], group: Any) -> None:
    for name, p in trained:
        if p.device.type != "cpu" and not (p.device.type == "cuda" and takes_gpus(group)):
            raise CompressionError(
                f"register(): parameter '{name}' is on {p.device}, and the model's process group is '{dist.get_backend_config(group)}'; the hook "
                "exchanges over gloo, for models on the CPU, or over NCCL: init_process_group('cpu:gloo,cuda:nccl'). On GPUs without NCCL use "
                "`import mpi_backend as hvd`, or Horovod."
            )
