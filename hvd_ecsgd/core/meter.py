"""What a step has cost and what it has left behind, in numbers: bytes, seconds, and now and then norms. Nothing here changes a result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import CompressionError
from ..protocols import Accumulated, GroupSettings, Task, Traffic
from ..transport.base import Handle
from .bucket import Bucket
from .state import MethodState

__all__ = ["Gauge", "Measured", "Meter", "check_unmeasured", "metrics"]

_RETRIES = 3
"""Further steps in which norms are taken where this worker stayed silent, so that a rhythm of sending is not always missed."""


def _square(t: torch.Tensor) -> float:
    """‖t‖², in one pass."""
    return float(torch.linalg.vector_norm(t, dtype=torch.float32 if t.element_size() < 4 else None)) ** 2


@dataclass(slots=True)
class _Norms:
    """Sums of squares over buckets; None where no bucket has what is measured."""

    gradient: float | None = None
    """Of all gradients."""
    compressed: float | None = None
    """Of the gradients of which something may be left, in the unit of the residual."""
    buffer: float | None = None
    left: float | None = None
    """Of what the compressor was given, and of what it left of it."""
    residual: float | None = None
    server: float | None = None

    def __iadd__(self, other: _Norms) -> _Norms:
        for f in fields(_Norms):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, its if mine is None else mine if its is None else mine + its)
        return self

    def plain(self) -> dict[str, float]:
        found = {"gradient_norm": _root(self.gradient), "residual_norm": _root(self.residual), "server_residual_norm": _root(self.server)}
        found["relative_error"] = _root(_over(self.left, self.buffer))
        found["residual_to_gradient"] = _root(_over(self.residual, self.compressed))
        return {name: value for name, value in found.items() if value is not None}


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _root(square: float | None) -> float | None:
    """None also of what is no number, as in a step that is going to be undone."""
    return math.sqrt(square) if square is not None and math.isfinite(square) else None


class Gauge:
    """Of one bucket in one step: how long its passes took, when something of it was under way, and what came. `samples`: norms are taken, too."""

    def __init__(self, rank: int, size: int, samples: bool) -> None:
        self._rank, self._size = rank, size
        self.kernel_seconds = self.wait_seconds = self.sampling_seconds = 0.0
        self.spans: list[tuple[float, float]] = []
        """From when to when a collective of it was under way, until this rank took the result."""
        self.seen = True
        """All that was waited for was waited for in here."""
        self.received = 0
        self.norms = _Norms() if samples else None
        self._sent_at: float | None = None
        self._since = time.perf_counter()

    def accumulated(self, gradients: Sequence[torch.Tensor], accumulated: Accumulated, bucket: Bucket, settings: GroupSettings) -> None:
        """The gradients were read into what is to be compressed: a buffer, which is empty where they hold an inf or NaN. As it may wait, it is looked
        at where norms are wanted alone."""
        if self.norms is None or not accumulated.buffer.numel():
            return
        begin = time.perf_counter()
        self.norms.gradient = sum(_square(g) for g in gradients)
        if not bucket.method.lossless:
            self.norms.compressed = self.norms.gradient * (settings.lr**2 if bucket.method.feedback.unit == "update" else 1.0)
            self.norms.buffer = _square(accumulated.buffer)
        self._sampled(begin)

    def paused(self, pending: Handle[Any] | None) -> None:
        """The exchange waits for `pending` from now on, or has ended."""
        now = time.perf_counter()
        self.kernel_seconds += now - self._since
        if pending is not None:
            self._sent_at, self.seen = now, self.seen and not getattr(pending, "waits_elsewhere", False)

    def goes_on(self) -> None:
        """After a pause in which others were at work, and nothing was waited for."""
        self._since = time.perf_counter()

    def answered(self, nbytes: int, share: float, since: float, came: float, decoded: float) -> None:
        """A server's answer, waited for `since` then, `came` and is `decoded`; so many bytes of it, that `share`, are of this bucket."""
        self.spans.append((since, came))
        self.wait_seconds += share * (came - since)
        self.kernel_seconds += share * (decoded - came)
        self.received += nbytes

    def resumed(self, value: Any, since: float) -> None:
        """What was waited for, `since` then, is `value`: a sum, or everybody's tensor by rank."""
        self._since = time.perf_counter()
        self.wait_seconds += self._since - since
        if self._sent_at is not None:
            self.spans.append((self._sent_at, self._since))
        if isinstance(value, torch.Tensor):
            self.received += 2 * (self._size - 1) * value.nbytes // self._size
        else:
            self.received += sum(t.nbytes for r, t in enumerate(value) if r != self._rank)

    def finished(self, bucket: Bucket, task: Task) -> None:
        """The mean is there, and the buffer holds what is left of what was to be sent."""
        extracted = task.extracted > 0 and not task.compressor.lossless
        approximated = extracted or (bucket.method.exchange.approximates and task.reversible)
        self.sent(bucket, task.buffer, approximated=approximated and not task.silent)

    def sent(self, bucket: Bucket, buffer: torch.Tensor, approximated: bool) -> None:
        """`buffer` holds what is left of what was to be sent. `approximated`: something was sent in its place."""
        if self.norms is None or self.norms.buffer is None or bucket.method.lossless:
            return
        begin, residual, server = time.perf_counter(), bucket.residual, bucket.server_residual
        left = _square(buffer)
        if approximated:
            self.norms.left = left
        else:
            self.norms.buffer = None
        if residual is not None:
            self.norms.residual = left if residual is buffer else _square(residual)
        if server is not None and server.numel():
            self.norms.server = _square(server)
        self._sampled(begin)

    def _sampled(self, begin: float) -> None:
        seconds = time.perf_counter() - begin
        self.sampling_seconds += seconds
        self._since += seconds


