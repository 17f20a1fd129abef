"""Where Hessian-aided error compensation gets H·e from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..arguments import check_flag, check_integer, check_number
from ..errors import CompressionError
from ..protocols import Part, Slot, Slots
from ..segments import Key, Segment, Segments

__all__ = ["Curvature", "GradientSquares", "Hutchinson", "Matrix", "Product"]

Vectors = Mapping[str, torch.Tensor]
"""Parameter name → a tensor of its shape."""


class Curvature:
    """What a source of H does; all but one or two of these do nothing."""

    @property
    def ahead(self) -> bool:
        """`between_steps` writes H·e to the slot `correction`; otherwise `correction` computes it."""
        return False

    @property
    def couples(self) -> bool:
        """H·e has entries in parameters that have no residual."""
        return False

    def slots(self, segments: Segments) -> Slots:
        """Slots beside `residual`. Raises `CompressionError` when H does not fit the segments."""
        return {}

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        """Between steps, on all ranks; see `Feedback.between_steps`."""
        yield from ()

    def correction(self, part: Part, lr: float) -> torch.Tensor:
        """H·e at the start of the step with learning rate `lr`, where `between_steps` has not written it."""
        raise NotImplementedError

    def observe_(self, part: Part, gradients: Sequence[torch.Tensor]) -> None:
        """Learn from this worker's gradients."""

    def forget_(self, part: Part, gradients: Sequence[torch.Tensor]) -> None:
        """Reverse `observe_`, to rounding."""


@dataclass(frozen=True)
class Matrix(Curvature):
    """H as a symmetric matrix for each parameter, [numel, numel] by the parameter's name; H is taken to be block-diagonal.

    `local=False`: the Hessian of the mean over workers, the same everywhere, times this worker's e_i. `local=True`: this worker's own H_i, times the
    mean ē of all workers' e, which costs a dense all-reduce of e; then z is exact without a global H. Give the matrices in the parameters' type and
    on their device, or they are converted in every step. Parameters that travel uncompressed need none.
    """

    matrices: Vectors = field(repr=False, compare=False)
    local: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.matrices, Mapping):
            raise CompressionError(f"Matrix: expected a dictionary from parameter name to its Hessian, got {self.matrices!r:.100}.")
        _check_local(self.local, "Matrix")

    def _of(self, segment: Segment) -> torch.Tensor:
        try:
            h = self.matrices[segment.name]
        except KeyError:
            raise CompressionError(
                f"Matrix: there is no Hessian for parameter '{segment.name}'; give one of shape ({segment.numel}, {segment.numel}) for each "
                "compressed parameter, or use Product(…)."
            ) from None
        if not isinstance(h, torch.Tensor) or tuple(h.shape) != (segment.numel, segment.numel):
            came = f"shape {tuple(h.shape)}" if isinstance(h, torch.Tensor) else repr(h)
            raise CompressionError(
                f"Matrix: the Hessian of parameter '{segment.name}' (shape {segment.shape}) must have shape "
                f"({segment.numel}, {segment.numel}), got {came}."
            )
        if h.is_complex():
            raise CompressionError(f"Matrix: the Hessian of parameter '{segment.name}' must be real, got {h.dtype}.")
        return h

    @property
    def ahead(self) -> bool:
        return self.local

    def slots(self, segments: Segments) -> Slots:
        for segment in segments:
            if not bool(torch.isfinite(self._of(segment)).all()):
                raise CompressionError(f"Matrix: the Hessian of parameter '{segment.name}' holds an inf or NaN.")
        return {"correction": Slot()} if self.local else {}

    def _times(self, e: torch.Tensor, segments: Segments) -> torch.Tensor:
        return torch.cat([torch.mv(self._of(s).to(e), v) for s, v in zip(segments, segments.views(e), strict=True)])

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        if not self.local:
            return
        means = [part.state["residual"].clone() for part in parts]
        yield means
        for part, mean in zip(parts, means, strict=True):
            if not part.lossless:
                part.state["correction"].copy_(self._times(mean, part.segments))
            elif not part.zero_learning_rate:
                part.state["correction"].zero_()  # there may be one from before the method was switched

    def correction(self, part: Part, lr: float) -> torch.Tensor:
        return self._times(part.state["residual"], part.segments)


