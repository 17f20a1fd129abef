"""The seams: what a compressor, a feedback rule and an exchange are, and what is passed between them.

Every method is four verbs: *accumulate* (feedback), *extract* (compressor), *exchange*, *add* (compressor). Configuration is frozen;
all state is plain dictionaries of flat tensors that one record owns, so that saving, resizing and moving it is written once. What is passed between
them is in `values`, and had from here: a method of one's own needs this module alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch

from .segments import Key, Segments
from .transport.base import Handle, Transport
from .values import (
    NO_SEGMENTS,
    Accumulated,
    Decoding,
    Extraction,
    GroupSettings,
    Lent,
    Part,
    Places,
    Result,
    Reversals,
    Role,
    Slot,
    Slots,
    State,
    Sums,
    Takes,
    Traffic,
    Wanted,
    slot_of,
    zeros,
)
from .verdicts import Verdict

__all__ = ["NO_SEGMENTS", "Accumulated", "Assigns", "Compressor", "DecodesAll", "Decoding", "Exchange", "Extraction",
           "ExtractsAhead", "Feedback", "GroupSettings", "Lent", "Part", "Places",
           "Result", "Reversals", "Role",
           "Slot", "Slots", "Sparse", "State", "Steps", "StepContext", "Sums", "Takes", "Task", "Tells", "Traffic", "UnbiasedCompressor", "UsesSums",
           "Verdict", "Wanted", "add_sum_", "decode_sum_", "extracted", "poison", "settled", "slot_of", "sums_for", "wanted", "zeros"]  # fmt: skip

Steps = Generator[Handle[Any], Any, torch.Tensor]
"""An exchange in progress: it yields each handle it waits for, is sent the handle's result, and returns the decoded mean."""


@runtime_checkable
class Compressor(Protocol):
    """An operator C with its wire format. A frozen dataclass: configuration only."""

    @property
    def summable(self) -> bool:
        """Payloads drawn with one key may be added element by element: they ride an ordinary all-reduce."""
        ...

    @property
    def shared_key(self) -> bool:
        """Every rank must draw the same randomness."""
        ...

    @property
    def lossless(self) -> bool:
        """The residual is always exactly zero."""
        ...

    @property
    def unbiased(self) -> bool:
        """E C(v) = v. Such a compressor is an `UnbiasedCompressor`, and needs no feedback."""
        ...

    def check_feedback(self) -> None:
        """Called when what C leaves is to be kept and added back. Raises `CompressionError` when that diverges, warns once when it may."""
        ...

    def delta(self, v: torch.Tensor) -> float:
        """1 − E‖C(v) − v‖²/‖v‖² of the 1-D `v`, exactly, the mean being over C's randomness; 1 of a zero vector.

        `v` is one segment (for `GlobalRandomBlock` the model). C contracts at `v` where this is positive.
        """
        ...

    def payload_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of the payload's elements for a buffer of `dtype`; uint8 for packed formats."""
        ...

    def payload_size(self, segments: Segments) -> int | None:
        """Elements of the payload; None when it depends on the values or on the draw."""
        ...

    def extract_(self, buffer: torch.Tensor, segments: Segments, key: Key) -> torch.Tensor:
        """Take C(buffer) out of the segments' ranges of the flat `buffer`; the residual stays. Returns one contiguous 1-D payload.

        NaN in a segment gives a payload that decodes to NaN (`finite` is False). Elements outside the table are not touched.
        """
        ...

    def add_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        """`out += alpha · C⁻¹(payload)` in the segments' ranges of the flat `out`. `key` is the one it was extracted with."""
        ...

    def finite(self, payload: torch.Tensor, segments: Segments) -> Verdict:
        """False when decoding would give an inf or NaN."""
        ...


@runtime_checkable
class Tells(Protocol):
    """A compressor whose payload can be made one that decodes to NaN after it was extracted: nobody waits for a GPU to say whether it must."""

    def telltale(self, payload: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, float]:
        """(a view of a part of `payload`, what to fill it with so that `finite` is False)."""
        ...