class _Sent(Protocol):
    """Of a task what is looked at here."""

    @property
    def traffic(self) -> Traffic: ...

    @property
    def silent(self) -> bool: ...

    @property
    def present(self) -> Sequence[bool] | None: ...


class _Exchanged(Protocol):
    """A bucket's step, as far as it is looked at here."""

    @property
    def bucket(self) -> Bucket: ...

    @property
    def task(self) -> _Sent: ...

    @property
    def gauge(self) -> Gauge | None: ...


class _Sums:
    """Over the steps of a record, of one param group or of all."""

    def __init__(self) -> None:
        self.traffic, self.received, self.kernel_seconds = Traffic(), 0, 0.0
        self.norms: _Norms | None = None

    def __iadd__(self, other: _Sums) -> _Sums:
        self.traffic += other.traffic
        self.received += other.received
        self.kernel_seconds += other.kernel_seconds
        self.add_norms(other.norms)
        return self

    def add_norms(self, norms: _Norms | None) -> None:
        if norms is not None:
            self.norms = self.norms or _Norms()
            self.norms += norms

    def plain(self) -> dict[str, Any]:
        received = {"received_bytes": self.received}
        return {**_bytes(self.traffic), **received, "kernel_seconds": self.kernel_seconds, **({} if self.norms is None else self.norms.plain())}


def _bytes(traffic: Traffic) -> dict[str, Any]:
    found: dict[str, Any] = {"payload_bytes": traffic.payload, "sent_bytes": traffic.sent, "dense_bytes": traffic.dense}
    if traffic.skipped:
        found["skipped_bytes"] = traffic.skipped
    if traffic.sent and traffic.dense:
        found["ratio"] = traffic.dense / traffic.sent
    return found


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in one of the spans at least."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


