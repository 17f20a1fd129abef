"""What compressors, feedback rules and exchanges pass to each other: state and its slots, settings, parts of the model, and what was counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from .segments import Segments
from .verdicts import Verdict

__all__ = [
    "Accumulated",
    "Decoding",
    "Extraction",
    "GroupSettings",
    "Lent",
    "NO_SEGMENTS",
    "Part",
    "Places",
    "Result",
    "Reversals",
    "Role",
    "Slot",
    "Slots",
    "State",
    "Sums",
    "Takes",
    "Traffic",
    "Wanted",
    "slot_of",
    "zeros",
]

State = dict[str, torch.Tensor]
"""Slot name → flat tensor, whose element i belongs to element i of the segments the state was made for; or a matrix, whose row i belongs to
segment i (counters)."""

NO_SEGMENTS = Segments(())
"""For asking which slots there are."""


@dataclass(frozen=True, slots=True)
class Places:
    """`counts[i]` positions (int32, ascending, no two alike) within each segment, one segment after the other."""

    counts: np.ndarray
    positions: torch.Tensor


class Result:
    """A buffer that results are decoded into: where alone it is not zero, and whether somebody still refers to what was handed out of it: to a
    storage over its memory, which is not its own."""

    def __init__(self, buffer: torch.Tensor | None = None, make: Callable[[], torch.Tensor] | None = None) -> None:
        """Without a `buffer`, `make` makes it when it is asked for: who decodes into `Lent` memory needs none."""
        self._buffer, self._make = buffer, make
        self.touched: list[Places] | None = None
        """Where alone it is not zero; None: anywhere, []: nowhere. Who moves what is there away takes the places out."""
        self.lent: StorageWeakRef | None = None

    @property
    def buffer(self) -> torch.Tensor:
        if self._buffer is None:
            assert self._make is not None
            self._buffer = self._make()
        return self._buffer

    @property
    def is_zero(self) -> bool:
        return self.touched == []

    @property
    def free(self) -> bool:
        return self.lent is None or bool(self.lent.expired())  # type: ignore[no-untyped-call]

    def hand_out(self, out: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
        """`out`, which is the buffer unless an exchange has returned another one, by parameter, in their shapes and without a copy, for anybody to
        keep. Each is a tensor of its own: it is saved and detached in place as one, and the buffer is not written to again while one of them, or what
        shares its memory, lives."""
        lent = from_dlpack(to_dlpack(out))
        if out is self.buffer:
            self.lent = StorageWeakRef(lent.untyped_storage())  # type: ignore[no-untyped-call]
        return [from_dlpack(to_dlpack(view)) for view in segments.shaped_views(lent)]


class Lent:
    """Somebody else's flat `memory`, in which the gradients are and where the mean is wanted: what is decoded goes there in place of a `Result`.

    Gradients are asked for again where a step is undone, so they are overwritten by `settle` alone, once it is known to stand; `at_once` where
    nobody would ask, or `again` gives the same ones as they were handed over. `shifts`: by segment, how much later it begins in this memory than in
    the bucket's own layout; None: that is the layout. `arrived`: called when the mean is there, if that is before the step is known to stand.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        shifts: tuple[int, ...] | None = None,
        again: Callable[[], Sequence[torch.Tensor]] | None = None,
        arrived: Callable[[], object] = lambda: None,
    ) -> None:
        self.memory, self._shifts, self.again, self.arrived = memory, shifts, again, arrived
        self.at_once = again is not None
        self._held: list[Callable[[], object]] = []

    @property
    def flat(self) -> torch.Tensor | None:
        """The memory, where it holds the gradients as the bucket's segments are laid out and nothing else."""
        return self.memory if self._shifts is None else None

    def table(self, segments: Segments) -> Segments:
        """The bucket's segments, or pieces of them, where they are in this memory."""
        return segments if self._shifts is None else segments.moved(self._shifts)

    def write(self, write: Callable[[], object]) -> None:
        """Call `write` when the gradients may be overwritten."""
        if self.at_once:
            write()
        else:
            self._held.append(write)

    def settle(self) -> None:
        """The step stands."""
        held, self._held = self._held, []
        for write in held:
            write()


class Role(Enum):
    """What those who save, undo, carry over and resize state must know of a slot, and who know no method."""

    RESIDUAL = auto()
    """What was not sent yet, in the rule's unit: of a rule, this worker's; of an exchange, this server's. At most one of each."""
    POINT = auto()
    """x, equal on all ranks, of a rule that takes gradients at another point. Only a step that stands moves it. At most one."""
    MEMORY = auto()
    """Of the means that came back, equal on all ranks. It is multiplied by every later learning rate. At most one."""
    OWN = auto()
    """What the rule or the exchange keeps for itself."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What is kept under a name, beginning with zeros."""

    role: Role = Role.OWN
    settled: bool = False
    """Of a rule's residual: the buffer is another tensor, and the exchange adds what is left in it."""
    columns: int = 0
    """0: one element for each of the table, of its type and device. Otherwise a matrix of `dtype` on the CPU, a row for each segment: counters."""
    dtype: torch.dtype = torch.float64


