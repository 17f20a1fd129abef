"""Sparse gradients of embeddings on own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import by_name
from tests.problems import same_bits, weights
from tests.versions import cpu_scaler

N = 3


class Words(torch.nn.Module):
    """A table, of which the last worker uses nothing in even steps, and a layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = torch.nn.Embedding(90, 16, sparse=sparse)
        self.out = torch.nn.Linear(16, 5)

    def forward(self, rank: int, step: int) -> torch.Tensor:
        if rank == N - 1 and step % 2 == 0:
            return self.out(torch.ones(3, 16, dtype=self.out.weight.dtype))
        return self.out(self.table(torch.arange(7 * rank, 7 * rank + 12) % (20 + 30 * (step % 3))))


def run_words(
    sparse: bool, make: Callable[[], Any], sgd: Callable[[Words], torch.optim.Optimizer], scaled: bool = False, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Weights, the layouts of the table's gradients that the optimizer was given, and whether all could be saved and joined, by rank."""

    def worker(transport: Transport) -> Any:
        model = Words(sparse).to(dtype)
        optimizer = DistributedOptimizer(sgd(model), model.named_parameters(), make(), transport=transport)
        scaler = cpu_scaler(init_scale=2.0**8, growth_interval=2, enabled=scaled)
        optimizer.compression.attach(optimizer, scaler)
        layouts = []
        for step in range(7):
            optimizer.param_groups[0]["lr"] = 0.0 if step == 4 else 0.1
            optimizer.zero_grad(set_to_none=step % 3 > 0)
            loss = model(transport.rank, step).square().mean()
            if loss.requires_grad:
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            grad = model.table.weight.grad
            layouts.append(None if grad is None else grad.is_sparse)
        optimizer.zero_grad()
        if transport.rank:  # rank 0 has no more batches
            model(1, 7).square().mean().backward()
            optimizer.step()
        optimizer.join()
        assert not any(t.is_sparse for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)), "can be saved"
        return weights(model, optimizer.compression), layouts

    return run_simulated(N, worker)


SGDS: dict[str, Callable[[Words], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, eps=1e-3),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["none", "fp16", "top_k", "double_squeeze", "random_block", "detached"])
def test_sparse_gradients_are_those_of_a_dense_table(name: str, scaled: bool) -> None:
    sparse, dense = (run_words(s, by_name(name).make, SGDS["momentum"], scaled) for s in (True, False))
    assert same_bits(w for w, _ in sparse)
    torch.testing.assert_close(sparse[0][0], dense[0][0], rtol=0, atol=1e-6)  # repeated words are added in another order
    assert (sparse[0][0] - weights(Words(True))).abs().max() > 1e-2, "control: it moved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", SGDS)
def test_replicas_stay_equal_under_any_optimizer(inner: str, dtype: torch.dtype) -> None:
    """Also where a worker does not use the table in the first step; optimizers round sparse and dense steps differently."""
    results = run_words(True, lambda: Compression.none, SGDS[inner], dtype == torch.float16, dtype)
    assert same_bits(w for w, _ in results)
    assert not any(layout for _, layouts in results for layout in layouts)


def test_sparse_adam_is_given_sparse_means() -> None:
    """On a worker that does not use the table, too. The run is that of one process with the mean of all gradients."""

    def adam(model: Words) -> torch.optim.Optimizer:
        model.out.requires_grad_(False)
        return torch.optim.SparseAdam([model.table.weight], lr=0.1)

    found = run_words(True, lambda: Compression.none, adam)
    assert all(all(layouts) for _, layouts in found)
    model = Words(True)
    alone = adam(model)
    for step in range(8):
        alone.param_groups[0]["lr"] = 0.0 if step == 4 else 0.1
        alone.zero_grad()
        losses = [model(r, step).square().mean() for r in range(N) if r < N - 1 or step % 2] if step < 7 else [model(1, 7).square().mean()] * (N - 1)
        (torch.stack(losses).sum() / N).backward()
        alone.step()
    assert same_bits(w for w, _ in found)
    torch.testing.assert_close(found[0][0], weights(model), rtol=0, atol=1e-6)
    assert not torch.allclose(weights(model), weights(Words(True)), atol=1e-2), "control: it moved"
