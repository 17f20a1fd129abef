"""The worker's side: what it computed goes to the servers, compressed, and its x moves as they say."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..core import saved_state
from ..core.bucket import Bucket
from ..core.gradients import clip_factor, take_
from ..core.meter import Gauge, Meter, check_unmeasured
from ..core.state import MethodState, NamedParameters
from ..errors import CompressionError, SequenceError, TransportError
from ..kernels import sums_of
from ..optimizer.hyper_parameters import HyperParameters
from ..protocols import Accumulated, Compressor, GroupSettings, StepContext, Traffic
from ..segments import Key
from ..verdicts import known
from .messages import Kind, Message
from .plan import Plan, dense_gradient

__all__ = ["Worker"]


@dataclass
class _Accumulated:
    """A bucket whose gradients were added to its residual, and what undoes that."""

    bucket: Bucket
    gradients: list[torch.Tensor]
    ctx: StepContext
    buffer: torch.Tensor
    gauge: Gauge | None = None
    extracted: tuple[Compressor, torch.Tensor, Key] | None = None

    def undo_(self) -> None:
        """Put everything back: bit for bit with `exact=True` in the preset, else to rounding."""
        bucket = self.bucket
        if bucket.method.exact:
            bucket.restore()
            return
        if self.extracted is not None:
            compressor, payload, key = self.extracted
            scratch = torch.zeros_like(self.buffer)
            compressor.add_(scratch, payload, bucket.segments, key)
            self.buffer.add_(scratch.nan_to_num_(0.0, 0.0, 0.0))
        bucket.method.feedback.undo_(bucket.part, self.gradients, self.ctx)


@dataclass
class _Sent:
    """What a meter is told of a bucket's payload."""

    traffic: Traffic
    silent: bool = False
    present: Sequence[bool] | None = None


@dataclass
class _Pushed:
    """A bucket's payload that is on its way, while somebody measures."""

    bucket: Bucket
    gauge: Gauge | None
    task: _Sent


