"""Writes to shifted parameters that raise no version counter: kept inside `at("averaged")`, told of outside, never lost in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.core.bucket import Bucket
from hvd_ecsgd.kernels import column_sums
from tests.cases import ALL
from tests.problems import batch, mlp, weights

Model = torch.nn.Module


def pruned(model: Any) -> None:
    """A few entries of the last matrix."""
    w = model[-1].weight
    mask = torch.ones_like(w)
    mask.view(-1)[::97] = 0
    w.data.mul_(mask)


def normalized(model: Any) -> None:
    model[0].weight.data = torch.nn.functional.normalize(model[0].weight.data)


def clamped(model: Any) -> None:
    """All parameters, where few entries are touched."""
    for p in model.parameters():
        p.data.clamp_(-0.9 * float(p.detach().abs().max()), 10.0)


def from_vector(model: Any) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    vector[5] += 1e-3
    torch.nn.utils.vector_to_parameters(vector, model.parameters())


def through_numpy(model: Any) -> None:
    model[0].weight.detach().numpy()[1, 2] = 0.125


def reassigned(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.t().contiguous().t() + 1.0


def permuted(model: Any) -> None:
    model[0].weight.data.copy_(model[0].weight.data.flip(0))


WRITES: dict[str, Callable[[Any], None]] = {f.__name__: f for f in (pruned, normalized, clamped, from_vector, through_numpy, reassigned, permuted)}
SHIFTED: dict[str, Callable[[], Compression]] = {
    "detached": lambda: Compression.detached(8, **ALL),
    "cser": lambda: Compression.cser(**ALL),
    "detached(0, period=2)": lambda: Compression.detached(8, lambda_=0.0, period=2, **ALL),
}
PAIRS = [(method, write) for method in SHIFTED for write in WRITES]


def trained(make: Callable[[], Any], steps: int = 2) -> tuple[Any, Any]:
    model = mlp()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), make())
    for t in range(steps):
        step(model, optimizer, t)
    return model, optimizer


def step(model: Any, optimizer: Any, t: int, between: Callable[[Any], None] = lambda model: None) -> None:
    optimizer.zero_grad()
    x, y = batch(0, t)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    between(model)
    optimizer.step()


@pytest.mark.parametrize(("method", "write"), PAIRS)
def test_inside_averaged_what_was_written_stands(method: str, write: str) -> None:
    model, optimizer = trained(SHIFTED[method])
    compression = optimizer.compression
    with compression.at("averaged"):
        before = weights(model)
        WRITES[write](model)
        written = weights(model)
    assert not torch.equal(before, written)
    with compression.at("averaged"):
        assert torch.equal(weights(model), written)
    saved = compression.state_dict()["parameters"]
    for name, p in zip(saved_names(model), written.split([p.numel() for p in model.parameters()])):
        if "x" in saved[name]:
            assert torch.equal(saved[name]["x"].view(-1), p), "so do checkpoints"
    for t in (2, 3):  # of a period of two steps, both
        step(model, optimizer, t)
    with compression.at("averaged"):
        assert 0 < (weights(model) - written).abs().max() < 0.5, "and training goes on from there"


def saved_names(model: Model) -> Iterator[str]:
    return (name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("method", "write"), PAIRS)
def test_outside_a_write_is_told_of_before_it_would_be_lost(method: str, write: str) -> None:
    told = r"parameter '\d\.(weight|bias)' was written to .*inside `with compression\.at\('averaged'\):`"
    model, optimizer = trained(SHIFTED[method])
    WRITES[write](model)
    with pytest.raises(CompressionError, match=told), optimizer.compression.at("averaged"):
        pass
    written = weights(model)
    with pytest.raises(CompressionError, match=told):
        step(model, optimizer, 3)
    assert torch.equal(weights(model), written), "it is still there"


@pytest.mark.parametrize("make", SHIFTED.values(), ids=SHIFTED)
@pytest.mark.parametrize("write", [pruned, lambda model: model[0].weight.detach().copy_(model[0].weight.detach() * 2)], ids=["data", "in place"])
def test_a_write_between_backward_and_step_is_told_of(make: Callable[[], Compression], write: Callable[[Any], None]) -> None:
    model, optimizer = trained(make)
    with pytest.raises(CompressionError, match="was written to"):
        step(model, optimizer, 3, between=write)


def test_a_write_before_a_step_that_is_undone_is_told_of() -> None:
    model, optimizer = trained(SHIFTED["detached"])
    pruned(model)
    with warnings.catch_warnings(), pytest.raises(CompressionError, match="was written to"):
        warnings.simplefilter("ignore")
        optimizer.zero_grad()
        (model(batch(0, 3)[0]).sum() * float("nan")).backward()
        optimizer.step()


@pytest.mark.parametrize("make", SHIFTED.values(), ids=SHIFTED)
def test_without_a_write_nothing_is_raised_and_nothing_changes(make: Callable[[], Compression], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with parameters that are moved in memory without a change, as flattened ones of recurrent networks, and `at` in between. The bits are
    those of a training in which nobody looks at contents."""
    model, optimizer = trained(make, 2)
    for p in model.parameters():
        p.data = p.data.clone()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    for point in ("averaged", "local", "virtual"):
        with optimizer.compression.at(point):
            weights(model)
    step(model, optimizer, 2)
    monkeypatch.setattr(Bucket, "written_to", lambda self, contents: None)
    assert torch.equal(weights(trained(make, 3)[0]), weights(model))


@pytest.mark.parametrize("make", [Compression.top_k, lambda: Compression.local_momentum(8, **ALL), Compression.none])
def test_methods_that_do_not_shift_take_every_write(make: Callable[[], Compression]) -> None:
    model, optimizer = trained(make)
    for write in WRITES.values():
        write(model)
    before = weights(model)
    step(model, optimizer, 3)
    assert (weights(model) - before).abs().max() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 11), (502,), (33, 1000), (128, 512), (3, 5, 7, 9), (0,)])
def test_column_sums_tell_any_change(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = column_sums(t)
    assert same.numel() < 510 and same.dtype == torch.int64
    if t.numel() == 0:
        return
    assert torch.equal(column_sums(t.clone()), same) and torch.equal(column_sums(torch.cat([t.view(-1)[:1], t.view(-1)])[1:].view(shape)), same)
    for place in {0, t.numel() // 2, t.numel() - 1}:
        changed = t.clone()
        changed.view(-1)[place] = torch.nextafter(t.view(-1)[place].double(), torch.tensor(9.0).double()).to(dtype) + 0.01
        assert not torch.equal(column_sums(changed), same), place
    for other in (t.flip(0), t.roll(1, -1), t.abs(), 2 * t):
        assert torch.equal(other, t) or not torch.equal(column_sums(other.contiguous()), same)
    turned = torch.randn(6, 4, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    before = column_sums(turned)
    turned.data[1, 2, 3, 1] += 1
    assert not torch.equal(column_sums(turned), before)
    spread = torch.zeros(9, 9, dtype=dtype)[::2, 1::3]
    before = column_sums(spread)
    spread[2, 2] = 1
    assert not torch.equal(column_sums(spread), before)
