"""What scripts must not do to gradients that were handed over: whatever they write there is lost, so it is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CompressionError, SequenceError

__all__ = ["Guard", "Noted"]

_SAMPLE = 64
"""Elements of each gradient that are compared in every step."""

_FIRST, _EVERY = 3, 256
"""All elements are compared in so many first steps, and in every so many-th later: who clips does so from the beginning."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Noted:
    """Gradients as they were when they were handed over; all of one device.

    Version counters and places in memory tell of most writes. Those through `.data` or NumPy raise no counter; contents tell of them.
    """

    named: Sequence[tuple[str, torch.Tensor]]
    """Parameters that have a gradient."""
    gradients: list[torch.Tensor]
    versions: list[int]
    places: list[int]
    sample: torch.Tensor
    """Of each gradient up to `_SAMPLE` elements, evenly spaced, one gradient after the other."""
    sums: torch.Tensor | None
    """Of all bits of each gradient, as whole numbers, which no order of summation changes; None where only the sample is compared."""

    @staticmethod
    def of(named: Sequence[tuple[str, torch.Tensor]], everything: bool) -> Noted | None:
        """None when no parameter has a gradient."""
        named = [(name, p) for name, p in named if p.grad is not None]
        gradients = [p.grad for _, p in named if p.grad is not None]
        if not gradients:
            return None
        flat = [_flat(g) for g in gradients]
        sums = _sums(flat) if everything else None
        return Noted(named, gradients, [g._version for g in gradients], [f.data_ptr() for f in flat], _sample(flat), sums)

    def changed(self, factors: Sequence[float] = (1.0,), replaced: bool = True) -> str | None:
        """The name of the first parameter whose gradient was changed, by other than a multiplication by one of `factors`.

        `replaced`: another tensor in its place, or none, counts too.
        """
        flat = [_flat(g) for g in self.gradients]
        steps = 0 if len(factors) == 1 else 1  # a multiplication may count as a write
        for (name, parameter), gradient, version, values, place in zip(self.named, self.gradients, self.versions, flat, self.places, strict=True):
            if gradient._version - version > steps or values.data_ptr() != place or (replaced and parameter.grad is not gradient):
                return name
        now = _sample(flat)
        if any(torch.equal(now.nan_to_num(), (self.sample * f).nan_to_num()) for f in factors):
            if self.sums is None or len(factors) > 1 or torch.equal(_sums(flat), self.sums):
                return None
            return self.named[int((_sums(flat) != self.sums).nonzero()[0])][0]
        parts = [min(_SAMPLE, f.numel()) for f in flat]
        for (name, _), a, b in zip(self.named, torch.split(now, parts), torch.split(self.sample, parts), strict=True):
            if not any(torch.equal(a.nan_to_num(), (b * f).nan_to_num()) for f in factors):
                return name
        return None


class Guard:
    """Of one method (`feedback`, which may apply the update): gradients changed after their exchange had started, or after it had ended where the
    method moves the parameters itself, would be ignored without a word: the checks raise."""

    def __init__(self, feedback: Any) -> None:
        self._feedback = feedback
        self._noted: list[Noted] = []
        self._steps = 0
        self._added_to = ""

    def note(self, named: Sequence[tuple[str, torch.Tensor]]) -> Noted | None:
        """The gradients of these are handed over now. To be called where the script cannot come in between."""
        noted = Noted.of(named, self._steps < _FIRST or self._steps % _EVERY == 0)
        if noted is not None:
            self._noted.append(noted)
        return noted

    def forget(self) -> None:
        """The step is over."""
        self._steps += bool(self._noted)
        self._noted, self._added_to = [], ""

    def mean_is_spoilt(self, name: str) -> None:
        """A further backward pass has added to this parameter's gradient, which is the mean that was exchanged; that pass raises."""
        self._added_to = self._added_to or name

    def check_mean_is_whole(self) -> None:
        """Raise `SequenceError` where it is not: a script may have caught what the pass raised, and each rank would apply something else."""
        if self._added_to:
            raise SequenceError(
                f"the gradient of parameter '{self._added_to}' holds the mean of this step and, on top of it, what a further backward pass has added "
                "on this rank alone, so it cannot be applied. Throw the step away by optimizer.discard() (an unmodified Horovod: "
                "compression.discard()), on every rank."
            )

    def check_in_flight(self, factors: Sequence[float] = (1.0,), replaced: bool = True) -> None:
        """Raise `CompressionError` that names the parameter when a gradient was changed since it was handed over. Arguments as in `Noted.changed`."""
        for noted in self._noted:
            if (name := noted.changed(factors, replaced)) is None:
                continue
            self.forget()  # an error once
            remedy = "To clip this worker's gradient, give the method clip_norm=… or clip_value=…; it takes no change of the mean."
            if not self._feedback.takes.update:
                remedy = (
                    "Change gradients (clipping, scaler.unscale_) after optimizer.synchronize(), then step inside `with "
                    "optimizer.skip_synchronize():`; or give the method clip_norm=… or clip_value=…, which clip this worker's gradient before it "
                    "is sent."
                )
            raise CompressionError(
                f"the gradient of parameter '{name}' was changed after its exchange had started in the backward pass, so the change would be lost. "
                f"{remedy} With a GradScaler: optimizer.synchronize(); scaler.unscale_(optimizer); with optimizer.skip_synchronize(): "
                "scaler.step(optimizer). If it was a second backward pass, raise backward_passes_per_step."
            )

    def check_exchanged(self, factors: Sequence[float] = (1.0,)) -> None:
        """Likewise of a method that applies the update, before it does so."""
        for noted in self._noted:
            if (name := noted.changed(factors)) is not None:
                self.forget()
                raise CompressionError(
                    f"the gradient of parameter '{name}' was changed after it had been exchanged, but {self._feedback} moves the parameters by what "
                    "was exchanged, and the change would be lost. Clip inside the method (clip_norm=… or clip_value=… of the preset), scale the "
                    "loss, or use a method in gradient units, whose mean can be clipped after synchronize()."
                )


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    """All elements in the order of memory, without a copy where they are dense there."""
    values = (gradient._values() if gradient.is_sparse else gradient).detach()
    if not values.is_contiguous():
        values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    return values.reshape(-1)


def _sample(flat: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([f if f.numel() <= _SAMPLE else f[:: f.numel() // _SAMPLE][:_SAMPLE] for f in flat])


def _sums(flat: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([f.view(_BITS[f.element_size()]).sum(dtype=torch.int64) for f in flat])