class _Rhythm:
    """When norms are taken: in the first step, and then in every `every`-th (0: never); the next ones are tried where this worker stayed silent."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._last: int | None = None
        self._tries = 0

    def due(self, step: int, local: bool) -> bool:
        """In this step, which is not `local`."""
        return bool(self._every) and not local and (self._last is None or not 0 <= step - self._last < self._every)

    def taken(self, step: int, silent: bool) -> None:
        """They were in this step. `silent`: nothing compressed was sent in it."""
        again = silent and self._tries < _RETRIES
        self._tries = self._tries + 1 if again else 0
        self._last = self._last if again else step


class _Silence:
    """In which steps this worker sent nothing of what is compressed."""

    def __init__(self) -> None:
        self._silent_for: dict[str, int] = {}
        self.skips: dict[int, int] = {}
        """By param group, steps so far in which nothing at all was sent of it."""
        self.stale: dict[int, int] = {}
        """By group, the most steps since the last record for which a bucket had been silent."""

    def count(self, step: Mapping[int, Sequence[tuple[str, bool]]]) -> None:
        """Of a step, by group: each bucket's name, and whether nothing was sent of it."""
        for group, buckets in step.items():
            for name, silent in buckets:
                if silent or name in self._silent_for:
                    self._silent_for[name] = self._silent_for.get(name, 0) + 1 if silent else 0
                    self.stale[group] = max(self.stale.get(group, 0), self._silent_for[name])
            if all(silent for _, silent in buckets):
                self.skips[group] = self.skips.get(group, 0) + 1

    def plain(self, group: int) -> dict[str, int]:
        return {"staleness_steps": self.stale[group], "skips": self.skips.get(group, 0)} if group in self.stale else {}


class _Draft:
    """A record in the making: what its steps add up to."""

    def __init__(self) -> None:
        self.steps = 0
        self.groups: dict[int, _Sums] = {}
        self.together = Traffic()
        self.wire = 0.0
        self.wait: float | None = 0.0
        """None when somebody else waited too."""
        self.staleness: int | None = None
        """The most updates that x took while one of the gradients was computed; None where it takes none."""
        self.own_seconds = 0.0
        """That looking and telling took."""

    def add(self, gauge: Gauge, sums: _Sums) -> None:
        """What a bucket's step took."""
        sums.received += gauge.received
        sums.kernel_seconds += gauge.kernel_seconds
        self.own_seconds += gauge.sampling_seconds
        self.wait = self.wait + gauge.wait_seconds if self.wait is not None and gauge.seen else None

    def plain(self, silence: _Silence) -> dict[str, Any]:
        total, groups = _Sums(), []
        for group, sums in sorted(self.groups.items()):
            total += sums
            groups.append({"group": group, **sums.plain(), **silence.plain(group)})
        total.traffic += self.together
        total.received += self.together.sent
        waited = {} if self.wait is None else {"wait_seconds": self.wait}
        stale = {} if self.staleness is None else {"staleness_updates": self.staleness}
        return {**total.plain(), **stale, "wire_seconds": self.wire, **waited, "telemetry_seconds": self.own_seconds, "groups": groups}


