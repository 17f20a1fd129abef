"""Ranks whose settings, models or buckets differ: every rank names the difference."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DisagreementError, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock, Sign, TopK
from hvd_ecsgd.exchange import AllGather, TwoPass
from hvd_ecsgd.feedback import NoFeedback
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import mlp, train, weights

N = 3


DISAGREEMENTS: dict[str, tuple[Callable[[bool], Any], str]] = {
    "ratio": (lambda odd: Compression.random_block(8 if odd else 4), "compressor.*ratio=4.*ratio=8"),
    "compressor": (lambda odd: Compression(Sign() if odd else TopK(), exchange=AllGather()), "compressor"),
    "scale": (lambda odd: Compression.one_bit("l2" if odd else "l1"), "compressor.*l1.*l2"),
    "feedback": (lambda odd: Compression.top_k(error_feedback=not odd), "feedback"),
    "lambda": (lambda odd: Compression.detached(8, 0.5 if odd else 0.3), "feedback"),
    "exchange": (lambda odd: Compression(Sign(), exchange=TwoPass() if odd else AllGather()), "exchange"),
    "server": (lambda odd: Compression.double_squeeze(Sign(), RandomBlock(4) if odd else None), "exchange"),
    "seed": (lambda odd: Compression.random_block(8, seed=int(odd)), "seed.*0.*1"),
    "dense_below": (lambda odd: Compression.one_bit(dense_below=10 if odd else 20), "dense_below"),
    "dense_1d": (lambda odd: Compression.one_bit(dense_1d=odd), "dense_1d"),
    "no compression": (lambda odd: Compression.none if odd else Compression(TopK(), NoFeedback()), "compressor"),
}


def disagreement(make: Callable[[bool], Any], model_of: Callable[[bool], torch.nn.Module]) -> list[Any]:
    def worker(transport: Transport) -> Any:
        odd = transport.rank == N - 1
        model = model_of(odd)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), make(odd), transport=transport)
        before = weights(model)
        try:
            train(model, optimizer, transport.rank, range(1))
        except DisagreementError as error:
            return str(error), torch.equal(weights(model), before)
        return "nothing was raised", False

    return run_simulated(N, worker)


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_every_rank_names_the_setting_that_differs(what: str) -> None:
    make, message = DISAGREEMENTS[what]
    results = disagreement(make, lambda odd: mlp())
    for said, unchanged in results:
        assert re.search(message, said), said
        assert "rank 0" in said
        assert f"rank {N - 1}" in said
        assert unchanged


def wider(odd: bool) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(20, 128 if odd else 64), torch.nn.Linear(128 if odd else 64, 5))


def test_every_rank_names_the_parameter_that_differs() -> None:
    for said, unchanged in disagreement(lambda odd: Compression.top_k(), wider):
        assert re.search(r"'0\.weight'.*\(64, 20\).*\(128, 20\)", said), said
        assert unchanged


def test_ranks_that_agree_are_left_alone() -> None:
    """Control: the same check on equal settings."""
    assert all(said == "nothing was raised" for said, _ in disagreement(lambda odd: Compression.top_k(), lambda odd: mlp()))


@pytest.mark.parametrize("other", [1600, 1200])
def test_ranks_with_other_buckets_are_told(other: int) -> None:
    """Also where there are as many: [300], [100, 200] elements are not [300, 100], [200]. With equal ones (control) nothing is raised."""

    def worker(transport: Transport) -> None:
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(size)) for name, size in (("a", 200), ("b", 100), ("c", 300))})
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model.named_parameters(),
            Compression.random_block(4, **ALL),
            transport=transport,
            bucket_bytes=other if transport.rank else 1200,
        )
        torch.stack([p.sum() for p in model.values()]).sum().backward()
        optimizer.step()

    if other == 1200:
        run_simulated(2, worker)
        return
    with pytest.raises(DisagreementError, match="parameters per bucket"):
        run_simulated(2, worker)
