"""verify_every: replicas that drift apart are noticed by every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.kernels import fingerprint
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import mlp, train

N, STEPS, SPOIL = 3, 8, 4


def verifying(case: Case, every: int) -> Compression:
    method = bound_method(case)
    compression = Compression(method.compressor, method.feedback, method.exchange)
    compression.method = replace(method, verify_every=every)
    return compression


def run(case: Case, every: int, spoil: Callable[[Any, Any], object] | None = None) -> list[tuple[int, str]]:
    """The step at which each rank was told of drift, and how; (STEPS, "") if it never was. Rank 1 is spoiled before step 4."""

    def worker(transport: Transport) -> tuple[int, str]:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), verifying(case, every), transport=transport)
        for step in range(STEPS):
            if spoil is not None and step == SPOIL and transport.rank == 1:
                spoil(model, optimizer)
            try:
                train(model, optimizer, transport.rank, [step])
            except DisagreementError as error:
                return step, str(error)
        return STEPS, ""

    return run_simulated(N, worker)


def one_bit_of_a_weight(model: Any, optimizer: Any) -> None:
    with optimizer.compression.at("averaged"), torch.no_grad():
        w = model[2].weight
        w[3, 7] = torch.nextafter(w[3, 7], torch.tensor(torch.inf))


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_training_keeps_replicas_equal(case: Case) -> None:
    """Every method, compared before every step: nothing to say."""
    assert run(case, 1) == [(STEPS, "")] * N


def more_of_a_weight(model: Any, optimizer: Any) -> None:
    with optimizer.compression.at("averaged"), torch.no_grad():
        model[2].weight[3, 7] += 0.1  # the last bit alone could be rounded away again before the next comparison


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["none", "top_k", "double_squeeze", "detached", "pef"])
def test_one_bit_that_differs_is_named_on_every_rank(name: str, every: int) -> None:
    """The last bit of one weight on one rank, at the next comparison; without comparisons nobody notices (control)."""
    spoil = one_bit_of_a_weight if every == 1 else more_of_a_weight
    results = run(by_name(name), every, spoil)
    assert {step for step, _ in results} == {SPOIL if every == 1 else 6}
    for _, said in results:
        assert "parameter '2.weight' (the first of 1)" in said
        assert "on rank 1 than on rank 0" in said
    assert run(by_name(name), 0, spoil) == [(STEPS, "")] * N


def test_ranks_must_compare_at_the_same_steps() -> None:
    def worker(transport: Transport) -> str:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), verifying(by_name("top_k"), 1 + transport.rank), transport=transport)
        with pytest.raises(DisagreementError, match=r"verify_every: rank 0 has 1, rank \d has \d"):
            train(model, optimizer, transport.rank, [0])
        return "told"

    assert run_simulated(N, worker) == ["told"] * N
    with pytest.raises(CompressionError, match="verify_every"):
        Compression.top_k(verify_every=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.bool])
def test_fingerprints(dtype: torch.dtype) -> None:
    """Any single element changes it, an exchange of two does, layout does not; over a chunk's end too."""
    generator = torch.Generator().manual_seed(1)
    t = (torch.randn(3, 5, 4, 2, generator=generator) * 3).to(dtype)
    base = int(fingerprint(t))
    assert base == int(fingerprint(t.clone())) == int(fingerprint(t.to(memory_format=torch.channels_last)))
    for i in range(t.numel()):
        changed = t.clone().view(-1)
        changed[i] = ~changed[i] if dtype == torch.bool else changed[i] + 1
        assert int(fingerprint(changed)) != base
    big = torch.zeros((1 << 20) + 3)
    values = set()
    for i in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 2):
        big[i] = 1.0
        values.add(int(fingerprint(big)))
        big[i] = 0.0
    assert len(values | {int(fingerprint(big))}) == 6
    assert int(fingerprint(torch.empty(0))) == 0
