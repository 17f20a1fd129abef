"""Gradients are handed over: counted as backward passes bring them, and submitted to the exchange bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.gradients import clip_factor, take_
from ..core.guard import Guard
from ..core.state import NamedParameters
from .backward import BackwardTimer
from .executor import Observer
from .gradients import gradients_of
from .hooks import GradientHooks
from .step import StepExchange

__all__ = ["HandOver"]


class HandOver:
    """Of the gradients of `named` to the exchange `step`. `overlap`: while the backward pass goes on.

    All of it happens in the script's thread: unscaling, clipping, and the note that the guard takes. `came` is called with the parameter for each
    gradient, and calls `count`, or raises; see `GradientHooks`.
    """

    def __init__(
        self,
        step: StepExchange,
        named: NamedParameters,
        passes: int,
        came: Callable[[torch.nn.Parameter], None],
        overlap: bool,
        observer: Observer | None,
    ) -> None:
        self._step, self._state = step, step.aggregator.state
        self.guard = Guard(self._state.method.feedback)
        self.hooks = GradientHooks(named, self._state.buckets, passes, came)
        self._timer = BackwardTimer(observer)
        self._overlap = overlap

    @property
    def begun(self) -> bool:
        """Gradients of a step have come that was not exchanged yet."""
        return self.hooks.listens and (self._step.begun or self.hooks.begun)

    @property
    def lost(self) -> bool:
        """Half of a step's gradients are here, and the other ranks can still be told by what has not been sent."""
        return self._step.next_bucket is not None and self.hooks.lost()

    def count(self, parameter: torch.nn.Parameter) -> None:
        """A gradient has come; buckets that it completes are submitted. Raises `SequenceError` when it is one too many."""
        complete = self.hooks.count(parameter)
        self._step.begin()
        if complete:
            self._timer.start()
            if self._overlap and self._state.method.clip_norm is None:
                self._submit_complete()

    def _submit_complete(self) -> None:
        """In order, because every rank must start the same collectives in the same order."""
        while (bucket := self._step.next_bucket) is not None and self.hooks.release(bucket):
            self._submit(gradients_of(bucket), 1.0)
            if bucket.decays_where_it_is(self._state.settings(bucket)):  # the script goes on
                self.guard.note_read([(n, p) for n, p in zip(bucket.segments.names, bucket.parameters) if p.requires_grad])

    def submit_rest(self, lost: bool) -> None:
        """All that was not submitted. `lost`: with NaN in place of the gradients, so that all ranks undo the step."""
        clips = self._state.method.clip_norm is not None and not lost
        all_of = {id(b): gradients_of(b) for b in self._state.buckets} if clips else {}
        factor = clip_factor(self._state, [g for gradients in all_of.values() for g in gradients])
        while (bucket := self._step.next_bucket) is not None:
            if lost:
                self._step.submit([torch.full_like(p, float("nan")) for p in bucket.parameters])
            else:
                self._submit(all_of[id(bucket)] if clips else gradients_of(bucket), factor)

    def _submit(self, gradients: list[torch.Tensor], factor: float) -> None:
        """Hand over the next bucket."""
        bucket = self._step.next_bucket
        assert bucket is not None
        taken = take_(self._state, bucket, gradients, factor)
        if not self._step.begun:
            self.guard.forget()  # of a step that ended in an error
        self.guard.note(list(zip(bucket.segments.names, bucket.parameters)))
        self._step.submit(taken)

    def reset(self) -> None:
        """All of the step was submitted: the next gradient is one of the next step."""
        self.hooks.reset()
        self._timer.reset()