Slots = Mapping[str, Slot]


def zeros(slots: Slots, table: Segments) -> State:
    """State to begin with, from its declaration: the one place that allocates it."""
    counters = {name: torch.zeros((len(table), s.columns), dtype=s.dtype, device="cpu") for name, s in slots.items() if s.columns}
    return {name: counters[name] if name in counters else table.zeros() for name in slots}


def slot_of(slots: Slots, role: Role) -> str | None:
    """The name of the slot with this role, if there is one."""
    return next((name for name, slot in slots.items() if slot.role is role), None)


class Takes(Enum):
    """What a feedback rule takes over from the optimizer behind it."""

    NOTHING = "nothing"
    LEARNING_RATE = "learning rate"
    """The rule uses η itself, and not only how it changes; the optimizer applies the mean."""
    MOMENTUM = "momentum"
    """The rule has momentum and weight decay of its own; the optimizer applies the mean, without any."""
    UPDATE = "update"
    """The rule moves the parameters itself, with the settings of SGD's param group."""

    @property
    def learning_rate(self) -> bool:
        """η must be known: an optimizer that has one must be attached on an unmodified Horovod, and what is averaged must not be summed."""
        return self in (Takes.LEARNING_RATE, Takes.UPDATE)

    @property
    def momentum(self) -> bool:
        """Momentum and weight decay are the rule's, so an optimizer that went on to apply its own would do it twice."""
        return self in (Takes.MOMENTUM, Takes.UPDATE)

    @property
    def update(self) -> bool:
        """The parameters are moved by the rule, and the optimizer must not move them."""
        return self is Takes.UPDATE


@dataclass(frozen=True)
class GroupSettings:
    """A param group's hyper-parameters in this step."""

    lr: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    loss_scale: float = 1.0
    remembers: bool = True
    """What the optimizer is given enters a memory of its own. Only of SGD without momentum it is known that none does."""
    wrong: str = field(default="", repr=False, compare=False)
    """What no step can be taken with, such as "param group 0 of SGD has lr=nan"; empty when all is well."""

    @staticmethod
    def of(group: Mapping[str, Any], loss_scale: float = 1.0, where: str = "the param group", needs_learning_rate: bool = False) -> GroupSettings:
        """Those of an optimizer's param group, named `where`. What it does not have, or what is not one number, is 0, and the learning rate is 1.

        Nothing is raised for numbers that no step can be taken with, since other ranks may have other ones; see `wrong`.
        """
        numbers = {option: _number(group.get(option)) for option in ("lr", "momentum", "weight_decay")}
        bad = [option for option, number in numbers.items() if number is not None and not math.isfinite(number)]
        lr = numbers["lr"]
        if needs_learning_rate if lr is None else lr < 0:
            bad.append("lr")
        return GroupSettings(
            1.0 if lr is None else lr,
            numbers["momentum"] or 0.0,
            numbers["weight_decay"] or 0.0,
            bool(group.get("nesterov", False)),
            loss_scale,
            numbers["momentum"] != 0 or "dampening" not in group,
            f"{where} has {bad[0]}={group.get(bad[0])!r}" if bad else "",
        )


def _number(value: Any) -> float | None:
    """A hyper-parameter that is one number, or a tensor of one; None of anything else."""
    if value is None or isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


@dataclass(frozen=True)
class Wanted:
    """What a compressor would like to know of the buffer that it is given: for each segment of each of the `tables` the sum of magnitudes, or of
    their `squares`, and with `counts` how many are not zero. Whoever writes the buffer may tell it in the same pass. The tables share no element."""

    tables: tuple[Segments, ...]
    squares: bool = False
    counts: bool = False

    @cached_property
    def ranges(self) -> np.ndarray:
        """A row for each segment of each table, one table after the other: start and numel in the buffer (int64)."""
        return np.concatenate([table.ranges for table in self.tables])