class Worker:
    """Worker number `worker`. `shards`: by server, the parameters that it serves; `optimizer` says what the hyper-parameters are, and takes no step.

    Its x, the parameters themselves, is moved by what the servers answer, and by nothing else: a server knows it bit for bit.
    """

    def __init__(self, plan: Plan, shards: Sequence[NamedParameters], optimizer: torch.optim.Optimizer, worker: int) -> None:
        plan.check_optimizer(optimizer)
        self.plan, self.optimizer, self.worker = plan, optimizer, worker
        self.shards: list[MethodState] = [plan.record(named, optimizer, worker) for named in shards]
        for shard in self.shards:
            shard.settings = self._settings
        self.whole = plan.record([pair for named in shards for pair in named], optimizer, worker)
        """The record of all shards: traffic, and how many gradients there were, refused ones included; residuals are the shards'."""
        self.meter: Meter | None = None
        self._pushed: tuple[str, list[_Pushed]] | None = None
        """Of the gradient whose answers have not all come: what became of it ("stands", "undone"), and what was pushed."""
        self._asked_at = 0.0
        self._places = [{name: i for i, (name, _) in enumerate(named)} for named in shards]
        self._hyper_parameters = HyperParameters(optimizer)
        self.answers = [0] * len(shards)
        """By server, how many have come."""
        self.refused = 0
        """Gradients that were not pushed, as they held an inf or NaN."""
        self.received = 0
        """Bytes of payloads from the servers."""
        self._versions: list[int] = []
        self._sums: list[torch.Tensor] = []

    def _settings(self, bucket: Bucket) -> GroupSettings:
        group = self.optimizer.param_groups[bucket.group]
        return GroupSettings.of(group, where=f"param group {bucket.group} of {type(self.optimizer).__name__}")

    @property
    def sent(self) -> int:
        """Bytes of payloads to the servers."""
        return self.whole.traffic.sent

    def measure_by(self, meter: Meter | None) -> None:
        """As a bound compression does; a record is of a gradient and the answers to it."""
        if meter is not None:
            check_unmeasured(self.meter)
        self.meter = meter

    def _count(self) -> None:
        self.whole.step, self.whole.undone = self.shards[0].step + self.refused, self.refused

    def _buckets(self) -> list[Bucket]:
        return [bucket for shard in self.shards for bucket in shard.buckets]

    # -- gradients go ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self) -> list[Message] | None:
        """The gradients that the parameters hold, compressed: a message for each server, after which x is pulled from one after the other.

        None when one holds an inf or NaN, or its payload would: nothing is sent then and residuals are as they were, it is counted in `refused`, and
        warned of; the worker leaves what it has in flight, and pulls.

        Raises `CompressionError` for hyper-parameters that no step can be taken with, and for gradients of other shapes than the parameters';
        `SequenceError` when parameters were written to since the servers' last answer.
        """
        self._check_untouched()
        gradients = {id(p): dense_gradient(p) for bucket in self._buckets() for p in bucket.parameters}
        for shard in self.shards:  # all is looked at before anything is added to a residual
            for bucket in shard.buckets:
                bucket.check_takes([gradients[id(p)] for p in bucket.parameters])
                if wrong := shard.settings(bucket).wrong:
                    raise CompressionError(f"asynchronous training: {wrong}, and no step can be taken with that.")
        factor = clip_factor(self.shards[0], list(gradients.values()))
        accumulated: list[list[_Accumulated | None]] = []
        begun: list[_Accumulated] = []
        for shard in self.shards:
            accumulated.append([])
            for bucket in shard.buckets:
                one = self._accumulate(shard, bucket, [gradients[id(p)] for p in bucket.parameters], factor)
                if one is not None and not one.buffer.numel() and bucket.segments.numel:  # not finite: nothing was added
                    self._refuse([*begun, one] if bucket.method.exact else begun)
                    return None
                accumulated[-1].append(one)
                begun += [] if one is None else [one]
        messages = []
        for server, shard in enumerate(self.shards):
            payloads = [self._extract(shard, bucket, one) for bucket, one in zip(shard.buckets, accumulated[server], strict=True)]
            absent = [place for name, place in self._places[server].items() if shard.named[place][1].grad is None]
            messages.append(Message(Kind.PUSH, self.worker, shard.step, self._hyper_parameters.values(), absent, payloads))
        if not known(one.extracted[0].finite(one.extracted[1], one.bucket.segments) for one in begun if one.extracted is not None):
            self._refuse(begun)
            return None
        for one in begun:
            one.bucket.unit = one.ctx.unit
        for shard in self.shards:
            shard.step += 1
        self._pushed = "stands", [self._push_of(one) for one in begun]
        for pushed in self._pushed[1]:
            self.whole.traffic += pushed.task.traffic
        self._count()
        self._asked_at = time.perf_counter()
        return messages

    def _push_of(self, one: _Accumulated) -> _Pushed:
        assert one.extracted is not None
        compressor, payload, _ = one.extracted
        if one.gauge is not None:
            one.gauge.sent(one.bucket, one.buffer, approximated=not compressor.lossless)
        dense = one.bucket.bytes_without_compression(self.plan.workers)
        return _Pushed(one.bucket, one.gauge, _Sent(Traffic(payload.nbytes, payload.nbytes, dense)))

    def _accumulate(self, shard: MethodState, bucket: Bucket, gradients: list[torch.Tensor], factor: float) -> _Accumulated | None:
        """None when the learning rate is 0: nothing is sent, and the residual stays as it is. Without a buffer where a gradient is not finite."""
        group = shard.settings(bucket)
        if group.lr == 0:
            return None
        gauge = None if self.meter is None else self.meter.begin(self.whole, bucket)
        bucket.allocate(shard.rank, shard.size)
        if bucket.method.exact:
            bucket.remember()
        given = take_(shard, bucket, gradients, factor)
        ctx = bucket.context(group, self.plan.method.seed, shard.step, shard.rank, shard.size)
        accumulated = bucket.method.feedback.accumulate_(bucket.part, given, ctx)
        if not accumulated.finite:
            accumulated = Accumulated.nothing(bucket.segments)
        if gauge is not None:
            gauge.accumulated(given, accumulated, bucket, group)
            gauge.paused(None)
        return _Accumulated(bucket, given, ctx, accumulated.buffer, gauge)

    def _extract(self, shard: MethodState, bucket: Bucket, one: _Accumulated | None) -> torch.Tensor:
        if one is None:
            return bucket.segments.compact.empty()[:0]
        if one.gauge is not None:
            one.gauge.goes_on()
        compressor = self.plan.up(bucket, shard.step)
        key = self.plan.key(compressor, "push", shard.step, self.worker)
        one.extracted = compressor, compressor.extract_(one.buffer, bucket.segments, key), key
        if one.gauge is not None:
            one.gauge.paused(None)
        return one.extracted[1]

    def _refuse(self, begun: Sequence[_Accumulated]) -> None:
        for one in begun:
            one.undo_()
        self.refused += 1
        self._pushed, self._asked_at = ("undone", []), time.perf_counter()
        self._count()
        warnings.warn(
            f"a gradient of worker {self.worker} held an inf or NaN: it was not pushed, and its residual is as it was ({self.refused} so far).",
            RuntimeWarning,
            stacklevel=4,
        )

    # -- x comes -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_answer(self, server: int, answer: Message) -> None:
        """A server's answer has come: x of its parameters moves. Raises `TransportError` for one that was not meant for this worker or cannot be the
        next, and `CompressionError` for payloads of another size than they must have."""
        shard = self.shards[server]
        if answer.worker != self.worker or answer.number != self.answers[server] or answer.kind not in (Kind.MOVE, Kind.EXACT):
            raise TransportError(
                f"asynchronous training: worker {self.worker} expected answer {self.answers[server]} of server {server}, and got "
                f"{answer.kind.name} {answer.number} for worker {answer.worker}."
            )
        came = time.perf_counter()
        targets = shard.buckets if answer.kind is Kind.MOVE else [p for bucket in shard.buckets for p in bucket.parameters]
        if len(answer.payloads) != len(targets):
            raise TransportError(f"asynchronous training: {len(answer.payloads)} payloads came of server {server}, and {len(targets)} were expected.")
        if answer.kind is Kind.MOVE:
            for bucket, payload in zip(shard.buckets, answer.payloads, strict=True):
                payload = payload.to(bucket.segments.device)
                self.plan.move_([p.detach() for p in bucket.parameters], bucket, payload, answer.number, self.worker)
        else:
            exact = list(zip([p for bucket in shard.buckets for p in bucket.parameters], answer.payloads, strict=True))
            for p, x in exact:
                if x.numel() != p.numel() or x.dtype != p.dtype:
                    raise TransportError(
                        f"asynchronous training: {x.numel()} elements of {x.dtype} came for a parameter of {p.numel()} of {p.dtype}."
                    )
            for p, x in exact:
                p.copy_(x.view(p.shape))
        self._measure(server, answer, came)
        self.answers[server] += 1
        self.received += answer.nbytes
        # A broadcast of the same weights by the script writes to them, too; it comes at the beginning, where a look at them costs little.
        self._sums = self._sums_now() if answer.kind is Kind.EXACT else []
        self._versions = self._versions_now()

    def _measure(self, server: int, answer: Message, came: float) -> None:
        """Tell who measures of an answer, in which x has moved since it `came`, and with the last one that the step is over."""
        if self._pushed is None or self.meter is None:
            self._pushed = None
            return
        decoded = time.perf_counter()
        outcome, pushed = self._pushed
        gauges = {id(p.bucket): p.gauge for p in pushed}
        payloads = iter(answer.payloads)
        for bucket in self.shards[server].buckets:
            nbytes = sum(p.nbytes for p in islice(payloads, 1 if answer.kind is Kind.MOVE else len(bucket.parameters)))
            if (gauge := gauges.get(id(bucket))) is not None:
                gauge.answered(nbytes, nbytes / max(1, answer.nbytes), self._asked_at, came, decoded)
        if answer.numbers:
            self.meter.applied(int(answer.numbers[0]))
        self._asked_at = decoded
        if server + 1 == len(self.shards):
            self._pushed = None
            self.meter.exchanged(self.whole, pushed, outcome)
            self.meter.end(self.whole)

    def _versions_now(self) -> list[int]:
        return [p._version for bucket in self._buckets() for p in bucket.parameters]

    def _sums_now(self) -> list[torch.Tensor]:
        return [s for bucket in self._buckets() for s in sums_of(bucket.parameters, bucket.segments)]

    def _check_untouched(self) -> None:
        if self._versions == (now := self._versions_now()):
            return
        if self._sums and all(torch.equal(a, b) for a, b in zip(self._sums, self._sums_now(), strict=True)):
            self._versions = now
            return
        names = [name for bucket in self._buckets() for name in bucket.segments.names]
        changed = next((name for name, a, b in zip(names, self._versions, now) if a != b), names[0])
        raise SequenceError(
            f"asynchronous training: parameter '{changed}' was written to since the servers' last answer. x is the servers': load weights before the "
            "optimizer is made, or by its load(…); and put back what you changed for an evaluation before the next step."
            if self._versions
            else "asynchronous training: a gradient was pushed before the servers gave x."
        )

    # -- saving ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Residuals and counters, by server."""
        return {"shards": [saved_state.state_dict(shard) for shard in self.shards], "answers": list(self.answers), "refused": self.refused}

    def begin_anew(self) -> None:
        """Forget residuals and counters: this worker is another one than those that the servers knew."""
        for bucket in self._buckets():
            bucket.state = bucket.exchange_state = bucket.unit = None
        for shard in self.shards:
            shard.step = 0
        self.answers = [0] * len(self.shards)
        self._count()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned on the same worker of as many. Raises `CompressionError` where it does not fit, with nothing
        changed."""
        self.prepare_load(saved)()

    def prepare_load(self, saved: Mapping[str, Any]) -> Callable[[], None]:
        """As `load_state_dict`, whose checks are made at once; what is returned takes over."""
        if len(saved["shards"]) != len(self.shards):
            raise CompressionError(f"the state was saved with {len(saved['shards'])} servers, and there are {len(self.shards)} now.")
        take_over = [saved_state.prepare_load(shard, one) for shard, one in zip(self.shards, saved["shards"], strict=True)]

        def take_over_all() -> None:
            for take in take_over:
                take()
            self.answers, self.refused = list(saved["answers"]), saved["refused"]
            self._count()

        return take_over_all
