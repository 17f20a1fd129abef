"""Parameters that travel together, with their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CompressionError
from ..kernels import column_sums, shift_, sums_of
from ..protocols import Accumulated, Compressor, Exchange, GroupSettings, Part, Result, Reversals, Role, State, StepContext, Task, zeros
from ..segments import Segment, Segments
from ..verdicts import Verdict
from .method import Method

__all__ = ["Bucket", "add_servers_", "part_of", "wire_dtype"]


@dataclass
class Bucket:
    """Segments that travel together: one param group, dtype and device. State is allocated at first use."""

    name: str
    method: Method
    segments: Segments
    parameters: list[torch.nn.Parameter]
    group: int
    state: State | None = None
    exchange_state: State | None = None
    unit: float | None = None
    """The learning rate that the residual is measured by: η̃ of the last step in which η was not 0."""
    dense: bool = False
    """Never compressed: small or one-dimensional parameters."""
    residual_is_zero: bool = True
    """This rank's residual is known to be zero: the last exchange took everything, or there was none."""
    written: Written | None = None
    """Shifted parameters as they were after our last write; None where nothing was shifted yet."""
    results: Results = field(init=False)
    """What comes back is decoded into them."""
    kinds: list[tuple[torch.dtype, torch.device]] = field(default_factory=list)
    """Type and device of the parameters when the bucket was made."""
    before: list[State] = field(default_factory=list)
    """With `exact`, feedback's and exchange's state as they were when the step began."""
    can_begin_again: bool = False
    """Its steps may be taken again among fewer workers, from the same bits."""

    def __post_init__(self) -> None:
        self.kinds = [(p.dtype, p.device) for p in self.parameters]
        self.results = Results(self.segments)

    def check_takes(self, gradients: Sequence[torch.Tensor]) -> None:
        """Raise `CompressionError` that names the parameter when a gradient has another shape than it was bound with, or the parameter was converted
        since: state and payloads are in the shape and type it had."""
        for segment, gradient in zip(self.segments, gradients, strict=True):
            if tuple(gradient.shape) != segment.shape:
                raise CompressionError(
                    f"the gradient of parameter '{segment.name}' has shape {tuple(gradient.shape)}, but it was bound with shape "
                    f"{segment.shape}; its residual cannot be carried over. "
                    "Bind again after changing a parameter's shape."
                )
        for name, p, (dtype, device) in zip(self.segments.names, self.parameters, self.kinds, strict=True):
            if p.dtype != dtype or p.device != device:
                raise CompressionError(
                    f"parameter '{name}' was {dtype} on {device} when it was bound, and is {p.dtype} on {p.device} now: what is kept and sent for it "
                    "is in the former type and place. Convert the model (half, double, to(…)) before compression and optimizer are made, or make "
                    "them again."
                )

    def allocate(self, rank: int, size: int) -> None:
        if self.state is None:
            self.state, self.exchange_state = self.new_state(), self.new_exchange_state(rank, size)

    def new_state(self) -> State:
        """The feedback rule's, beginning with zeros."""
        return zeros(self.method.feedback.slots(self.segments), self.segments)

    def new_exchange_state(self, rank: int, size: int) -> State:
        """Likewise the exchange's."""
        return zeros(self.method.exchange.slots(size), self.method.exchange.state_segments(self.segments, rank, size))

    @property
    def exact(self) -> bool:
        """A copy of the state is kept during each step."""
        return self.method.exact or self.can_begin_again

    def _held(self, role: Role) -> torch.Tensor | None:
        name = self.method.slot_names.get(role)
        return None if self.state is None or name is None else self.state[name]

    @property
    def residual(self) -> torch.Tensor | None:
        """What this worker has not sent yet; None where nothing is kept, or not yet. Likewise those below."""
        return self._held(Role.RESIDUAL)

    @property
    def point(self) -> torch.Tensor | None:
        """x, of rules that take gradients at another point."""
        return self._held(Role.POINT)

    @property
    def memory(self) -> torch.Tensor | None:
        """Of means that came back, equal on all ranks."""
        return self._held(Role.MEMORY)

    @property
    def server_residual(self) -> torch.Tensor | None:
        """What this rank, as a server, has not sent yet."""
        name = self.method.server_slot
        return None if self.exchange_state is None or name is None else self.exchange_state[name]

    def unit_for(self, settings: GroupSettings) -> float:
        """η̃ of a step with these settings: η; but where the mean enters a memory it never falls.

        What waits in a residual is worth η̃ times itself, so it grows as η̃ falls. The model does not mind, as η multiplies it. A memory does: the next
        step may multiply it by a larger η.
        """
        feedback = self.method.feedback
        # A rule that applies the update remembers means where it has a state of them, which is equal on all ranks.
        remembers = settings.remembers and (not feedback.takes.update or Role.MEMORY in self.method.slot_names)
        return max(settings.lr, self.unit or 0.0) if remembers else settings.lr

    def decays_where_it_is(self, settings: GroupSettings) -> bool:
        """Accumulating reads the parameters, as the rule takes weight decay of them, and nobody looks at them before they are moved: they are not
        shifted."""
        feedback = self.method.feedback
        return feedback.takes.momentum and self.point is None and bool(getattr(feedback, "weight_decay", None) or settings.weight_decay)

    def task(self, compressor: Compressor, ctx: StepContext, accumulated: Accumulated, out: torch.Tensor | None = None, **said: Any) -> Task:
        """What an exchange is given of a step, after the rule has `accumulated`; `out`: where the mean goes. `said`: other fields of `Task`."""
        assert self.exchange_state is not None
        feedback = self.method.feedback
        return Task(
            name=self.name,
            segments=self.segments,
            compressor=compressor,
            state=self.exchange_state,
            ctx=ctx,
            accumulated=accumulated,
            into=self.results.take(out),
            reversals=Reversals(self.residual, was_zero=compressor.lossless and self.residual_is_zero),
            step_size=ctx.settings.lr if feedback.unit == "gradient" else 1.0,
            applied=feedback.takes.update,
            **said,
        )

    def context(self, settings: GroupSettings, seed: int, step: int, rank: int, size: int) -> StepContext:
        """What a step with these settings is done with."""
        unit = self.unit_for(settings) or 1.0
        before = unit if self.unit is None or self.method.feedback.unit == "update" else self.unit
        return StepContext(seed, step, rank, size, settings, unit, before)

    def bytes_without_compression(self, size: int) -> int:
        """That each of `size` workers sends in a ring all-reduce of the gradients."""
        return 2 * (size - 1) * self.segments.numel * self.parameters[0].dtype.itemsize // size

    @property
    def part(self) -> Part:
        """As the feedback rule sees it. State must have been allocated."""
        assert self.state is not None
        return Part(self.state, self.parameters, self.segments, self.method.lossless)

    def frozen(self) -> list[int]:
        """Places of the parameters that have been frozen since they were bound."""
        return [i for i, p in enumerate(self.parameters) if not p.requires_grad]

    def shift_(self) -> None:
        """Parameters ← the shifted point of rules that have one; those that are frozen stand still at x."""
        x = self.point
        if x is None:
            return
        shift = self.method.feedback.shift(self.part)
        assert shift is not None, f"{self.method.feedback} keeps x, and does not say where the parameters are"
        t, factor = shift
        sums = shift_(self.parameters, self.segments, x, t, factor)
        for i in self.frozen():
            self.parameters[i].copy_(self.segments.shaped_views(x)[i])
            sums[i] = column_sums(self.parameters[i])
        self.written = Written.by_us(self.parameters, sums)

    def capture_(self) -> None:
        """x ← what the parameters hold now, of rules that shift them: at the first step, and after somebody else wrote to them."""
        if self.point is not None:
            torch._foreach_copy_(self.segments.shaped_views(self.point), list(self.parameters))

    def note_written(self) -> None:
        """Shifted parameters hold what we want them to hold."""
        self.written = Written.by_us(self.parameters, sums_of(self.parameters, self.segments))

    def written_to(self, contents: bool) -> str | None:
        """The name of a parameter that somebody else has written to since `note_written`. Without `contents` version counters alone are looked at."""
        assert self.written is not None
        i = self.written.other_version(self.parameters)
        if i is None and contents:
            i = self.written.other_sums(sums_of(self.parameters, self.segments))
        return None if i is None else self.segments.names[i]

    def is_as_written(self) -> Verdict:
        """Whether shifted parameters hold what we want them to hold; True of others, and False where nothing was shifted yet."""
        if self.point is None or self.written is None:
            return self.point is None
        as_were = self.written.other_version(self.parameters) is None
        return as_were and self.written.same_sums(sums_of(self.parameters, self.segments))

    def remember(self) -> None:
        """Copy the state, but for x, which does not move before a step stands. The memory is kept."""
        assert self.state is not None and self.exchange_state is not None
        point = self.method.slot_names.get(Role.POINT)
        if not self.before:
            self.before = [{}, {}]
        for copy, state in zip(self.before, (self.state, self.exchange_state)):
            for slot in [s for s in copy if s not in state]:
                del copy[slot]
            for slot, t in state.items():
                if slot != point:
                    copy[slot] = copy[slot].copy_(t) if slot in copy and copy[slot].shape == t.shape else t.clone()

    def restore(self) -> None:
        """Put back what `remember` copied."""
        assert self.state is not None and self.exchange_state is not None
        point = self.method.slot_names.get(Role.POINT)
        for copy, state in zip(self.before, (self.state, self.exchange_state)):
            for slot in [s for s in state if s not in copy and s != point]:
                del state[slot]
            for slot, t in copy.items():
                state[slot] = state[slot].copy_(t) if slot in state else t.clone()


