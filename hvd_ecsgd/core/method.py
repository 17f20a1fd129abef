"""What is done: a compressor, a feedback rule and an exchange, and what is sent without compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch

from ..arguments import check_flag, check_integer, check_number
from ..compressors import Identity
from ..errors import CompressionError
from ..exchange import AllReduce
from ..protocols import NO_SEGMENTS, Compressor, Exchange, Feedback, Role, slot_of
from .schedule import at_step, check_ratios

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """An algorithm: compressor × feedback × exchange, and what is sent without compression.

    Parameters with fewer than `dense_below` elements, and with `dense_1d` those with one dimension (biases, norms), travel uncompressed. So does
    everything in the first `warmup_steps` steps. `ratio_schedule`, (step, ratio) pairs, changes the compressor's ratio from these steps on.
    """

    compressor: Compressor
    feedback: Feedback
    exchange: Exchange
    dense_below: int = 1024
    dense_1d: bool = True
    seed: int = 0
    warmup_steps: int = 0
    ratio_schedule: Sequence[tuple[int, float]] = ()
    exact: bool = field(default=False, repr=False)
    """Keep a copy of the state during each step, so that undoing one restores it bit for bit. No part of what a saved state belongs to."""
    verify_every: int = field(default=0, repr=False)
    """Compare x across ranks before every so many-th step; 0: never. No part of what a saved state belongs to."""
    clip_norm: float | None = None
    """This worker's gradient of the whole model is scaled down to this norm before it is accumulated."""
    clip_value: float | None = None
    """This worker's gradient is clamped to ± this before it is accumulated."""

    def __post_init__(self) -> None:
        for role, part, protocol in (
            ("compressor", self.compressor, Compressor),
            ("feedback", self.feedback, Feedback),
            ("exchange", self.exchange, Exchange),
        ):
            if isinstance(part, type) or not isinstance(part, protocol):  # a class has the attributes too
                raise CompressionError(f"{role}: expected an instance of a {role} class of hvd_ecsgd, got {part!r}.")
        self.exchange.check(self.compressor, self.feedback)
        if Role.RESIDUAL in self.slot_names:
            self.compressor.check_feedback()
        check_integer(self.seed, "seed", "an integer (the same on every rank)")
        check_flag(self.dense_1d, "dense_1d")
        check_integer(self.verify_every, "verify_every", "a number of steps, or 0 for never", least=0)
        check_flag(self.exact, "exact")
        check_integer(self.dense_below, "dense_below", "a number of elements ≥ 0", least=0)
        check_integer(self.warmup_steps, "warmup_steps", "a number of steps ≥ 0", least=0)
        for option, clip in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if clip is not None:
                check_number(clip, option, "a finite number > 0, or None for no clipping", lambda clip: clip > 0)
        object.__setattr__(self, "ratio_schedule", check_ratios(self.compressor, self.ratio_schedule, self.warmup_steps))

    def settings(self) -> dict[str, str]:
        """What saved state belongs to, by name as text. What came later than the first of them is named only where it is used, so that older ones
        fit."""
        told = [f.name for f in fields(self) if f.repr and not (f.name.startswith("clip_") and getattr(self, f.name) is None)]
        return {name: repr(getattr(self, name)) for name in told}

    def __repr__(self) -> str:
        return f"Method({', '.join(f'{name}={value}' for name, value in self.settings().items())})"

    @cached_property
    def text(self) -> str:
        """Its repr, which is asked for in every step."""
        return repr(self)

    @property
    def sends_all_alike(self) -> bool:
        """Small and one-dimensional parameters travel as all others do."""
        dense = self.dense()
        return (self.compressor, self.feedback, self.exchange) == (dense.compressor, dense.feedback, dense.exchange)

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None or self.clip_value is not None

    def is_dense(self, parameter: torch.Tensor) -> bool:
        return parameter.numel() < self.dense_below or (self.dense_1d and parameter.dim() <= 1)

    @cached_property
    def slot_names(self) -> Mapping[Role, str]:
        """What the feedback rule's slots are called, of those roles that are had once."""
        slots = self.feedback.slots(NO_SEGMENTS)
        return {role: name for role in (Role.RESIDUAL, Role.POINT, Role.MEMORY) if (name := slot_of(slots, role)) is not None}

    @cached_property
    def server_slot(self) -> str | None:
        """What the exchange's residual is called, if it keeps one."""
        return slot_of(self.exchange.slots(1), Role.RESIDUAL)

    @property
    def lossless(self) -> bool:
        """Workers' residuals are zero after every exchange, of rules whose buffer is the residual."""
        return self.compressor.lossless and not self.exchange.approximates

    @cached_property
    def stateful(self) -> bool:
        """Something is carried from step to step: residuals, momentum, or what the exchange keeps."""
        return bool(self.feedback.slots(NO_SEGMENTS)) or bool(self.exchange.slots(1))

    def at(self, step: int) -> tuple[Compressor, Exchange]:
        """What compresses and exchanges in this step."""
        if step < self.warmup_steps:
            return Identity(), AllReduce()
        return at_step(self.compressor, self.ratio_schedule, step), self.exchange

    def switched(self, new: Method) -> Method:
        """`new` as what this method goes on as: with this one's `dense_below`, `dense_1d` and `seed`. Raises unless its feedback can take over."""
        old, rule = self.feedback, new.feedback
        begins = not old.slots(NO_SEGMENTS) and not (old.takes.momentum or rule.takes.momentum) and old.unit == rule.unit
        begins = begins and old.for_dense() == rule.for_dense()
        if rule != old and not begins:
            remedy = f" To send uncompressed, switch to Compression(Identity(), {old}, AllReduce()), which loses nothing."
            remedy = "" if Role.RESIDUAL in new.slot_names else remedy
            raise CompressionError(f"switch(): expected the feedback rule that the residuals were made with, {old}, got {rule}.{remedy}")
        return replace(new, dense_below=self.dense_below, dense_1d=self.dense_1d, seed=self.seed, exact=self.exact, verify_every=self.verify_every)

    def dense(self) -> Method:
        return Method(Identity(), self.feedback.for_dense(), AllReduce(), self.dense_below, self.dense_1d, self.seed, exact=self.exact)
