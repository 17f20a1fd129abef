"""What scripts must not do to gradients that were handed over, and to parameters that are read with them: an error, as a thread may be reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CompressionError, SequenceError
from ..verdicts import Verdict, all_of, known

__all__ = ["Guard", "Noted"]

_SAMPLE = 64
"""Elements of each gradient that are compared in every step."""

_FIRST, _EVERY = 3, 256
"""All elements are compared in so many first steps, and in every so many-th later: who clips does so from the beginning."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Noted:
    """Gradients, or parameters, as they were when gradients were handed over; all of one device.

    Version counters and places in memory tell of most writes. Those through `.data` or NumPy raise no counter; contents tell of them.
    """

    named: Sequence[tuple[str, torch.Tensor]]
    """Parameters that have a gradient."""
    gradients: Sequence[torch.Tensor]
    """Theirs; or the parameters themselves."""
    versions: list[int]
    places: list[int]
    views: list[torch.Tensor | None]
    """Of each gradient the elements that are sampled, which are looked at again; None where they cannot be had without a copy."""
    sample: torch.Tensor
    """Copies of them, one gradient after the other."""
    sums: torch.Tensor | None
    """Of all bits of each gradient, as whole numbers, which no order of summation changes; None where only the sample is compared."""

    @staticmethod
    def of(named: Sequence[tuple[str, torch.Tensor]], everything: bool) -> Noted | None:
        """None when no parameter has a gradient."""
        held = [(pair, g) for pair in named if (g := pair[1].grad) is not None]
        return Noted._now([pair for pair, _ in held], [g for _, g in held], everything) if held else None

    @staticmethod
    def of_parameters(named: Sequence[tuple[str, torch.Tensor]], everything: bool) -> Noted:
        return Noted._now(named, [p for _, p in named], everything)

    @staticmethod
    def _now(named: Sequence[tuple[str, torch.Tensor]], tensors: Sequence[torch.Tensor], everything: bool) -> Noted:
        views = [_view(t) for t in tensors]
        sums = _sums(tensors) if everything else None
        return Noted(named, tensors, [t._version for t in tensors], [_place(t) for t in tensors], views, _sample(views, tensors), sums)

    def unchanged(self) -> Verdict:
        """Whether nothing was, as far as `changed` without factors tells in the usual case."""
        looked_at = zip(self.named, self.gradients, self.versions, self.places, strict=True)
        if any(g._version != version or _place(g) != place or p.grad is not g for (_, p), g, version, place in looked_at):
            return False
        sample = _same(_sample(self.views, self.gradients), self.sample)
        return sample if self.sums is None else all_of([sample, _same(_sums(self.gradients), self.sums)])

    def changed(self, factors: Sequence[float] = (1.0,), replaced: bool = True) -> str | None:
        """The name of the first parameter whose gradient was changed, by other than a multiplication by one of `factors`.

        `replaced`: another tensor in its place, or none, counts too.
        """
        steps = 0 if len(factors) == 1 else 1  # a multiplication may count as a write
        for (name, parameter), gradient, version, place in zip(self.named, self.gradients, self.versions, self.places, strict=True):
            if gradient._version - version > steps or _place(gradient) != place or (replaced and parameter.grad is not gradient):
                return name
        now = _sample(self.views, self.gradients)
        if any(_is(now, self.sample, f) for f in factors):
            if self.sums is None or len(factors) > 1 or torch.equal(sums := _sums(self.gradients), self.sums):
                return None
            return self.named[int((sums != self.sums).nonzero()[0])][0]
        parts = [min(_SAMPLE, _values(g).numel()) for g in self.gradients]
        for (name, _), a, b in zip(self.named, torch.split(now, parts), torch.split(self.sample, parts), strict=True):
            if not any(_is(a, b, f) for f in factors):
                return name
        return None


