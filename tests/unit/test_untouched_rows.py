"""Which compressors move rows of an embedding that got no gradient on any rank: a scale for the whole parameter does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from tests.cases import ALL

ROWS, WIDTH = 16, 64


@pytest.mark.parametrize(
    ("compression", "moves"),
    [
        (Compression.one_bit(**ALL), True),
        (Compression.double_squeeze(**ALL), True),
        (Compression.one_bit(block=WIDTH, **ALL), False),
        (Compression.ternary(**ALL), False),
        (Compression.top_k(8, **ALL), False),
        (Compression.random_block(8, **ALL), False),
    ],
    ids=["one_bit", "double_squeeze", "one_bit by block", "ternary", "top_k", "random_block"],
)
def test_rows_without_a_gradient(compression: Any, moves: bool) -> None:
    """With blocks that do not reach from a row with a gradient into one without."""
    torch.manual_seed(0)
    model = torch.nn.Embedding(ROWS, WIDTH)
    before = model.weight.detach().clone()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=compression.bind(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(4)).square().sum().backward()
        optimizer.step()
    moved = (model.weight.detach() - before).abs().amax(1) > 0
    assert bool(moved[:4].any()) and bool(moved[4:].any()) is moves
