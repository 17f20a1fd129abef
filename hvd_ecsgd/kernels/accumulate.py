"""What a step adds to a feedback rule's state: compiled in one pass over state and gradients, and in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..protocols import Accumulated, Extraction, Sums, Wanted
from ..segments import Segments
from ..verdicts import Verdict, known
from . import native

__all__ = ["Addition", "Unread"]


@dataclass(frozen=True, slots=True)
class Addition:
    """buffer ← carry·buffer + gradient·g + decay·x; or with `momentum` m, m ← mu·m + g + decay·x, then buffer ← carry·buffer + of_momentum·m, and
    where `gradient` is not 0 also + gradient·g + decay·x, and displacement ← displacement + of_momentum·m.

    g are the gradients and x the parameters, which are not read where `decay` is 0. `buffer`, `momentum` and `displacement` are flat, of float32 or
    float64, and laid out by `segments`. carry = 0: the buffer is written and not read.
    """

    segments: Segments
    buffer: torch.Tensor
    carry: float = 1.0
    gradient: float = 1.0
    decay: float = 0.0
    momentum: torch.Tensor | None = None
    mu: float = 0.0
    of_momentum: float = 1.0
    displacement: torch.Tensor | None = None

    def accumulated_(self, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], wanted: Wanted | None = None) -> Accumulated:
        """`add_`, and what is `wanted` of the buffer, where that costs no pass of its own."""
        sums = None
        if wanted is not None and isinstance(native.kernels_for(self.buffer, self.segments, "accumulate"), native.Native):
            sums = Sums.blank(wanted, self.buffer)
        finite = self._compiled(gradients, parameters, sums)
        if finite is None:
            finite, sums = self.add_(gradients, parameters), None
        return Accumulated.nothing(self.segments) if finite is False else Accumulated(self.buffer, finite, sums)

    def add_(self, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> Verdict:
        """False when some gradient holds an inf or NaN: then all is as it was, to rounding (in torch, to the bit).

        Compiled, it gives what torch gives to the bit, in one pass. What that had added before it came upon an inf or NaN is taken away again; of
        magnitudes of 2¹⁶ and more nothing is added before all gradients were looked at, so that rounding stays small.
        """
        compiled = self._compiled(gradients, parameters)
        if compiled is not None:
            return compiled
        if not known(native.all_finite(g) for g in gradients):
            return False
        if self.carry not in (0.0, 1.0):
            self.buffer.mul_(self.carry)
        views = self.segments.shaped_views
        if self.momentum is not None:
            momentum = views(self.momentum.mul_(self.mu))
            torch._foreach_add_(momentum, list(gradients))
            if self.decay:
                torch._foreach_add_(momentum, list(parameters), alpha=self.decay)
            if self.displacement is not None:
                self.displacement.add_(self.momentum, alpha=self.of_momentum)
            if self.carry:
                self.buffer.add_(self.momentum, alpha=self.of_momentum)
            else:
                torch.mul(self.momentum, self.of_momentum, out=self.buffer)
        if self.gradient and (self.carry or self.momentum is not None):
            torch._foreach_add_(views(self.buffer), list(gradients), alpha=self.gradient)
        elif self.gradient:
            torch._foreach_copy_(views(self.buffer), list(gradients))
            if self.gradient != 1.0:
                self.buffer.mul_(self.gradient)
        if self.gradient and self.decay:
            torch._foreach_add_(views(self.buffer), list(parameters), alpha=self.decay)
        return True

    def take_(self, gradients: Sequence[torch.Tensor] | None, parameters: Sequence[torch.Tensor]) -> None:
        """Reverse `add_` of finite gradients, to rounding; without `gradients` all but what they added. With mu = 0 nothing is left of what the
        momentum was, and nobody asks for it: it is zero then."""
        views = self.segments.shaped_views
        if gradients is not None and self.carry:
            if self.gradient:
                torch._foreach_add_(views(self.buffer), list(gradients), alpha=-self.gradient)
            if self.gradient and self.decay:
                torch._foreach_add_(views(self.buffer), list(parameters), alpha=-self.decay)
            if self.momentum is not None:
                self.buffer.sub_(self.momentum, alpha=self.of_momentum)
        if gradients is not None and self.momentum is not None:
            if self.displacement is not None:
                self.displacement.sub_(self.momentum, alpha=self.of_momentum)
            if self.mu == 0:
                self.momentum.zero_()
            else:
                momentum = views(self.momentum)
                if self.decay:
                    torch._foreach_add_(momentum, list(parameters), alpha=-self.decay)
                torch._foreach_sub_(momentum, list(gradients))
                self.momentum.div_(self.mu)
        if self.carry not in (0.0, 1.0):
            self.buffer.div_(self.carry)

    def _compiled(self, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], sums: Sums | None = None) -> Verdict | None:
        """What the compiled kernel says; None where the reference is to run."""
        kernels = native.kernels_for(self.buffer, self.segments, "accumulate")
        flat = [t for t in (self.momentum, self.displacement) if t is not None]
        if kernels is None or not all(t.dtype == self.buffer.dtype and t.is_contiguous() for t in flat):
            return None
        if not self.reads(gradients) or (self.decay and not self.reads(parameters)):
            return None
        points = parameters if self.decay else None
        if sums is None:
            return kernels.accumulate_(self.momentum, self.displacement, gradients, points, self._factors)
        assert isinstance(kernels, native.Native)
        return kernels.accumulate_(self.momentum, self.displacement, gradients, points, self._factors, sums)

    @property
    def copies(self) -> bool:
        """buffer ← g, and nothing else."""
        return self.momentum is None and (self.carry, self.gradient, self.decay) == (0.0, 1.0, 0.0)

    def reads(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Compiled kernels read gradients or parameters like these, all of one type: the buffer's, or a narrower one."""
        kind, own = native.common_type(tensors, self.buffer.device), self.buffer.dtype
        return kind is not None and (kind == own or (own == torch.float32 and kind in (torch.float16, torch.bfloat16)))

    @property
    def _factors(self) -> np.ndarray:
        return np.array([self.carry, self.gradient, self.decay, self.mu, self.of_momentum], np.float64)


class Unread(Accumulated):
    """As `Accumulated`, of gradients that are read when somebody looks at it, or by what is extracted from them: without a buffer then.

    `addition`: that which copies them into a buffer of which nothing is kept.
    """

    def __init__(self, addition: Addition, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
        self._given: tuple[Addition, Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = (addition, gradients, parameters)
        self._made: Accumulated | None = None

    def _done(self) -> Accumulated:
        if self._made is None:
            assert self._given is not None
            addition, gradients, parameters = self._given
            self._made, self._given = addition.accumulated_(gradients, parameters), None
        return self._made

    @property
    def buffer(self) -> torch.Tensor:
        return self._done().buffer

    @property
    def finite(self) -> Verdict:
        return self._done().finite

    @property
    def sums(self) -> Sums | None:
        return self._done().sums

    @property
    def waits(self) -> bool:
        return self._given is not None

    def settle(self) -> None:
        self._done()

    def extract_(self, extraction: Extraction) -> bool:
        if self._given is None:
            return False
        addition, gradients, _ = self._given
        kernels = native.kernels_for(None, addition.segments, "extract")
        if not (isinstance(kernels, native.Native) and addition.copies and addition.reads(gradients)):
            return False
        finite = kernels.extract_from_(gradients, extraction)
        self._made, self._given = Accumulated(addition.buffer) if finite else Accumulated.nothing(addition.segments), None
        return finite