class Meter:
    """Looks at the steps of one bound method, and gives `emit` a record of every `every` of them, a dictionary of plain numbers.

    Norms are taken at the first step and then in every `norms_every`-th (0: never), of passes of their own: two over the compressed part and one over
    the gradients. They are not taken in local steps; where this worker stayed silent the next steps are tried, too. `group_of` says which param
    group a bucket is of, and `wanted` whether this rank is looked at.
    """

    def __init__(
        self,
        emit: Callable[[MethodState, dict[str, Any]], None],
        *,
        every: int = 1,
        norms_every: int = 50,
        group_of: Callable[[Bucket], int] = lambda bucket: bucket.group,
        wanted: Callable[[int], bool] = lambda rank: True,
    ) -> None:
        self._emit, self._every, self._group_of, self._wanted = emit, every, group_of, wanted
        self.last: dict[str, Any] | None = None
        """The record that was made last."""
        self._rhythm, self._silence, self._draft = _Rhythm(norms_every), _Silence(), _Draft()
        self._samples: bool | None = None
        """Norms are taken in the step that has begun; None between steps."""
        self._outcome: str | None = None
        """Of a step that was exchanged and is not over."""
        self._over: tuple[MethodState, str] | None = None
        """Of the last step that is."""
        self._told_at: float | None = None

    def begin(self, state: MethodState, bucket: Bucket) -> Gauge | None:
        """A step of `bucket` begins. None on a rank that is not looked at."""
        if not self._wanted(state.process):
            return None
        self.end(state)
        if self._samples is None:
            self._samples = self._rhythm.due(state.step, state.local)
        return Gauge(state.rank, state.size, self._samples)

    def exchanged(self, state: MethodState, reductions: Sequence[_Exchanged], outcome: str) -> None:
        """A step has been exchanged: `outcome` is "stands", "silent", "local" or "undone". Norms are not kept of one that was undone."""
        if not self._wanted(state.process):
            return
        samples, self._samples, self._outcome = self._samples, None, outcome
        draft, spans = self._draft, list[tuple[float, float]]()
        draft.steps += 1
        silent: dict[int, list[tuple[str, bool]]] = {}
        for reduction in reductions:
            gauge, bucket, task = reduction.gauge, reduction.bucket, reduction.task
            group = self._group_of(bucket)
            sums = draft.groups.setdefault(group, _Sums())
            sums.traffic += task.traffic
            if gauge is None:  # it began before somebody looked
                continue
            draft.add(gauge, sums)
            spans += gauge.spans
            if outcome != "undone":
                sums.add_norms(gauge.norms)
                if not bucket.dense or task.present is not None:  # who is late sends nothing of either kind
                    silent.setdefault(group, []).append((bucket.name, task.silent))
        draft.wire += _union(spans)
        self._silence.count(silent)
        if samples and outcome != "undone":
            self._rhythm.taken(state.step - 1, bool(silent) and all(nothing for buckets in silent.values() for _, nothing in buckets))

    def applied(self, staleness: int) -> None:
        """The gradient of the step that is to be `exchanged` was applied at an x that had taken so many updates since it was computed."""
        self._draft.staleness = max(self._draft.staleness or 0, staleness)

    def together(self, traffic: Traffic) -> None:
        """What belongs to no bucket was averaged over all ranks."""
        self._draft.together += traffic

    def end(self, state: MethodState, outcome: str = "") -> None:
        """The step that was exchanged is over; nothing when none is. `outcome`: another than it seemed."""
        if self._outcome is None:
            return
        begin = time.perf_counter()
        self._over, self._outcome = (state, outcome or self._outcome), None
        if self._draft.steps >= self._every:
            self.flush()
        self._draft.own_seconds += time.perf_counter() - begin

    def flush(self) -> None:
        """Make a record of the steps since the last one, if there are any."""
        if self._over is None or not self._draft.steps:
            return
        (state, outcome), now, draft = self._over, time.perf_counter(), self._draft
        record: dict[str, Any] = {"step": state.step - 1, "steps": draft.steps, "outcome": outcome, "undone_steps": state.undone}
        record |= {"unix_seconds": round(time.time(), 3), **draft.plain(self._silence)}
        if self._told_at is not None:
            record["step_seconds"] = now - self._told_at
        self.last, self._told_at, self._draft, self._silence.stale = record, now, _Draft(), {}
        self._emit(state, record)


@runtime_checkable
class Measured(Protocol):
    """What a `Meter` can look at: a bound compression, or an optimizer whose workers keep different paces."""

    def measure_by(self, meter: Meter | None) -> None:
        """`meter` looks at the steps, from the next one on; None: nobody does any more. Raises `CompressionError` where another one does."""


def check_unmeasured(meter: Meter | None) -> None:
    """Raise `CompressionError` where one looks already."""
    if meter is not None:
        raise CompressionError("this compression is measured already: close the Logger that does, or give one Logger several sinks.")


def metrics(state: MethodState, loaded: Mapping[str, Any] | None, meter: Meter | None) -> dict[str, Any]:
    """What `BoundCompression.metrics` returns. `loaded`: state that no driver has taken over yet."""
    counted = {f"total_{name}": value for name, value in _bytes(state.traffic).items()}
    found = {"steps": state.step, "undone_steps": state.undone, **counted}
    if loaded is not None:
        found |= {"steps": loaded["step"], "undone_steps": loaded["undone"]}
    return found if meter is None or meter.last is None else {**found, "last": dict(meter.last)}
