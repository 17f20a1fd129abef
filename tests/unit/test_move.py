"""An update that holds something in few places is applied there alone, to the bit as if all of it were subtracted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import RandomBlock, RandomK, Sign, Threshold, TopK
from hvd_ecsgd.exchange import AllGather, AllReduce
from hvd_ecsgd.feedback import LocalMomentum
from hvd_ecsgd.kernels import move_, native
from hvd_ecsgd.protocols import Places, Sparse, Task
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import batch, mlp
from tests.unit.test_kernels import KEY, SIZES, compiled, library, table, values, variants

METHODS: dict[str, Any] = {
    "detached": lambda: Compression.detached(8, **ALL),
    "local_momentum": lambda: Compression.local_momentum(8),
    "detached-local_steps": lambda: Compression.detached(8, period=2, **ALL),
    "cser": lambda: Compression.cser(RandomBlock(8), TopK(4), 3, **ALL),
    "topk_sgd": lambda: Compression.topk_sgd(10),
    "top_k": lambda: Compression(TopK(10), LocalMomentum(0.3), AllGather(), **ALL),
    "threshold": lambda: Compression(Threshold(10), LocalMomentum(0.3), AllGather(), **ALL),
    "random_k": lambda: Compression(RandomK(10), LocalMomentum(0.3), AllReduce(), **ALL),
}


def trained(method: str, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Parameters and state of three workers after some steps, one of which is undone, one with another learning rate, two with a frozen parameter."""

    def worker(transport: Transport) -> list[torch.Tensor]:
        model = mlp(dtype)
        momentum = 0.0 if method == "topk_sgd" else 0.9
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=1e-3)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), METHODS[method](), transport=transport)
        for t in range(8):
            optimizer.param_groups[0]["lr"] = 0.1 if t < 5 else 0.03
            model[0].weight.requires_grad_(t not in (2, 6))
            optimizer.zero_grad()
            x, y = batch(transport.rank, t, dtype)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss * float("nan") if t == 3 and transport.rank == 1 else loss).backward()
            optimizer.step()
        aggregator: Any = optimizer.compression._aggregator
        for bucket in aggregator.state.buckets:
            if all(r.is_zero for r in bucket.results.kept):
                assert not any(r.buffer.any() for r in bucket.results.kept)
        at_zero = [torch.tensor(sum(r.is_zero for b in aggregator.state.buckets for r in b.results.kept))]
        state = [t for entry in optimizer.compression.state_dict()["parameters"].values() for t in entry.values() if isinstance(t, torch.Tensor)]
        return at_zero + [p.detach() for p in model.parameters()] + state

    return run_simulated(3, worker)


def everywhere(self: Task, payloads: Any, alpha: float) -> torch.Tensor:
    out = self.result().zero_()
    for payload, key in payloads:
        self.compressor.add_(out, payload, self.segments, key, alpha)
    return out


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
def test_moving_by_few_places_gives_the_bits_of_moving_everywhere(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where workers send the same places; results are zeros again afterwards, but where an update is applied as a whole (control)."""
    for kernels in dict.fromkeys((library, None)):
        with native.forced(kernels):
            few = trained(method)
            with monkeypatch.context() as patch:
                patch.setattr(Task, "decoded", everywhere)
                whole = trained(method)
        assert all(w[0] == 0 for w in whole) and all(f[0] > 0 for f in few)
        for f, w in zip(few, whole, strict=True):
            assert len(f) > 5 and all(torch.equal(a, b) for a, b in zip(f[1:], w[1:], strict=True))


@pytest.mark.parametrize("compressor", [RandomBlock(8), RandomK(10), TopK(10), Threshold(10), Threshold(10, two_bits=True)], ids=str)
def test_places_are_where_decoding_adds_something(compressor: Any) -> None:
    """Of a table with empty segments, and of pieces of it."""
    for kernels, n in ((kernels, n) for kernels in dict.fromkeys((library, None)) for n in (1, 3)):
        with native.forced(kernels):
            segments = table(SIZES, torch.float32).piece(n - 1, n)
            payload = compressor.extract_(values("gaussian", sum(SIZES), torch.float32), segments, KEY)
            out = torch.zeros(sum(SIZES))
            compressor.add_(out, payload, segments, KEY)
            places, at = compressor.places(payload, segments, KEY), 0
        assert places.counts.tolist() == [int(v.count_nonzero()) for v in segments.views(out)]
        for count, view in zip(places.counts.tolist(), segments.views(out), strict=True):
            assert torch.equal(view.nonzero().view(-1), places.positions[at : at + count].long())
            at += count
    assert isinstance(compressor, Sparse) and not isinstance(Sign(), Sparse)


def moved(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    segments = table(SIZES, dtype)
    generator = np.random.default_rng(0)
    chosen = [np.flatnonzero(generator.random(n) < 0.2) for n in SIZES]
    places = Places(np.array([c.size for c in chosen], np.int64), torch.from_numpy(np.concatenate(chosen).astype(np.int32)))
    targets, update = [values("gaussian", n, dtype, i) for i, n in enumerate(SIZES)], values("gaussian", segments.numel + 1, dtype, 9)[1:]
    for _ in range(2):  # the second time it is zero
        move_(targets, update, segments, places)
    return targets, update


def move_everything() -> None:
    """Under sanitizers."""
    for dtype in (torch.float32, torch.float64):
        moved(dtype)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_give_what_torch_gives(dtype: torch.dtype) -> None:
    with native.forced(None):
        expected, left = moved(dtype)
    for _ in variants():
        found, rest = moved(dtype)
        assert all(map(torch.equal, expected, found)) and torch.equal(left, rest) and 0 < left.count_nonzero() < left.numel()
