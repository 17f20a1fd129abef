"""PEF: its recursion line by line, and what it equals (docs/algorithms.md §3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import Cast, Identity, TopK
from hvd_ecsgd.exchange import AllGather, AllReduce
from hvd_ecsgd.feedback import PEF
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, flat, mlp, same_bits, slot

N = 3
ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
LRS = (0.1, 0.1, 0.02, 0.3, 0.001, 0.05, 0.05, 0.2)

Records = list[list[tuple[torch.Tensor, ...]]]
"""[t][rank]: x before step t, its gradient there, residual and momentum after it; one entry more for the last x."""


def trajectory(make: Callable[[], Any], lrs: Sequence[float] = LRS, varying: bool = True, **sgd: Any) -> Records:
    def worker(transport: Transport) -> list[Any]:
        model = mlp(torch.float64)
        inner = torch.optim.SGD(model.parameters(), lr=lrs[0], momentum=0.9, **sgd)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), make(), transport=transport)
        records = []
        for t, lr in enumerate(lrs):
            group = optimizer.param_groups[0]
            group["lr"] = lr
            if varying:
                group["momentum"], group["weight_decay"] = (0.9, 0.5, 0.95)[t % 3], (1e-3, 0.0, 1e-2)[t % 3]
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, torch.float64)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            before, gradient = flat(model.parameters()), flat(p.grad for p in model.parameters())
            optimizer.step()
            records.append((before, gradient, slot(optimizer.compression, "residual"), slot(optimizer.compression, "momentum")))
        return [*records, (flat(model.parameters()),)]

    return [list(step) for step in zip(*run_simulated(N, worker), strict=True)]


def mean(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).mean(0)


METHODS: dict[str, Callable[[], Any]] = {
    "random_block": lambda: Compression.pef(8, **ALL),
    "with dense parameters": lambda: Compression.pef(8),
    "top_k": lambda: Compression(TopK(8), PEF(), AllGather(), **ALL),
}


def violation(records: Records, lrs: Sequence[float] = LRS, falls: bool = False) -> float:
    """Of the recursion, with mean c = mean(e_before + η̃g − e_after): what was sent is all that moves the model. η̃ is the largest η so far, or η if
    it `falls`."""
    worst, m, e = 0.0, torch.zeros_like(records[0][0][0]), torch.zeros_like(records[0][0][0])
    for t, lr in enumerate(lrs):
        mu, wd, unit = (0.9, 0.5, 0.95)[t % 3], (1e-3, 0.0, 1e-2)[t % 3], lr if falls else max(lrs[: t + 1])
        after = mean(r[2] for r in records[t])
        sent = e + unit * mean(r[1] for r in records[t]) - after
        m = mu * m + sent / unit + wd * records[t][0][0]
        worst = max(worst, (records[t + 1][0][0] - (records[t][0][0] - lr * m)).abs().max().item(), (records[t][0][3] - m).abs().max().item())
        e = after
    return worst


@pytest.mark.parametrize("name", METHODS)
def test_the_recursion(name: str) -> None:
    """With η, μ and weight decay changing; x and momentum hold the same bits on all ranks."""
    records = trajectory(METHODS[name])
    assert violation(records) < 1e-12
    for ranks in records:
        assert same_bits(r[0] for r in ranks)
        assert same_bits(r[-1] for r in ranks)
    assert violation(records, (LRS[0], *LRS[:-1])) > 1e-3, "control: with other learning rates it is off"
    assert violation(records, falls=True) > 1e-3, "control: so it is with units that fall"
    assert records[-2][0][2].abs().max() > 1e-3, "control: something was held back"


@pytest.mark.parametrize("compressor", [Identity(), None])
def test_it_is_error_feedback_under_momentum_sgd(compressor: Any) -> None:
    """For C(av) = aC(v), to rounding; without compression it is plain momentum SGD on the mean. With a cast (control) it is not."""
    ours = trajectory(lambda: Compression(compressor, PEF(), AllReduce(), **ALL) if compressor else Compression.pef(8, **ALL))
    same = trajectory(lambda: Compression.none if compressor else Compression.random_block(8, **ALL))
    assert (ours[-1][0][0] - same[-1][0][0]).abs().max() < 1e-12
    cast = trajectory(lambda: Compression(Cast(), PEF(), AllReduce(), **ALL))
    assert (cast[-1][0][0] - same[-1][0][0]).abs().max() > 1e-7


def test_it_differs_from_momentum_on_the_worker() -> None:
    """Control of the comparison above: momentum before the compressor is another method."""
    ours, other = trajectory(METHODS["random_block"]), trajectory(lambda: Compression.local_momentum(8, **ALL))
    assert (ours[-1][0][0] - other[-1][0][0]).abs().max() > 1e-3


def test_what_it_refuses() -> None:
    """Nesterov, another optimizer, a sum, and an unmodified Horovod."""
    model = mlp()

    def wrap(optimizer: Any, **options: Any) -> Any:
        return DistributedOptimizer(optimizer, model.named_parameters(), Compression.pef(), **options)

    with pytest.raises(CompressionError, match="nesterov"):
        wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True))
    with pytest.raises(CompressionError, match="SGD"):
        wrap(torch.optim.Adam(model.parameters()))
    with pytest.raises(CompressionError, match="sum"):
        wrap(torch.optim.SGD(model.parameters(), lr=0.1), sum_gradients=True)
    with pytest.raises(CompressionError, match="DistributedOptimizer"):
        Compression.pef().bind(mlp()).attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_a_bad_step_is_undone_and_a_resumed_run_is_the_run() -> None:
    def worker(transport: Transport) -> Any:
        def make(model: torch.nn.Module) -> Any:
            inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
            return DistributedOptimizer(inner, model.named_parameters(), Compression.pef(8), transport=transport)

        def steps(model: Any, optimizer: Any, which: Any) -> None:
            for t in which:
                optimizer.zero_grad()
                x, y = batch(transport.rank, t, torch.float64)
                (torch.nn.functional.cross_entropy(model(x), y) * (float("nan") if t == 4 and transport.rank == 1 else 1.0)).backward()
                optimizer.step()

        model, other = mlp(torch.float64), mlp(torch.float64)
        optimizer = make(model)
        steps(model, optimizer, range(4))
        before, x = optimizer.compression.state_dict(), flat(model.parameters())
        steps(model, optimizer, [4])
        after = optimizer.compression.state_dict()
        assert torch.equal(x, flat(model.parameters()))
        for name, entry in before["parameters"].items():
            assert torch.equal(after["parameters"][name]["momentum"], entry["momentum"])
            torch.testing.assert_close(after["parameters"][name]["residual"], entry["residual"], rtol=1e-13, atol=1e-14)
        other.load_state_dict(model.state_dict())
        resumed = make(other)
        resumed.compression.load_state_dict(after)
        steps(model, optimizer, range(5, 8))
        steps(other, resumed, range(5, 8))
        return flat(model.parameters()), flat(other.parameters()), x

    for went_on, resumed, x in run_simulated(N, worker):
        assert torch.equal(went_on, resumed)
        assert not torch.equal(went_on, x), "control"