class Assigns(Protocol):
    """A compressor that can decode into memory that holds anything, which saves the pass that zeroes it."""

    def assign_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float = 1.0) -> None:
        """`out = alpha · C⁻¹(payload)` in the segments' ranges of the flat `out`: the bits that `Compressor.add_` to zeros gives."""
        ...


class DecodesAll(Protocol):
    """A compressor that can decode several payloads in one pass over the result, and tell sums of what is then there. The key must not matter."""

    def decode_all_(
        self, out: torch.Tensor, payloads: Sequence[torch.Tensor], segments: Segments, alpha: float, *, add: bool, sums: Sums | None = None
    ) -> bool:
        """`out = alpha · Σ C⁻¹(payload)`, of one or more, in their order: the bits of `Assigns.assign_` of the first and `Compressor.add_` of the
        others; or, `add`, of `Compressor.add_` of one, and `out +=` such a sum of several. Fills in `sums`. False where nothing was done."""
        ...


class UsesSums(Protocol):
    """A compressor that need not read its buffer twice where it is told sums of it."""

    def wants(self, tables: Sequence[Segments]) -> Wanted | None:
        """Which, of a buffer that it is to extract these from; None for none."""
        ...

    def extract_by_sums_(self, buffer: torch.Tensor, segments: Segments, key: Key, sums: Sums) -> torch.Tensor:
        """`Compressor.extract_`, to the bit. `sums` are those of the buffer's segments."""
        ...


class ExtractsAhead(Protocol):
    """A compressor that looks at a few elements at a time: it can take them of gradients of which nothing is kept, without a buffer."""

    def extraction(self, segments: Segments, key: Key) -> Extraction | None:
        """What gives the bits of `Compressor.extract_`; None where no kernel does."""
        ...


@cache
def _agrees(kind: type, shortcut: str, *plain: str) -> bool:
    """Whether the class has a `shortcut` that says the same as its `plain` methods: not where one derived from it brings one of them of its own."""
    return next((shortcut in vars(c) for c in kind.__mro__ if not vars(c).keys().isdisjoint((shortcut, *plain))), False)


def wanted(compressor: Compressor, exchange: Exchange, segments: Segments, size: int) -> Wanted | None:
    """What the worker's compressor would like to know of a buffer with these `segments`, which `exchange` sends among so many workers."""
    tables = getattr(exchange, "extracts", None)
    if tables is None:
        return None
    parts = tables(segments, size)
    return sums_for(compressor, parts) if sum(part.numel for part in parts) == segments.numel else None


def sums_for(compressor: Compressor, tables: Sequence[Segments]) -> Wanted | None:
    """What the compressor would like to know of a buffer that it is to extract these from."""
    return cast(UsesSums, compressor).wants(tables) if _agrees(type(compressor), "extract_by_sums_", "extract_") else None


def extracted(compressor: Compressor, buffer: torch.Tensor, segments: Segments, key: Key, sums: Sums | None) -> torch.Tensor:
    """`Compressor.extract_`, of a buffer of which these `sums`, where they are still true (`Sums.of`), are known."""
    told = None if sums is None else sums.of(buffer, segments)
    if told is None:
        return compressor.extract_(buffer, segments, key)
    return cast(UsesSums, compressor).extract_by_sums_(buffer, segments, key, told)


Payloads = Sequence[tuple[torch.Tensor, Key]]
"""Each with the key that it was extracted with."""


def decode_sum_(
    out: torch.Tensor, compressor: Compressor, segments: Segments, payloads: Payloads, alpha: float = 1.0, wanted: Wanted | None = None
) -> Sums | None:
    """`out = alpha · Σ C⁻¹(payload)` in the segments' ranges of the flat `out`, whatever it held, in the order given; zeros when there are none.

    Returns what is `wanted` of `out` by these segments, where that costs no pass of its own.
    """
    done, sums = _decoded_at_once(out, compressor, segments, payloads, alpha, False, wanted)
    if done:
        return sums
    rest = iter(payloads)
    first = next(rest, None)
    if first is not None and _agrees(type(compressor), "assign_", "add_"):
        cast(Assigns, compressor).assign_(out, first[0], segments, first[1], alpha)
    else:
        segments.zero_(out)
        if first is not None:
            compressor.add_(out, first[0], segments, first[1], alpha)
    for payload, key in rest:
        compressor.add_(out, payload, segments, key, alpha)
    return None