@dataclass(frozen=True, slots=True)
class Sums:
    """The answer, of a buffer that was not written to since its `version`: `totals` (float64) and `nonzero` (int64), a row as in `Wanted.ranges`."""

    wanted: Wanted
    version: int
    totals: np.ndarray
    nonzero: np.ndarray

    @staticmethod
    def blank(wanted: Wanted, buffer: torch.Tensor) -> Sums:
        """To be written by a kernel, in the pass that writes `buffer`."""
        rows = len(wanted.ranges)
        return Sums(wanted, buffer._version, np.empty(rows, np.float64), np.zeros(rows, np.int64))

    def of(self, buffer: torch.Tensor, segments: Segments) -> Sums | None:
        """Of one of the tables alone, that very object; None of another, or where `buffer` was written to since, but by compressors' kernels."""
        if buffer._version != self.version:
            return None
        at = 0
        for table in self.wanted.tables:
            if table is segments:
                rows = slice(at, at + len(table))
                return Sums(Wanted((table,), self.wanted.squares, self.wanted.counts), self.version, self.totals[rows], self.nonzero[rows])
            at += len(table)
        return None


@dataclass(frozen=True, slots=True)
class Part:
    """One bucket, as a feedback rule sees it. `lossless`: it travels uncompressed, so its residual is zero after an exchange.
    `zero_learning_rate`: it was 0 in the step before, in which its parameters and state stayed as they are. `touched`: as in `Result`.
    `wanted`: what the compressor would like to know of the buffer that is accumulated. `flat`: the gradients themselves, one after the other, in
    memory that may be written to, where the compressor sends all of them and so tells by itself of an inf or NaN."""

    state: State
    parameters: Sequence[torch.Tensor]
    segments: Segments
    lossless: bool = False
    zero_learning_rate: bool = False
    touched: list[Places] | None = None
    wanted: Wanted | None = None
    flat: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a compressor's compiled `kernel` takes of gradients, part by part: where its `payload` goes, and what else the kernel is told."""

    kernel: Literal["cast", "qsgd"]
    payload: torch.Tensor
    arguments: tuple[float | np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Decoding:
    """The compiled `kernel` that decodes a compressor's payloads, several of them in one pass, and what it is told of their form."""

    kernel: Literal["sign", "ternary", "qsgd", "natural"]
    settings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Accumulated:
    """What reading the gradients once gives: the flat `buffer` to extract from, and whether all of them were `finite`; if not, nothing was
    accumulated, and there is no buffer. Where a GPU alone knows, there is one, of which what is extracted must not be used.
    `sums`: what was wanted of it, where it was seen in the same pass."""

    buffer: torch.Tensor
    finite: Verdict = True
    sums: Sums | None = None

    @property
    def waits(self) -> bool:
        """The gradients were not read so far: they are when somebody looks at what is asked for here, or by `settle` or `extract_`."""
        return False

    def settle(self) -> None:
        """Read the gradients now, where that has waited."""

    def extract_(self, extraction: Extraction) -> bool:
        """Extract from gradients that wait. False where that cannot be, or some gradient holds an inf or NaN (`finite` tells)."""
        return False

    @staticmethod
    def nothing(segments: Segments) -> Accumulated:
        """Of gradients that are not finite: a step that all ranks will undo."""
        return Accumulated(torch.empty(0, dtype=segments.dtype, device=segments.device), finite=False)


class Reversals:
    """How what a step does to state is undone, in the opposite order: by what is noted here.

    `residual`: what the feedback rule keeps, usually the buffer that is extracted from; None where it keeps nothing, and nothing need be put back.
    `was_zero`: it was zero before, and will be: undoing the extraction is setting it to zero.
    """

    def __init__(self, residual: torch.Tensor | None, was_zero: bool = False) -> None:
        self.residual, self.was_zero = residual, was_zero
        self._noted: list[Callable[[], object]] = []

    def note(self, reversal: Callable[[], object]) -> None:
        self._noted.append(reversal)

    def run(self) -> None:
        """Put everything back that was noted, to rounding."""
        while self._noted:
            self._noted.pop()()

    def forget(self) -> None:
        """The step stands: let go of the payloads kept for undoing it."""
        self._noted.clear()


@dataclass
class Traffic:
    """Bytes of one worker, counted where they are handed to the transport.

    `payload`: what this worker contributes. `sent`: what leaves this worker when the collective is bandwidth-optimal (all-reduce: ring,
    2·(n-1)/n of the payload; all-gather: n-1 copies; all-to-all: all pieces but its own). `dense`: what an uncompressed ring all-reduce of the
    same gradients would send. `skipped`: payload that was not sent because worker or server stayed silent.
    """

    payload: int = 0
    sent: int = 0
    dense: int = 0
    skipped: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.payload += other.payload
        self.sent += other.sent
        self.dense += other.dense
        self.skipped += other.skipped
        return self

    @property
    def ratio(self) -> float:
        """Bytes a dense exchange would have sent ÷ bytes sent; with one worker (nothing is sent), 1."""
        return self.dense / self.sent if self.sent else 1.0
