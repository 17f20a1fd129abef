"""A step's way into a rule's state is one compiled pass: what torch gives, to the bit; and where a gradient is not finite, what was there before."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hvd_ecsgd.kernels import Addition, native
from hvd_ecsgd.segments import Segments
from tests.unit.test_kernels import compiled, library, table, values, variants

FORMS: dict[str, dict[str, Any]] = {
    "e + g": {},
    "carried": {"carry": 0.3},
    "scaled, with decay": {"gradient": 0.1, "decay": 1e-3},
    "momentum": {"momentum": True, "gradient": 0.0, "mu": 0.9, "of_momentum": 0.07},
    "momentum, with decay and displacement": {"momentum": True, "displacement": True, "gradient": 0.0, "decay": 1e-3, "mu": 0.9, "of_momentum": 0.07},
    "Nesterov, carried": {"momentum": True, "carry": 1.7, "decay": 1e-3, "mu": 0.9, "of_momentum": 0.9},
    "momentum without memory": {"momentum": True, "gradient": 0.0, "mu": 0.0},
    "g alone": {"carry": 0.0},
    "momentum alone": {"momentum": True, "carry": 0.0, "gradient": 0.0, "mu": 0.9, "of_momentum": 0.07},
}
SIZES = [0, 1, 70, 5000, 0, 333]
PAIRS = [(torch.float32, t) for t in (torch.float32, torch.float16, torch.bfloat16)] + [(torch.float64, torch.float64)]
"""Types of buffers, and of gradients and parameters."""


class State:
    """Numbers to begin with, for one form; flat tensors begin anywhere."""

    def __init__(self, form: str, dtype: torch.dtype, given: torch.dtype, sizes: list[int], kind: str = "gaussian") -> None:
        options, self.segments = dict(FORMS[form]), table(sizes, dtype)
        slots = {slot: values("gaussian", self.segments.numel + 1, dtype, i)[1:] for i, slot in enumerate(("buffer", "momentum", "displacement"))}
        options |= {slot: slots[slot] if options.get(slot) else None for slot in ("momentum", "displacement")}
        if options.get("carry") == 0:
            slots["buffer"].fill_(float("nan"))  # it is not read
        self.addition = Addition(self.segments, slots["buffer"], **options)
        of = [(values(kind, n + 1, given, i)[1:], values("gaussian", n + 1, given, i + 50)[1:]) for i, n in enumerate(sizes)]
        self.gradients, self.parameters = [g for g, _ in of], [x for _, x in of]

    def add_(self) -> bool:
        return self.addition.add_(self.gradients, self.parameters)

    @property
    def slots(self) -> list[torch.Tensor]:
        return [t for t in (self.addition.buffer, self.addition.momentum, self.addition.displacement) if t is not None]

    @property
    def kept(self) -> list[torch.Tensor]:
        """Slots that hold something between steps, and to which something comes back."""
        return self.slots[self.addition.carry == 0 : 1 if self.addition.momentum is not None and self.addition.mu == 0 else None]


def accumulate_everything() -> None:
    """Every form and type; also with an inf, which is found after most was written."""
    for form, (dtype, given) in itertools.product(FORMS, PAIRS):
        for bad in (False, True):
            state = State(form, dtype, given, SIZES)
            if bad:
                state.gradients[-1][-1] = float("inf")
            assert state.add_() != bad


@compiled
@pytest.mark.parametrize("form", FORMS)
def test_one_pass_gives_the_bits_of_torch(form: str) -> None:
    """On every variant; for moderate numbers, and for large ones, which are looked at first."""
    for (dtype, given), kind in itertools.product(PAIRS, ("gaussian", "heavy-tailed", "denormal", "zeros")):
        expected = State(form, dtype, given, SIZES, kind)
        with native.forced(None):
            finite = expected.add_()
        assert finite == all(g.isfinite().all() for g in expected.gradients)
        for variant in variants():
            found = State(form, dtype, given, SIZES, kind)
            assert found.add_() == finite
            if finite:
                same = [torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(expected.slots, found.slots, strict=True)]
                assert all(same), (variant, dtype, given, kind, same)


@compiled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nothing_is_left_of_gradients_that_are_not_finite(form: str, bad: float) -> None:
    """Wherever it is, also beside large numbers that come before it: what is there afterwards is what was there before, to rounding."""
    for _, (dtype, given), at in itertools.product(variants(), PAIRS, ((1, 0), (3, 0), (3, 4000), (5, 332))):
        state = State(form, dtype, given, SIZES)
        before = [t.clone() for t in state.kept]
        state.gradients[3][3100] = 6e4 if given == torch.float16 else 1e30
        state.gradients[at[0]][at[1]] = bad
        assert not state.add_()
        for old, new in zip(before, state.kept, strict=True):
            torch.testing.assert_close(
                new, old, rtol=1e-5, atol=2e-5 if dtype == torch.float32 and given != torch.float16 else 0.05 if dtype == torch.float32 else 1e-13
            )


@compiled
def test_threads_change_nothing() -> None:
    """Many tiles; and what one thread finds stops the other."""
    for bad in (None, 5, 299_999):
        for n in (1, 2):
            torch.set_num_threads(n)
            state = State("momentum, with decay and displacement", torch.float32, torch.float32, [300_001, 100, 70_003])
            if bad is not None:
                state.gradients[0][bad] = float("nan")
            with native.forced(library):
                assert state.add_() == (bad is None)
            if n == 1:
                first = state.slots
            else:
                torch.set_num_threads(1)
                assert all(torch.equal(a, b) if bad is None else torch.allclose(a, b, atol=1e-5) for a, b in zip(first, state.slots, strict=True))


@compiled
def test_who_reads_gradients_of_other_layouts_and_types() -> None:
    """Channels last and transposed ones are the same numbers; double gradients of single residuals are torch's."""
    plain = [values("gaussian", 24, torch.float32, i).view(2, 3, 2, 2) for i in range(2)]
    for turned in (
        [g.contiguous(memory_format=torch.channels_last) for g in plain],
        [g.double() for g in plain],
        [plain[0], plain[1].half().float()],
    ):
        buffers = []
        for kernels in (library, None):
            with native.forced(kernels):
                buffers.append(torch.ones(48))
                segments = Segments.of([("a", plain[0]), ("b", plain[1])])
                assert Addition(segments, buffers[-1]).add_(turned, turned)
        assert torch.equal(*buffers)