def add_sum_(
    out: torch.Tensor, compressor: Compressor, segments: Segments, payloads: Payloads, alpha: float = 1.0, wanted: Wanted | None = None
) -> Sums | None:
    """`out += alpha · Σ C⁻¹(payload)`, the sum made first, in the order given; `out` holds the segments and nothing else. Returns what `decode_sum_`
    does."""
    if len(payloads) != 1 or alpha == 1.0:  # what one decodes to is added with one rounding, which multiplying would need before
        done, sums = _decoded_at_once(out, compressor, segments, payloads, alpha, True, wanted)
        if done:
            return sums
    if not payloads:
        out.add_(0.0)
    elif len(payloads) == 1 and alpha == 1.0:
        (payload, key), *_ = payloads
        compressor.add_(out, payload, segments, key)
    else:
        total = segments.scratch()
        decode_sum_(total, compressor, segments, payloads, alpha)
        out.add_(total)
    return None


def _decoded_at_once(
    out: torch.Tensor, compressor: Compressor, segments: Segments, payloads: Payloads, alpha: float, add: bool, wanted: Wanted | None
) -> tuple[bool, Sums | None]:
    """Whether the compressor has decoded all of them in one pass; and what was wanted of `out`."""
    if not payloads or not _agrees(type(compressor), "decode_all_", "decode_", "assign_", "add_"):
        return False, None
    sums = None if wanted is None else Sums.blank(wanted, out)
    done = cast(DecodesAll, compressor).decode_all_(out, [payload for payload, _ in payloads], segments, alpha, add=add, sums=sums)
    return done, sums if done else None


@runtime_checkable
class UnbiasedCompressor(Compressor, Protocol):
    """E C(v) = v."""

    def omega(self, d: int) -> float:
        """An upper bound of E‖C(v) − v‖²/‖v‖² over all v of `d` elements, so that δ(v) ≥ 1 − ω."""
        ...


@runtime_checkable
class Sparse(Protocol):
    """A compressor whose payloads hold few elements."""

    def places(self, payload: torch.Tensor, segments: Segments, key: Key) -> Places:
        """Where alone decoding `payload`, which was looked at by decoding it, adds something."""
        ...


def settled(feedback: Feedback) -> bool:
    """The rule's buffer is not its residual, which the exchange must settle."""
    return any(slot.settled for slot in feedback.slots(NO_SEGMENTS).values())


