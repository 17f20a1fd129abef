"""What the core relies on of every feedback rule: its slots, where it holds the parameters, what it does to gradients, and that it takes it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd.feedback import CSER, ErrorFeedback, LocalMomentum, Matrix
from hvd_ecsgd.protocols import NO_SEGMENTS, Exchange, Feedback, GroupSettings, Part, Role, Slot, StepContext, slot_of, zeros
from hvd_ecsgd.segments import Segments
from tests.cases import CASES, bound_method

NAMED = [("0.weight", torch.zeros(32, 40, dtype=torch.float64)), ("b", torch.zeros(7, dtype=torch.float64))]
RULES: list[Any] = []
for method in map(bound_method, CASES):
    RULES += [rule for rule in (method.feedback, method.dense().feedback) if rule not in RULES]
CONTEXT = StepContext(0, 3, settings=GroupSettings(0.25, 0.5, 0.125), unit=0.25, previous_unit=0.25)


def begun(rule: Any) -> Part:
    """Some numbers everywhere; for a rule with a matrix for each parameter, of one that it has a matrix for."""
    named = NAMED[:1] if isinstance(getattr(rule, "curvature", None), Matrix) else NAMED
    segments, generator = Segments.of(named), torch.Generator().manual_seed(0)
    state = zeros(rule.slots(segments), segments)
    for t in state.values():
        t.copy_(torch.randn(t.shape, generator=generator, dtype=t.dtype))
    return Part(state, [torch.randn(p.shape, generator=generator, dtype=p.dtype) for _, p in named], segments)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_slots_do_not_depend_on_segments_and_have_one_of_a_role(rule: Any) -> None:
    part = begun(rule)
    slots: dict[str, Slot] = rule.slots(part.segments)
    assert slots == rule.slots(NO_SEGMENTS) and list(slots) == list(part.state)
    roles = [slot.role for slot in slots.values()]
    assert all(roles.count(role) <= 1 for role in (Role.RESIDUAL, Role.POINT, Role.MEMORY))
    assert (rule.shift(part) is None) == (Role.POINT not in roles), "x is kept where the parameters are elsewhere, and only there"


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_gradients_that_are_not_finite_leave_the_state_alone(rule: Any, bad: float) -> None:
    """Whatever reads them, in one pass or two. The same but finite (control) does not, and can be taken back."""
    part = begun(rule)
    before = {slot: t.clone() for slot, t in part.state.items()}
    gradients = [torch.ones_like(p) for p in part.parameters]
    gradients[-1].view(-1)[-1] = bad
    assert not rule.accumulate_(part, gradients, CONTEXT).finite
    for slot, t in part.state.items():
        torch.testing.assert_close(t, before[slot], rtol=1e-12, atol=1e-12)
    gradients[-1].view(-1)[-1] = 2.0
    done = rule.accumulate_(part, gradients, CONTEXT)
    assert done.finite and done.buffer.shape == (part.segments.numel,)
    assert not before or any(not torch.equal(t, before[slot]) for slot, t in part.state.items() if slot in before)
    rule.undo_(part, gradients, CONTEXT)
    for slot, t in before.items():
        torch.testing.assert_close(part.state[slot], t, rtol=1e-12, atol=1e-12)


def test_where_the_parameters_are_held() -> None:
    """x − factor·t, with the slots that the rules' docstrings name."""
    for rule, slot, factor in (
        (LocalMomentum(0.3), "residual", 0.3),
        (LocalMomentum(0.3, period=4), "displacement", 1.0),
        (LocalMomentum(0.0, period=4).for_dense(), "displacement", 1.0),
        (CSER(), "residual", 1.0),
    ):
        part = begun(rule)
        shift = rule.shift(part)
        assert shift is not None and shift[0] is part.state[slot] and shift[1] == factor
    for unshifted in (LocalMomentum(0.0), LocalMomentum(0.3).for_dense(), CSER().for_dense(), ErrorFeedback()):
        assert unshifted.shift(begun(unshifted)) is None


def test_the_seams_stay_narrow() -> None:
    """Members of the protocols that a method implements."""
    members = {p.__name__: sorted(n for n in vars(p) if not n.startswith("_")) for p in (Feedback, Exchange)}
    assert members["Feedback"] == sorted(
        ["unit", "takes", "check_group", "slots", "for_dense", "accumulate_", "undo_", "apply_", "shift", "exchanges", "between_steps"]
    )
    assert len(members["Exchange"]) <= 5, members


def test_a_residual_is_found_by_its_role() -> None:
    assert slot_of(CSER().slots(NO_SEGMENTS), Role.POINT) == "x"
    assert slot_of({}, Role.RESIDUAL) is None