def _call(function: Callable[[Vectors], Vectors], vectors: dict[str, torch.Tensor], who: str) -> Vectors:
    """What the user's Hessian-vector product returns, checked; it may turn gradients on for itself."""
    result = function(vectors)
    if not isinstance(result, Mapping):
        raise CompressionError(f"{who}: the product must return a dictionary from parameter name to H·v, got {result!r:.100}.")
    for name, v in vectors.items():
        h = result.get(name)
        if not isinstance(h, torch.Tensor) or h.shape != v.shape or h.is_complex():
            came = f"{h.dtype} of shape {tuple(h.shape)}" if isinstance(h, torch.Tensor) else "nothing" if h is None else repr(h)
            raise CompressionError(f"{who}: the product of parameter '{name}' must be real and have shape {tuple(v.shape)}, got {came}.")
    return result


def _by_name(parts: Sequence[Part], slot: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        segment.name: view
        for part, flat in zip(parts, slot, strict=True)
        for segment, view in zip(part.segments, part.segments.shaped_views(flat), strict=True)
    }


@dataclass(frozen=True)
class Product(Curvature):
    """H as a function: {parameter name: v} → {parameter name: H·v}, called once after each exchange, before the update, with all bound parameters.

    `local=True`: the function multiplies by this worker's own H_i (say, by double backward through the loss of its last batch); it is given the mean
    ē of all workers' e, which costs a dense all-reduce of e, and z is exact without a global H. `local=False`: it multiplies by the Hessian of the
    mean over workers, and is given this worker's e_i. Vectors have the parameters' shapes, and zeros for parameters that travel uncompressed.
    The function is called inside optimizer.step() (on Horovod, inside synchronize()); it must not call backward(), which would fire the
    optimizer's hooks, but `torch.autograd.grad`. A product with an inf or NaN is not used; that step is plain error feedback on this worker.
    """

    function: Callable[[Vectors], Vectors] = field(repr=False, compare=False)
    local: bool = True

    def __post_init__(self) -> None:
        _check_product(self.function, "Product")
        _check_local(self.local, "Product")

    @property
    def ahead(self) -> bool:
        return True

    @property
    def couples(self) -> bool:
        return True

    def slots(self, segments: Segments) -> Slots:
        return {"correction": Slot()}

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        vectors = [part.state["residual"].clone() for part in parts]
        if self.local:
            yield [v for v, part in zip(vectors, parts, strict=True) if not part.lossless or part.zero_learning_rate]
        with torch.enable_grad():
            products = _call(self.function, _by_name(parts, vectors), "Product")
        finite = True
        for name, correction in _by_name(parts, [part.state["correction"] for part in parts]).items():
            correction.copy_(products[name].detach())
            finite = finite and bool(torch.isfinite(correction).all())
        if not finite:
            warnings.warn("Product: a Hessian-vector product held an inf or NaN and is not used in the next step.", RuntimeWarning, stacklevel=2)
            for part in parts:
                part.state["correction"].zero_()


class _Diagonal(Curvature):
    """H as a diagonal, in the slot `diagonal`, the same on all ranks. ηh is clamped to [0, 2]: outside, the residual would grow in that entry."""

    def slots(self, segments: Segments) -> Slots:
        return {"diagonal": Slot()}

    def correction(self, part: Part, lr: float) -> torch.Tensor:
        return part.state["diagonal"].clamp(0.0, 2.0 / lr).mul_(part.state["residual"])