class Guard:
    """Of one method (`feedback`, which may apply the update): gradients changed after their exchange had started, or after it had ended where the
    method moves the parameters itself, would be ignored without a word: the checks raise."""

    def __init__(self, feedback: Any) -> None:
        self._feedback = feedback
        self._noted: list[Noted] = []
        self._read: list[Noted] = []
        self._steps = 0
        self._added_to = ""

    def note(self, named: Sequence[tuple[str, torch.Tensor]]) -> Noted | None:
        """The gradients of these are handed over now. To be called where the script cannot come in between."""
        noted = Noted.of(named, self._everything)
        if noted is not None:
            self._noted.append(noted)
        return noted

    @property
    def _everything(self) -> bool:
        return self._steps < _FIRST or self._steps % _EVERY == 0

    def note_read(self, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """These parameters are read from now on, perhaps in a thread, until `check_read`: weight decay is taken of them."""
        if named:
            self._read.append(Noted.of_parameters(named, self._everything))

    def check_read(self) -> None:
        """Nothing reads parameters any more. Raise `CompressionError` that names one which was written to while it was noted."""
        read, self._read = self._read, []
        for noted in read:
            if (name := noted.changed(replaced=False)) is not None:
                self.forget()  # an error once
                raise CompressionError(
                    f"parameter '{name}' was written to between its backward pass and step(), while {self._feedback} was taking weight decay of it, "
                    "perhaps in another thread, so it may have seen the change or not. Write to parameters before the backward pass, after step() or "
                    "inside `with compression.at('averaged'):`; or make the optimizer with overlap=False (MPI_BACKEND_OVERLAP=0), so that decay is "
                    "taken in step()."
                )

    def forget(self) -> None:
        """The step is over."""
        self._steps += bool(self._noted)
        self._noted, self._read, self._added_to = [], [], ""

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
        if known(noted.unchanged() for noted in self._noted):
            return
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
        if known(noted.unchanged() for noted in self._noted):
            return
        for noted in self._noted:
            if (name := noted.changed(factors)) is not None:
                self.forget()
                raise CompressionError(
                    f"the gradient of parameter '{name}' was changed after it had been exchanged, but {self._feedback} moves the parameters by what "
                    "was exchanged, and the change would be lost. Clip inside the method (clip_norm=… or clip_value=… of the preset), scale the "
                    "loss, or use a method in gradient units, whose mean can be clipped after synchronize()."
                )


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _place(gradient: torch.Tensor) -> int:
    return _values(gradient).data_ptr()


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    """All elements in the order of memory, without a copy where they are dense there."""
    values = _values(gradient).detach()
    if not values.is_contiguous():
        values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    return values.reshape(-1)


def _view(gradient: torch.Tensor) -> torch.Tensor | None:
    """Up to `_SAMPLE` elements, evenly spaced, in the order of memory. One call of torch: every gradient of every step is looked at."""
    if gradient.is_sparse or not gradient.is_contiguous() or gradient.requires_grad:
        return None
    n = gradient.numel()
    return gradient.as_strided((n,), (1,)) if n <= _SAMPLE else gradient.as_strided((_SAMPLE,), (n // _SAMPLE,))


def _sample(views: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_spaced(_flat(g)) if v is None else v for v, g in zip(views, gradients, strict=True)])


def _spaced(flat: torch.Tensor) -> torch.Tensor:
    return flat if flat.numel() <= _SAMPLE else flat[:: flat.numel() // _SAMPLE][:_SAMPLE]


def _same(now: torch.Tensor, noted: torch.Tensor) -> Verdict:
    """Whether they hold the same; NaN is equal to NaN on a GPU alone."""
    if now.device.type == "cpu":
        return torch.equal(now, noted)
    return ((now == noted) | ((now != now) & (noted != noted))).all()


def _is(now: torch.Tensor, noted: torch.Tensor, factor: float) -> bool:
    """Whether `now` is `noted` times `factor`, where NaN is equal to NaN."""
    if factor == 1.0 and torch.equal(now, noted):
        return True
    return torch.equal(now.nan_to_num(), (noted * factor).nan_to_num())


def _sums(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = [_flat(g) for g in gradients]
    return torch.stack([f.view(_BITS[f.element_size()]).sum(dtype=torch.int64) for f in flat])
