"""Warm-up and ratio schedules: what is sent when. That nothing is lost meanwhile is tested on the cases that have them, as on all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer, exponential_ratios
from hvd_ecsgd.compressors import Identity, Sign, TopK
from hvd_ecsgd.exchange import AllReduce
from hvd_ecsgd.feedback import LocalMomentum
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import mlp, same_bits, simulate, train

N = 3


def payloads(make: Callable[[], Any], steps: int) -> list[int]:
    """Bytes that one worker sends, step by step."""

    def worker(transport: Transport) -> list[int]:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), make(), transport=transport)
        totals = [0]
        for step in range(steps):
            train(model, optimizer, transport.rank, [step])
            totals.append(optimizer.compression.traffic.payload)
        return [b - a for a, b in itertools.pairwise(totals)]

    return run_simulated(N, worker)[0]


# -- warm-up ----------------------------------------------------------------------------------------------------------------------

WARM: dict[str, tuple[Callable[..., Compression], Callable[[], Any]]] = {
    "top_k": (lambda **o: Compression.top_k(10, **ALL, **o), lambda: Compression.none(**ALL)),
    "double_squeeze": (lambda **o: Compression.double_squeeze(**ALL, **o), lambda: Compression.none(**ALL)),
    "no feedback": (lambda **o: Compression.one_bit(error_feedback=False, **ALL, **o), lambda: Compression.none(**ALL)),
    "detached": (lambda **o: Compression.detached(8, **ALL, **o), lambda: Compression(Identity(), LocalMomentum(0.3), AllReduce(), **ALL)),
}


@pytest.mark.parametrize("name", WARM)
def test_the_first_steps_are_uncompressed(name: str) -> None:
    """Bit for bit the uncompressed method for as many steps, bytes too; in the next step they part (control)."""
    make, dense = WARM[name]
    for steps, equal in ((4, True), (5, False)):
        warm, plain = (simulate(N, m, range(steps)) for m in (lambda: make(warmup_steps=4), dense))
        assert same_bits(warm)
        assert torch.equal(warm[0], plain[0]) is equal
    whole, sent = payloads(dense, 6), payloads(lambda: make(warmup_steps=4), 6)
    assert sent[:4] == whole[:4]
    assert max(sent[4:]) < whole[4] / 4


# -- ratios -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Compression.top_k, Compression.random_block, Compression.random_k], ids=lambda f: f.__name__)
def test_ratios_change_at_their_steps(make: Callable[..., Compression]) -> None:
    """Each step sends what a run with that ratio sends, where sizes do not depend on values."""
    schedule = [(1, 2), (3, 7.5), (4, 20)]
    sent = payloads(lambda: make(50, warmup_steps=1, ratio_schedule=schedule, **ALL), 6)
    by_ratio = [payloads(lambda r=r: make(r, **ALL), 1)[0] for r in (2, 7.5, 20)]
    assert sent == [payloads(Compression.none, 1)[0], by_ratio[0], by_ratio[0], by_ratio[1], by_ratio[2], by_ratio[2]]
    assert by_ratio[0] > 2 * by_ratio[1] > 4 * by_ratio[2], "control"


def test_the_servers_ratio_follows_the_workers() -> None:
    """Both ways, unless the server has a compressor of its own."""
    first, then = payloads(lambda: Compression.double_squeeze(TopK(9), ratio_schedule=[(0, 2), (1, 8)], **ALL), 2)
    assert first / then == pytest.approx(4, rel=0.1)
    first, then = payloads(lambda: Compression.double_squeeze(TopK(9), Sign(), ratio_schedule=[(0, 2), (1, 8)], **ALL), 2)
    assert first / then < 3.9


def test_exponential_ratios_are_those_of_deep_gradient_compression() -> None:
    """Sparsities 75, 93.75, 98.4375, 99.6, 99.9 % over four epochs (Lin et al. 2018, section 3.3)."""
    schedule = exponential_ratios(1000, 100)
    assert [step for step, _ in schedule] == [0, 100, 200, 300, 400]
    assert [1 - 1 / ratio for _, ratio in schedule] == pytest.approx([0.75, 0.9375, 0.984375, 0.996, 0.999], abs=5e-4)
    assert exponential_ratios(64, 10, 1) == ((0, 64.0),)
    assert exponential_ratios(64, 10, 3, first=4, start=7) == ((7, 4.0), (17, 16.0), (27, 64.0))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "warm-up -1": (lambda: Compression.top_k(warmup_steps=-1), "warmup_steps"),
    "warm-up 1.5": (lambda: Compression.top_k(warmup_steps=1.5), "warmup_steps"),
    "a number": (lambda: Compression.top_k(ratio_schedule=4), "list of"),
    "no pairs": (lambda: Compression.top_k(ratio_schedule=[4, 16]), "pairs"),
    "descending steps": (lambda: Compression.top_k(ratio_schedule=[(0, 4), (0, 8)]), "ascend"),
    "step 1.5": (lambda: Compression.top_k(ratio_schedule=[(0, 4), (1.5, 8)]), "ascend"),
    "ratio below 1": (lambda: Compression.top_k(ratio_schedule=[(0, 0.01)]), "ratio=100"),
    "a gap": (lambda: Compression.top_k(warmup_steps=3, ratio_schedule=[(4, 4)]), "warmup_steps=4"),
    "no ratio": (lambda: Compression.one_bit(ratio_schedule=[(0, 4)]), "no ratio"),
    "k": (lambda: Compression.top_k(k=3, ratio_schedule=[(0, 4)]), "no ratio"),
    "stages": (lambda: exponential_ratios(100, 10, 0), "stages"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_schedules(what: str) -> None:
    make, message = WRONG[what]
    with pytest.raises(CompressionError, match=message):
        make()


@pytest.mark.parametrize("option", [{"warmup_steps": 2}, {"ratio_schedule": [(0, 3)]}], ids=repr)
def test_ranks_with_other_schedules_are_told(option: dict[str, Any]) -> None:
    def worker(transport: Transport) -> None:
        model = mlp()
        compression = Compression.top_k(10, **(option if transport.rank else {}))
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression, transport=transport)
        with pytest.raises(DisagreementError, match=next(iter(option))):
            train(model, optimizer, transport.rank, [0])

    run_simulated(2, worker)
