"""A step that CompSkip leaves out does not move the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression
from hvd_ecsgd.compressors import Identity, RandomBlock, TopK
from hvd_ecsgd.exchange import CompSkip, Every, NormBased, SkipAllReduce
from hvd_ecsgd.feedback import PEF, DistEFSGD, ErrorFeedback, LocalMomentum
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import mlp, same_bits, weights
from tests.recursions import ALL, N
from tests.unit.test_comp_skip import trained

RULES: dict[str, Any] = {"ErrorFeedback": ErrorFeedback(), "DistEFSGD": DistEFSGD(), "PEF": PEF(), "LocalMomentum": LocalMomentum(0.3)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("all_reduce", [False, True])
def test_a_skipped_step_does_not_move_the_model(rule: str, all_reduce: bool) -> None:
    """Also not by the optimizer's own momentum and weight decay; x moves in the steps that are not skipped (control)."""
    exchange: Any = SkipAllReduce(Every(2)) if all_reduce else CompSkip(Every(1), Every(2))

    def worker(transport: Transport) -> Any:
        model = mlp(torch.float64)
        compression = Compression(RandomBlock(8), RULES[rule], exchange, **ALL)
        optimizer = trained(model, compression, transport, [], momentum=0.9, weight_decay=0.1)
        seen = [weights(model)]
        for t in range(6):
            trained(model, None, transport, [t], optimizer)
            seen.append(weights(model, optimizer.compression))
        return seen

    results = run_simulated(N, worker)
    for seen in results:
        assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [False, True] * 3
    assert same_bits(seen[-1] for seen in results)


@pytest.mark.parametrize(("threshold", "moves"), [(1e30, [True, False, False]), (0.0, [True, True, True])])
def test_where_all_servers_are_silent_by_norm_nothing_moves(threshold: float, moves: list[bool]) -> None:
    """Neither do the optimizer's momentum and weight decay; a threshold at which they answer is the control."""

    def worker(transport: Transport) -> list[bool]:
        model = mlp(torch.float64)
        compression = Compression(Identity(), ErrorFeedback(), CompSkip(Every(1), NormBased(threshold)), dense_below=0, dense_1d=False)
        optimizer, seen = trained(model, compression, transport, [], momentum=0.9, weight_decay=0.1), [weights(model)]
        for t in range(3):
            trained(model, None, transport, [t], optimizer)
            seen.append(weights(model))
        return [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]

    assert run_simulated(2, worker) == [moves] * 2


def test_only_what_was_skipped_is_left_alone() -> None:
    """Dense parameters go on; a skipped parameter has no gradient, so the optimizer's momentum does not move it."""

    def worker(transport: Transport) -> Any:
        model = mlp(torch.float64)
        compression = Compression(TopK(8), ErrorFeedback(), CompSkip(Every(1), Every(2)))
        optimizer = trained(model, compression, transport, [0], momentum=0.9, weight_decay=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        trained(model, None, transport, [1], optimizer)
        return [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)], [p.grad is None for p in model.parameters()]

    for still, without in run_simulated(N, worker):
        assert still == without == [True, False, False, False]