class Results:
    """A bucket's results, over its `segments`: kept buffers, because fresh memory of this size costs more than the pass that fills it."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.kept: list[Result] = []

    def take(self, out: torch.Tensor | None = None) -> Result:
        """`out`, or a kept buffer that nobody refers to any more, or a new one.

        After `zero_grad(set_to_none=False)` gradients live in the last one, so two are kept; one that a script holds on to is left to it.
        """
        if out is not None:
            return Result(out)
        for result in self.kept:
            if result.free:
                return result
        self.kept = [*self.kept[-1:], Result(make=self._segments.empty)]
        return self.kept[-1]


@dataclass(frozen=True)
class Written:
    """Parameters as they were after our last write: a difference means that somebody else wrote to them."""

    versions: list[int]
    """Their version counters."""
    sums: list[torch.Tensor]
    """`column_sums` of each: writes through `.data` and NumPy's views raise no version counter."""

    @staticmethod
    def by_us(parameters: Sequence[torch.Tensor], sums: list[torch.Tensor]) -> Written:
        return Written([p._version for p in parameters], sums)

    def other_version(self, parameters: Sequence[torch.Tensor]) -> int | None:
        """The place of the first whose version is another."""
        return next((i for i, (p, version) in enumerate(zip(parameters, self.versions, strict=True)) if p._version != version), None)

    def same_sums(self, sums: Sequence[torch.Tensor]) -> Verdict:
        """Whether all are what they were."""
        were, are = torch.cat(self.sums), torch.cat(list(sums))
        return torch.equal(were, are) if were.device.type == "cpu" else (were == are).all()

    def other_sums(self, sums: Sequence[torch.Tensor]) -> int | None:
        """The place of the first whose sums are not what they were."""
        if self.same_sums(sums):
            return None
        return next((i for i, (were, are) in enumerate(zip(self.sums, sums, strict=True)) if not torch.equal(were, are)), None)

    def put_back(self, parameters: Sequence[torch.Tensor]) -> Written:
        """The parameters were moved by us, and hold what they held."""
        return Written.by_us(parameters, self.sums)


def part_of(slot: torch.Tensor, i: int, segment: Segment) -> torch.Tensor:
    """What a slot of state holds for its i-th segment; a view."""
    return slot[i] if slot.dim() == 2 else slot[segment.start : segment.stop]


def add_servers_(residual: torch.Tensor, server_residual: torch.Tensor, exchange: Exchange, segments: Segments, rank: int, size: int) -> None:
    """Add what this rank holds as a server to what it holds as a worker, n-fold, as the mean over workers divides by n."""
    for segment, piece in zip(segments, exchange.state_segments(segments, rank, size), strict=True):
        start = segment.start + piece.offset - segment.offset
        residual[start : start + piece.numel].add_(server_residual[piece.start : piece.stop], alpha=size)


def wire_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Residuals and sums are kept in float32 for 16-bit parameters."""
    return torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype
