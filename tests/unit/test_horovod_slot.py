"""The slot behind compress() and decompress(), in one process and without Horovod."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, SequenceError, UnboundParameterError
from hvd_ecsgd.core.aggregator import Aggregator
from hvd_ecsgd.core.state import MethodState
from hvd_ecsgd.horovod.slot import HorovodSlot
from hvd_ecsgd.horovod.tail import with_tail, without_tail
from hvd_ecsgd.horovod.transport import SlotHandle
from hvd_ecsgd.protocols import GroupSettings
from hvd_ecsgd.transport import SelfTransport
from tests.cases import ALL
from tests.problems import mlp


class OneSlot(SelfTransport):
    """A group of one whose all-reduce waits to be handed in by the caller, as on Horovod."""

    divisor = 1
    direct = SelfTransport()

    def allreduce_(self, t: torch.Tensor, name: str) -> Any:
        return SlotHandle(t)


def slot(model: torch.nn.Module, compression: Any, settings: GroupSettings | None = None) -> HorovodSlot:
    bound = compression.bind(model)
    state = MethodState(bound.method, bound.named, settings=lambda bucket: settings or GroupSettings())
    return HorovodSlot(Aggregator(state), OneSlot(), bound.frozen)  # type: ignore[arg-type]


def parameter(n: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(n))


def exchange(s: HorovodSlot, p: torch.nn.Parameter, value: float) -> None:
    """One step of one parameter, up to its last result, which Horovod puts into the gradient."""
    p.grad = torch.full_like(p, value)
    p.grad.set_(s.decompress(*s.compress(p.grad)))


def test_a_gradient_is_known_by_identity() -> None:
    """An equal tensor, another model's gradient, or a wrong shape belong to nobody; the parameter itself means Adasum."""
    model = mlp()
    model(torch.ones(2, 20)).sum().backward()
    s = slot(model, Compression.none())
    weight = model[0].weight
    assert weight.grad is not None
    for foreign in (weight.grad.clone(), torch.ones(3), weight.grad.view(weight.shape)):
        with pytest.raises(UnboundParameterError, match="no bound parameter"):
            s.compress(foreign)
    with pytest.raises(CompressionError, match=r"'0\.weight'.*Adasum"):
        s.compress(weight)  # type: ignore[arg-type]
    payload, context = s.compress(weight.grad)
    with pytest.raises(CompressionError, match=r"'0\.weight' was compressed twice"):
        s.compress(weight.grad)
    assert s.decompress(payload, context) is weight.grad
    with pytest.raises(CompressionError, match="another step"):
        s.decompress(payload, context)


def test_a_frozen_parameters_gradient_is_named() -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    s = slot(model, Compression.none())
    model[2].bias.requires_grad_(True)
    model(torch.ones(2, 20)).sum().backward()
    with pytest.raises(UnboundParameterError, match=r"'2\.bias' was frozen"):
        s.compress(model[2].bias.grad)


def test_gradients_of_one_shape_are_told_apart() -> None:
    """Two parameters of one shape, in either order of calls: each residual stays with its own."""
    a, b = parameter(64), parameter(64)
    s = slot(torch.nn.ParameterList([a, b]), Compression.top_k(k=1, **ALL))
    for order in ((a, b), (b, a)):
        a.grad, b.grad = torch.full((64,), 1.0), torch.full((64,), 10.0)
        for p, (sent, context) in [(p, s.compress(p.grad)) for p in order]:  # type: ignore[arg-type]
            s.decompress(sent, context)
            assert p.grad is not None
        s.before_step(scaled=False)
    saved = s.aggregator.state_dict()["parameters"]
    assert saved["0"]["residual"].sum() == 2 * 64 - (1 + 2)
    assert saved["1"]["residual"].sum() == 20 * 64 - (10 + 20)


@pytest.mark.parametrize("bad", [True, False])
def test_what_was_exchanged_is_applied_once_and_an_undone_step_never(bad: bool) -> None:
    """Also where no optimizer's step has followed the undone step, and the next one's hook comes while gradients are on their way."""
    p = parameter(8)
    s = slot(torch.nn.ParameterList([p]), Compression.local_momentum(1, **ALL), GroupSettings(lr=0.5, momentum=0.9))
    exchange(s, p, float("nan") if bad else 1.0)
    if not bad:
        mean = p.grad
        with pytest.raises(SequenceError, match=r"never applied.*compression\.discard"):
            exchange(s, p, 1.0)
        p.grad = mean
        s.before_step(scaled=False)
        assert torch.equal(p.detach(), torch.full((8,), 0.5)) and p.grad is None
        return
    p.grad = torch.full_like(p, 1.0)
    payload, context = s.compress(p.grad)
    s.before_step(scaled=False)  # Horovod's step comes through here before it has synchronised
    assert torch.equal(p.detach(), torch.ones(8)) and p.grad is not None
    p.grad.set_(s.decompress(payload, context))
    s.before_step(scaled=False)
    assert torch.equal(p.detach(), torch.full((8,), 0.5))


def test_calls_out_of_turn_are_named() -> None:
    p, q = parameter(8), parameter(9)
    s = slot(torch.nn.ParameterList([p, q]), Compression.top_k(2, **ALL))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    first, second = s.compress(p.grad), s.compress(q.grad)
    with pytest.raises(CompressionError, match=r"discard\(\): gradients are on their way"):
        s.discard()
    s.decompress(*first)
    with pytest.raises(CompressionError, match="'0' is compressed before the results of the step before were all taken"):
        s.compress(p.grad)
    s.decompress(*second)
    with pytest.raises(CompressionError, match="another step"):
        s.decompress(*second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [2, 3, 64])
def test_a_rank_with_other_settings_is_seen_in_the_sum_and_in_the_mean(n: int, dtype: torch.dtype) -> None:
    """One rank's bit in n, whatever the others' is; one that refuses is heard; and ranks that agree are left alone (control)."""
    payload = torch.arange(3, dtype=dtype)

    def reduced(settings: list[int], refuses: int | None = None) -> torch.Tensor:
        return torch.stack([with_tail(payload, s, rank == refuses) for rank, s in enumerate(settings)]).sum(0)

    for others in (0b0000, 0b1111, 0b1010):
        agreed = reduced([others] * n)
        for scale in (1, 1 / n):
            left, factor, refused = without_tail(agreed * scale, "w", n)
            assert torch.equal(left, payload * n * scale) and abs(factor - n * scale) < 1e-2 and not refused
            for odd in (others ^ 0b0001, others ^ 0b1000):
                with pytest.raises(DisagreementError, match="'w': ranks compressed with different settings"):
                    without_tail(reduced([odd] + [others] * (n - 1)) * scale, "w", n)
        assert without_tail(reduced([others] * n, refuses=n - 1), "w", n)[2]