@dataclass(frozen=True)
class Hutchinson(_Diagonal):
    """The diagonal of H by Hutchinson's estimator: h ← decay·h + (1 − decay)·mean z⊙H_i z, with random signs z of each worker's own.

    `function` multiplies by this worker's H_i, as in `Product`, but is given vectors for the compressed parameters only; it is called after every
    `every`-th step, for one dense all-reduce. z⊙Hz is exact for a diagonal H. h starts at 0, that is at plain error feedback, and is right after
    some 3/(1 − decay) samples. A sample with an inf or NaN on any rank is left out on all. Slot: `diagonal`.
    """

    function: Callable[[Vectors], Vectors] = field(repr=False, compare=False)
    decay: float = 0.99
    every: int = 1

    def __post_init__(self) -> None:
        _check_product(self.function, "Hutchinson")
        _check_decay(self.decay, "Hutchinson")
        check_integer(self.every, "Hutchinson: every", "an integer ≥ 1", least=1)

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        if key.step % self.every:
            return
        signs = [part.segments.empty() for part in parts]
        for part, z in zip(parts, signs, strict=True):
            for segment, view in zip(part.segments, part.segments.views(z), strict=True):
                view.bernoulli_(0.5, generator=key.generator(segment, view.device, "hutchinson")).mul_(2).sub_(1)
        with torch.enable_grad():
            products = _call(self.function, _by_name(parts, signs), "Hutchinson")
        for name, z in _by_name(parts, signs).items():
            z.mul_(products[name].detach())
        yield signs
        for part, sample in zip(parts, signs, strict=True):
            for h, s in zip(part.segments.views(part.state["diagonal"]), part.segments.views(sample), strict=True):
                if bool(torch.isfinite(s).all()):
                    h.lerp_(s, 1 - self.decay)


@dataclass(frozen=True)
class GradientSquares(_Diagonal):
    """A diagonal in place of H's from squared gradients: h ← decay·h + (1 − decay)·scale·mean g_i². Ours, a heuristic.

    For a negative log-likelihood and `scale` = the batch size of a worker, this is near a diagonal of the Fisher matrix while gradients are mostly
    noise. It costs a dense all-reduce in every step. Slot: `diagonal`.
    """

    scale: float = 1.0
    decay: float = 0.99

    def __post_init__(self) -> None:
        _check_decay(self.decay, "GradientSquares")
        check_number(self.scale, "GradientSquares: scale", "a positive number", lambda scale: scale > 0)

    def observe_(self, part: Part, gradients: Sequence[torch.Tensor]) -> None:
        """Each worker adds its own; the mean that `between_steps` takes makes it the same again."""
        part.state["diagonal"].mul_(self.decay)
        self._add_squares_(part, gradients, 1.0)

    def forget_(self, part: Part, gradients: Sequence[torch.Tensor]) -> None:
        self._add_squares_(part, gradients, -1.0)
        part.state["diagonal"].div_(self.decay)

    def _add_squares_(self, part: Part, gradients: Sequence[torch.Tensor], sign: float) -> None:
        for h, g in zip(part.segments.shaped_views(part.state["diagonal"]), gradients, strict=True):
            h.addcmul_(g.to(h.dtype), g.to(h.dtype), value=sign * (1 - self.decay) * self.scale)

    def between_steps(self, parts: Sequence[Part], key: Key) -> Generator[list[torch.Tensor], None, None]:
        yield [part.state["diagonal"] for part in parts]


def _check_product(function: Callable[[Vectors], Vectors], who: str) -> None:
    if not callable(function):
        raise CompressionError(f"{who}: expected a function {{parameter name: v}} → {{parameter name: H·v}}, got {function!r:.100}.")


def _check_local(local: bool, who: str) -> None:
    check_flag(local, f"{who}: local", "True (this worker's own Hessian) or False (that of the mean)")


def _check_decay(decay: float, who: str) -> None:
    check_number(decay, f"{who}: decay", "between 0 and 1", lambda decay: 0 < decay < 1)