@runtime_checkable
class Feedback(Protocol):
    """How the error of earlier compressions is carried: the accumulate rule, and what follows an exchange.

    One that says `survives = True` can go on when a worker dies: its state does not depend on how many there are, and it sends nothing between steps.
    """

    @property
    def unit(self) -> Literal["gradient", "update"]:
        """What the buffer measures: gradients, or parameter updates (learning rate included)."""
        ...

    @property
    def takes(self) -> Takes:
        """What is done in here in place of the optimizer."""
        ...

    def check_group(self, options: Mapping[str, Any], where: str) -> None:
        """Raise `CompressionError` when the optimizer's param group (named `where`) says what this rule cannot do, or would do twice."""
        ...

    def for_dense(self) -> Feedback:
        """The rule for segments that travel uncompressed: the same mathematics with a residual that is always zero."""
        ...

    def slots(self, segments: Segments) -> Slots:
        """What is kept for these segments, by name, in the order in which it is saved; the same for all, so that `NO_SEGMENTS` tell.

        Raises `CompressionError` when the rule cannot serve the segments.
        """
        ...

    def accumulate_(self, part: Part, gradients: Sequence[torch.Tensor], ctx: StepContext) -> Accumulated:
        """The buffer to extract from is A·residual + what this step adds. Where a gradient holds an inf or NaN, state stays as it was, to rounding.

        `gradients` are in the order of the segments, of the parameters' shapes. They are read here and nowhere else before they are sent.
        """
        ...

    def undo_(self, part: Part, gradients: Sequence[torch.Tensor] | None, ctx: StepContext) -> None:
        """Reverse an `accumulate_` of finite gradients, to rounding; called after everything extracted was added back. Without `gradients`, all but
        what they added."""
        ...

    def apply_(self, part: Part, out: torch.Tensor, ctx: StepContext) -> None:
        """After the exchange, of a rule that takes the update: move x by `out`, the slot where there is one, else the parameters."""
        ...

    def shift(self, part: Part) -> tuple[torch.Tensor, float] | None:
        """(t, factor) of a rule with a slot for x, the parameters being held at x − factor·t between steps; None of another."""
        ...

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        """On all ranks, after an exchange that stands and before the update: what the ranks do together for the next one.

        Each list of tensors yielded is replaced, in place, by its mean over ranks before the generator goes on; all ranks yield alike. `parts`: all
        buckets whose rule keeps a residual; `key` has the finished step and is private to the rank.
        """
        ...

    def exchanges(self, step: int) -> bool:
        """Whether something is sent in this step. If not it is a local one: nothing is, and the parameters are shifted anew."""
        ...


