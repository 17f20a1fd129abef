"""The order in which ranks list their parameters is no setting: buckets follow the names as rank 0 lists them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hvd_ecsgd.optimizer.driver as module
from hvd_ecsgd import Compression, DisagreementError, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import Case, by_name, ids, rows_that_cover
from tests.problems import flat, mlp, same_bits, train, weights

LISTED = {"alike": lambda rank, named: named, "each its own": lambda rank, named: named[rank:] + named[:rank]}
"""By rank 0 in the model's order."""


def run(case: Case, listed: Any, steps: tuple[int, ...] = (4, 4, 4), **options: Any) -> list[Any]:
    """The weights and what is kept, by rank, of an optimizer that holds its parameters in another order than they are named in."""

    def worker(transport: Transport) -> Any:
        model, rank = mlp(torch.float64), transport.rank
        named = listed(rank, list(model.named_parameters()))
        sgd = torch.optim.SGD([p for _, p in reversed(named)], lr=0.05, momentum=case.momentum)
        optimizer = DistributedOptimizer(sgd, named, case.make(), transport=transport, **options)
        train(model, optimizer, rank, range(steps[rank]))
        optimizer.join()
        kept = optimizer.compression.state_dict()["parameters"]
        momentum = flat(optimizer.state.get(p, {}).get("momentum_buffer", torch.zeros_like(p)) for p in model.parameters())
        return weights(model, optimizer.compression), momentum, {(n, s): t for n in kept for s, t in kept[n].items()}

    return run_simulated(len(steps), worker)


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_another_order_gives_the_same_bits(case: Case, bucket_bytes: int = 2**20) -> None:
    alike, mixed = (run(case, listed, bucket_bytes=bucket_bytes) for listed in LISTED.values())
    assert same_bits(x for x, *_ in mixed)
    for (x, momentum, kept), (y, other_momentum, others) in zip(alike, mixed, strict=True):
        assert torch.equal(x, y) and torch.equal(momentum, other_momentum)
        assert kept.keys() == others.keys()
        for (name, slot), t in kept.items():
            same = torch.equal(t, others[name, slot]) if isinstance(t, torch.Tensor) else t == others[name, slot]
            assert same, f"'{slot}' of '{name}'"


@pytest.mark.parametrize("name", ["none", "top_k"])
def test_another_order_of_buckets_of_one_parameter_gives_the_same_bits(name: str) -> None:
    test_another_order_gives_the_same_bits(by_name(name), bucket_bytes=0)


def test_what_a_worker_takes_over_after_join_goes_by_name() -> None:
    (x, momentum, _), *others = run(by_name("top_k"), LISTED["each its own"], steps=(2, 6, 4))
    assert float((momentum != 0).double().mean()) > 0.3, "control: there is something to take over"
    for y, other_momentum, _ in others:
        assert torch.equal(x, y) and torch.equal(momentum, other_momentum)


def test_control_without_the_common_order_the_ranks_cannot_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_common_order", lambda named, transport: named)
    with pytest.raises(DisagreementError):
        run(by_name("top_k"), LISTED["each its own"])


def test_other_names_are_still_told_apart() -> None:
    def worker(transport: Transport) -> None:
        model = mlp()
        named = [(f"rank1.{n}" if transport.rank == 1 and n == "0.bias" else n, p) for n, p in model.named_parameters()]
        named = named[transport.rank :] + named[: transport.rank]
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named, Compression.top_k(4), transport=transport)
        train(model, optimizer, transport.rank, [0])

    with pytest.raises(DisagreementError, match=r"'0\.bias'"):
        run_simulated(3, worker)
