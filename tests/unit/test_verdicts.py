"""Whether gradients were finite may be what a device alone knows: such a step is undone as any other, and nobody waits before it ends."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hvd_ecsgd import GradientExchange
from hvd_ecsgd.errors import CompressionError
from hvd_ecsgd.kernels import Addition
from hvd_ecsgd.transport.simulated import SimulatedTransport, run_simulated
from hvd_ecsgd.verdicts import all_of, doubt, known, known_at_the_end, verdict
from tests.cases import COVERING, Case, bound_method, ids
from tests.pretend import on_gpu

SHAPES = {"a.weight": (40, 40), "b.weight": (40, 40), "b.bias": (8,)}
STEPS = 4


def trained(case: Case, spoilt: bool) -> list[tuple[list[torch.Tensor], dict[str, Any], int]]:
    """By worker: what came of the steps, the state, and how many were undone. `spoilt`: in step 2 a gradient of worker 1 is not finite."""

    def work(transport: SimulatedTransport) -> tuple[list[torch.Tensor], dict[str, Any], int]:
        generator = torch.Generator().manual_seed(transport.rank)
        named = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in SHAPES.items()]
        takes = bound_method(case).feedback.takes
        options = ({"lr": 0.1} if takes.learning_rate else {}) | ({"momentum": case.momentum} if takes.momentum else {})
        exchange = GradientExchange(named, case.make(), transport, bucket_bytes=1, **options)
        came: list[torch.Tensor] = []
        for step in range(STEPS):
            gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
            if spoilt and step == 2 and transport.rank == 1:
                gradients["b.weight"][3, 5] = float("nan")
                gradients["b.weight"][0, 0] = float("inf")
            means = exchange.reduce(gradients)
            came += [means[name] for name in sorted(means)] or [p.detach().clone() for _, p in named]
        return came, exchange.compression.state_dict(), exchange.compression.undone_steps

    return run_simulated(2, work)


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = list(tree.values()) if isinstance(tree, dict) else list(tree) if isinstance(tree, list | tuple) else []
    return [t for item in items for t in tensors(item)]


@pytest.mark.parametrize("case", COVERING, ids=ids)
def test_a_step_that_a_device_alone_knows_to_be_spoilt_is_undone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all workers, as where the host knows at once: the same comes of the steps, and of the state, to rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trained(case, spoilt=True)
        at_once = Addition.add_
        monkeypatch.setattr(Addition, "add_", lambda self, *given: torch.tensor(bool(at_once(self, *given))))
        found = trained(case, spoilt=True)
    assert sum(undone for _, _, undone in expected) >= 1  # of a local step on that worker alone
    for (came, state, undone), (came_, state_, undone_) in zip(found, expected, strict=True):
        assert undone == undone_
        assert len(came) == len(came_) and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(came, came_, strict=True))
        pairs = list(zip(tensors(state), tensors(state_), strict=True))
        assert pairs or not bound_method(case).stateful
        assert all(torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_verdicts_of_the_cpu_are_at_hand_and_others_are_read_together() -> None:
    assert verdict(torch.tensor(True)) is True and known([True, torch.tensor(True)]) and not known([True, torch.tensor(False)])
    assert all_of([]) is True and known([all_of([True, torch.tensor(True), torch.tensor(False)])]) is False
    with pytest.raises(CompressionError, match="wrong"):
        doubt(torch.tensor(True), lambda: CompressionError("wrong"))
    doubt(torch.tensor(False), lambda: CompressionError("wrong"))
    with on_gpu() as gpu:
        yes, no = (torch.full((), there, device="cuda") for there in (True, False))
        assert isinstance(both := all_of([True, yes, yes, True]), torch.Tensor) and isinstance(verdict(no), torch.Tensor) and not gpu.reads
        assert known([both, yes, True]) and len(gpu.reads) == 1
        assert not known([both, no]) and not known([both, False])
        doubt(no, lambda: CompressionError("not this"))
        doubt(yes, lambda: CompressionError("parameter 'b.weight'"))
        gpu.reads.clear()
        assert known([yes]) and len(gpu.reads) == 1  # what is doubted is another stream's, perhaps
        with pytest.raises(CompressionError, match=r"b\.weight"):
            known_at_the_end([yes])
        assert len(gpu.reads) == 2 and known_at_the_end([yes])  # an error once
