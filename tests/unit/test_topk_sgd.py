"""TopK-SGD: x − mean e is SGD; nothing else acts on the model (docs/algorithms.md §7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import BlockTopK, TopK
from hvd_ecsgd.exchange import AllGather
from hvd_ecsgd.feedback import LocalMomentum, MemSGD, NoFeedback
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, flat, mlp, same_bits, slot

N = 3
ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
LRS = (0.1, 0.1, 0.02, 0.3, 0.001, 0.05, 0.05, 0.2)

METHODS: dict[str, Callable[[], Any]] = {
    "topk_sgd": lambda: Compression.topk_sgd(8, **ALL),
    "blocks": lambda: Compression.topk_sgd(8, block=64, **ALL),
    "dense small ones": lambda: Compression.topk_sgd(8),
}


def trajectory(make: Callable[[], Any], varying: bool = True) -> list[list[tuple[torch.Tensor, ...]]]:
    """[t][rank]: x before step t, its gradient there, the residual after it; then the last x."""

    def worker(transport: Transport) -> list[Any]:
        model = mlp(torch.float64)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), make(), transport=transport)
        records = []
        for t, lr in enumerate(LRS):
            optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"] = lr, (1e-3, 0.0, 1e-2)[t % 3] if varying else 0.0
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, torch.float64)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            before, gradient = flat(model.parameters()), flat(p.grad for p in model.parameters())
            optimizer.step()
            records.append((before, gradient, slot(optimizer.compression, "residual")))
        return [*records, (flat(model.parameters()),)]

    return [list(step) for step in zip(*run_simulated(N, worker), strict=True)]


def mean(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).mean(0)


def violation(records: Any) -> float:
    z, worst = records[0][0][0], 0.0
    for t, lr in enumerate(LRS):
        expected = z - lr * (mean(r[1] for r in records[t]) + (1e-3, 0.0, 1e-2)[t % 3] * records[t][0][0])
        z = records[t + 1][0][0] - mean(r[2] for r in records[t])
        worst = max(worst, (z - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("name", METHODS)
def test_the_auxiliary_sequence_is_sgd(name: str) -> None:
    records = trajectory(METHODS[name])
    assert all(same_bits(r[0] for r in ranks) for ranks in records)
    assert violation(records) < 1e-13
    assert records[-2][0][2].abs().max() > 1e-3, "control: something was held back"


def test_the_auxiliary_sequence_notices_what_is_lost() -> None:
    """Controls: without feedback, and with weight decay left out."""
    assert violation(trajectory(lambda: Compression(TopK(8), NoFeedback(), AllGather(), **ALL))) > 1e-3
    assert violation(trajectory(METHODS["topk_sgd"], varying=False)) > 1e-5


def test_it_is_local_momentum_with_no_momentum() -> None:
    """To rounding, with half the memory."""
    ours = trajectory(METHODS["topk_sgd"])
    same = trajectory(lambda: Compression(TopK(8), LocalMomentum(0.0), AllGather(), **ALL))
    assert (ours[-1][0][0] - same[-1][0][0]).abs().max() < 1e-13
    other = trajectory(lambda: Compression.topk_sgd(9, **ALL))
    assert (ours[-1][0][0] - other[-1][0][0]).abs().max() > 1e-4, "control"
    assert set(MemSGD().slots(Segments.of([("p", torch.ones(3))]))) == {"residual"}


def test_the_method_itself() -> None:
    """acc = e + ηg; e = acc − TopK(acc); x = x − mean TopK(acc), by hand for one worker and two steps."""
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.5), [("p", p)], Compression.topk_sgd(4, **ALL))
    for gradient in ([4.0, -6.0, 2.0, 0.0], [4.0, 0.0, 0.0, 1.0]):
        p.grad = None
        (p * torch.tensor(gradient, dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert p.tolist() == [1.0 - 4.0, 1.0 + 3.0, 1.0, 1.0]  # -3 of the first; then 2 + 2 of both
    assert slot(optimizer.compression, "residual").tolist() == [0.0, 0.0, 1.0, 0.5]


def test_what_it_refuses() -> None:
    """Momentum, at the start and later; Nesterov needs momentum anyway; another optimizer; an unmodified Horovod; wrong blocks."""
    model = mlp()

    def wrap(optimizer: Any) -> Any:
        return DistributedOptimizer(optimizer, model.named_parameters(), Compression.topk_sgd())

    with pytest.raises(CompressionError, match=r"momentum=0\.9.*no momentum"):
        wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(CompressionError, match="SGD"):
        wrap(torch.optim.Adam(model.parameters()))
    with pytest.raises(CompressionError, match="DistributedOptimizer"):
        Compression.topk_sgd().bind(mlp()).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(CompressionError, match="momentum"):
        optimizer.step()
    for block in (0, -1, 2**15 + 1, 1.5, True):
        with pytest.raises(CompressionError, match="block"):
            Compression.topk_sgd(block=block)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_bad_step_is_undone_and_a_resumed_run_is_the_run(name: str) -> None:
    def worker(transport: Transport) -> Any:
        def make(model: torch.nn.Module) -> Any:
            inner = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
            return DistributedOptimizer(inner, model.named_parameters(), METHODS[name](), transport=transport)

        def steps(model: Any, optimizer: Any, which: Any) -> None:
            for t in which:
                optimizer.zero_grad()
                x, y = batch(transport.rank, t, torch.float64)
                (torch.nn.functional.cross_entropy(model(x), y) * (float("nan") if t == 4 and transport.rank == 1 else 1.0)).backward()
                optimizer.step()

        model, other = mlp(torch.float64), mlp(torch.float64)
        optimizer = make(model)
        steps(model, optimizer, range(4))
        before, x = slot(optimizer.compression, "residual"), flat(model.parameters())
        steps(model, optimizer, [4])
        assert torch.equal(x, flat(model.parameters()))
        torch.testing.assert_close(slot(optimizer.compression, "residual"), before, rtol=1e-13, atol=1e-15)
        other.load_state_dict(model.state_dict())
        resumed = make(other)
        resumed.compression.load_state_dict(optimizer.compression.state_dict())
        steps(model, optimizer, range(5, 8))
        steps(other, resumed, range(5, 8))
        return flat(model.parameters()), flat(other.parameters()), x

    for went_on, resumed, x in run_simulated(N, worker):
        assert torch.equal(went_on, resumed)
        assert not torch.equal(went_on, x), "control"


# -- the compressor ---------------------------------------------------------------------------------------------------------------


def test_blocks_are_those_of_top_k_alone() -> None:
    """Each block is what `TopK` takes of a segment that is this block; conservation is exact; positions take 2 bytes."""
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(64 * 5 + 17, generator=generator, dtype=torch.float64).mul_(4).round_()  # ties on purpose
    segments, key = Segments.of([("v", v)]), Key(0, 0)
    buffer, compressor = v.clone(), BlockTopK(8, 64)
    payload = compressor.extract_(buffer, segments, key)
    decoded = torch.zeros_like(v)
    compressor.add_(decoded, payload, segments, key)
    assert torch.equal(buffer + decoded, v)
    expected = v.clone()
    for part in expected.split(64):
        TopK(8).extract_(part, Segments.of([("part", part)]), key)
    assert torch.equal(buffer, expected)
    assert payload.numel() == 8 * -(-(8 * 5 + 2) * 10 // 8) == compressor.payload_size(segments)
    whole = v.clone()
    TopK(8).extract_(whole, segments, key)
    assert not torch.equal(whole, expected), "control: the largest of all are others"