@runtime_checkable
class Exchange(Protocol):
    """Who sends what to whom.

    One whose `run` yields once in all (but for what `exchange.base.added_` does) may say so by `waits_once = True`, and one that yields several times
    by `Task.last`, before it yields for the last time: buckets need not wait for each other then. One that returns what `Task.delivered`, `decoded`
    or `place` does says `delivers = True`: buckets are then formed so that this is where the mean is wanted. One that has
    `extracts(segments, size)` says by it which tables a worker extracts, and extracts those very objects: then compressors may be told sums of them.
    One that says `survives = True` can go on when a worker dies: its state depends on how many there are by the cut of a residual alone.
    """

    @property
    def approximates(self) -> bool:
        """What arrives may be less than the buffer though the compressor is lossless: something may be left on the worker with any compressor."""
        ...

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        """Raise `CompressionError` when payloads of `compressor` cannot travel this way, or what is left of them is not where `feedback` keeps it."""
        ...

    def slots(self, size: int) -> Slots:
        """What is kept, by name, over `state_segments`, with so many workers."""
        ...

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        """The (compact) table that the exchange's state is laid out by."""
        ...

    def run(self, task: Task, transport: Transport) -> Steps:
        """Extract, send, and decode the mean over ranks into `task.out`. All ranks return the same bits."""
        ...


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step of one bucket is done with. `settings`: its param group's, as they are now; where the method keeps state, η is not 0.

    `unit` is η̃, the learning rate that this step's residual is measured by: η itself, but that it never falls where the mean enters a memory
    (`Bucket.unit_for`). `previous_unit` is what residuals are measured by that are kept in gradients: η̃ of the last step in which η was not 0; `unit`
    itself where they are kept in updates, which no η changes.
    """

    seed: int
    step: int
    rank: int = 0
    size: int = 1
    settings: GroupSettings = field(default_factory=GroupSettings)
    unit: float = 1.0
    previous_unit: float = 1.0

    @property
    def carry(self) -> float:
        """What a residual, of worker or server, is multiplied by when it is added back: η̃_{t-1}/η̃_t in gradient units, 1 in update units."""
        return self.previous_unit / self.unit

    def key(self, compressor: Compressor, stage: str, rank: int | None = None) -> Key:
        """The key of `compressor` in this pass, on this rank or on another."""
        return Key(self.seed, self.step, None if compressor.shared_key else (self.rank if rank is None else rank), stage, self.size)


@dataclass
class Task:
    """One bucket's exchange in one step: what it is of, what goes in and what comes out, how it is undone, and what the exchange says of it."""

    name: str
    segments: Segments
    compressor: Compressor
    state: State
    """The exchange's."""
    ctx: StepContext
    accumulated: Accumulated
    into: Result
    reversals: Reversals
    step_size: float = 1.0
    """What the result is multiplied by when it is applied to the parameters: η in gradient units, 1 in update units."""
    applied: bool = False
    """What comes back is an update, which nobody looks at but the rule that applies it."""
    lent: Lent | None = None
    """Where the mean is wanted; an exchange that cannot decode there returns another tensor."""
    present: Sequence[bool] | None = None
    """By rank, who has gradients in this step, as all ranks have agreed; None: all have. Others send nothing of their buffers."""
    finite: Verdict = True
    """Set by the exchange: False where some rank sent an inf or NaN, the same on every rank. Where a GPU alone knows, nobody has waited for it."""
    skipped: bool = False
    """Set by the exchange when nothing came back for any segment, on every rank: x and the optimizer's state must stay as they are."""
    last: bool = False
    """Set by the exchange before it waits for the last time: no collective follows, so when it goes on is no matter of order."""
    silent: bool = False
    """Set where this worker sends nothing of its buffer in this step, which waits in its residual."""
    extracted: int = 0
    """Elements of the buffer that were extracted."""
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def buffer(self) -> torch.Tensor:
        """What is extracted from."""
        return self.accumulated.buffer

    @property
    def poisoned(self) -> bool:
        """This rank's gradients hold an inf or NaN: nothing was accumulated, and NaN is sent so that every rank learns of it. Who asks waits for a
        GPU that alone knows."""
        return not self.accumulated.finite

    @property
    def absent(self) -> bool:
        """This worker has no gradients in this step, and sends nothing."""
        return self.present is not None and not self.present[self.ctx.rank]

    def sizes(self, of_each: Sequence[int] | None) -> list[int] | None:
        """Elements of the payloads by rank, given those of each that sends; None when they cannot be known."""
        return None if of_each is None else [n if self.present is None or self.present[r] else 0 for r, n in enumerate(of_each)]

    @property
    def residual(self) -> torch.Tensor:
        """What the feedback rule keeps; usually the buffer itself."""
        return self.buffer if self.reversals.residual is None else self.reversals.residual

    @property
    def reversible(self) -> bool:
        """Something is kept, so what the exchange does to it may have to be undone."""
        return self.reversals.residual is not None

    @property
    def out(self) -> torch.Tensor:
        """As `result`."""
        return self.result()

    def extract_(self, stage: str, segments: Segments | None = None, *, travels_in_place: bool = False) -> torch.Tensor:
        """The worker's payload for `segments` (all by default). `travels_in_place`: the transport will overwrite it, so undoing needs a copy."""
        segments = self.segments if segments is None else segments
        key = self.ctx.key(self.compressor, stage)
        ahead = self._extracted_ahead(segments, key)
        tells = isinstance(self.accumulated.finite, torch.Tensor) and isinstance(self.compressor, Tells)
        if not tells and self.poisoned:
            return poison(self.compressor, segments, key)
        if self.absent:
            return constant(self.compressor, segments, key, 0.0)
        if self.compressor.lossless and not self.reversible and segments.numel == self.buffer.numel():
            payload = self.buffer  # a scratch copy of the gradients that nobody reads again: it can travel as it is
        else:
            self.extracted += segments.numel
            payload = extracted(self.compressor, self.buffer, segments, key, self.accumulated.sums) if ahead is None else ahead
            if self.reversible and not self.reversals.was_zero:
                kept = segments.scratch(payload.dtype, payload.numel()).copy_(payload) if travels_in_place else payload
                self.undo_by_adding(self.buffer, self.compressor, kept, segments, key, 1.0)
        if tells:
            self._tell(payload, segments)
        return payload

    def _extracted_ahead(self, segments: Segments, key: Key) -> torch.Tensor | None:
        """The payload, where it is made of the gradients themselves."""
        if not self.accumulated.waits or segments is not self.segments or self.absent or not _agrees(type(self.compressor), "extraction", "extract_"):
            return None
        extraction = cast(ExtractsAhead, self.compressor).extraction(segments, key)
        return extraction.payload if extraction is not None and self.accumulated.extract_(extraction) else None

    def _tell(self, payload: torch.Tensor, segments: Segments) -> None:
        """Make the payload one that decodes to NaN, where gradients were not finite: the device knows by the time that it gets there."""
        finite, compressor = self.accumulated.finite, self.compressor
        assert isinstance(finite, torch.Tensor) and isinstance(compressor, Tells)
        place, value = compressor.telltale(payload, segments)
        if self.reversible and not self.reversals.was_zero:
            self.undo_by(partial(place.copy_, place.clone()))  # before it is added back
        place.masked_fill_(~finite, value)

    def undo_by(self, reversal: Callable[[], object]) -> None:
        """Call this when the step is undone; the last one noted is called first."""
        self.reversals.note(reversal)

    def undo_by_adding(self, buffer: torch.Tensor, compressor: Compressor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float) -> None:
        """When the step is undone, `buffer += alpha · decode(payload)`. What had no finite representation on the wire never left its buffer."""

        def add() -> None:
            scratch = torch.zeros_like(buffer)
            compressor.add_(scratch, payload, segments, key, alpha)
            buffer.add_(scratch.nan_to_num_(0.0, 0.0, 0.0))

        self.undo_by(add)

    def result(self) -> torch.Tensor:
        """The tensor to decode into; it holds anything. Gradients may live in it (Horovod), so ask for it once nothing reads them any more."""
        self.accumulated.settle()
        self.into.touched = None
        return self.into.buffer

    def place(self) -> tuple[torch.Tensor, Segments]:
        """(tensor, where its segments are) to decode into at once, as the last thing that an exchange does; it holds anything. It is memory that is
        lent, if that may be overwritten, or the result."""
        lent = self.lent
        return (self.result(), self.segments) if lent is None or not lent.at_once else (lent.memory, lent.table(self.segments))

    def delivered(self, parts: Sequence[tuple[Compressor, Segments, Sequence[tuple[torch.Tensor, Key]]]], alpha: float = 1.0) -> torch.Tensor:
        """The result, which each of the parts (tables of segments that have nothing in common) makes up by alpha · Σ C⁻¹(payload).

        The last thing that an exchange does: in memory that is lent it is written when the step is known to stand.
        """
        lent = self.lent
        if lent is None:
            out = self.result()
            for compressor, table, payloads in parts:
                decode_sum_(out, compressor, table, payloads, alpha)
            return out
        self.accumulated.settle()
        for compressor, table, payloads in parts:
            lent.write(partial(decode_sum_, lent.memory, compressor, lent.table(table), payloads, alpha))
        return lent.memory

    def decoded(self, payloads: Sequence[tuple[torch.Tensor, Key]], alpha: float) -> torch.Tensor:
        """The result: alpha · Σ C⁻¹(payload), each with the key that it was extracted with, in the order given.

        Of an update that is sparse it is noted where it is, so that applying it, and zeros for the next one, cost no more than that.
        """
        into, compressor = self.into, self.compressor
        if not (self.applied and isinstance(compressor, Sparse)):
            return self.delivered([(compressor, self.segments, payloads)], alpha)
        if not into.is_zero:
            into.buffer.zero_()
        into.touched = None
        for payload, key in payloads:
            compressor.add_(into.buffer, payload, self.segments, key, alpha)
        into.touched = [compressor.places(payload, self.segments, key) for payload, key in payloads]
        return into.buffer


def constant(compressor: Compressor, segments: Segments, key: Key, value: float) -> torch.Tensor:
    """The payload of a vector whose elements are all `value`."""
    compact = segments.compact
    scratch = torch.full((compact.numel,), value, dtype=compact.dtype, device=compact.device)
    return compressor.extract_(scratch, compact, key)


def poison(compressor: Compressor, segments: Segments, key: Key) -> torch.Tensor:
    """A payload that decodes to NaN."""
    return constant(compressor, segments, key, float("nan"))
