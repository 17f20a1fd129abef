"""bfloat16 on every road: bare, on Horovod, in two passes, in an all-reduce."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import (
    Cast,
)
from hvd_ecsgd.horovod.transport import HorovodTransport, SlotTransport
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import run_simulated
from tests.cases import ALL
from tests.unit.test_compressor_training import METHODS, trained


class FakeHorovod(types.ModuleType):
    """What `HorovodTransport` uses of `horovod.torch`, for one process; refuses bfloat16, as Horovod does."""

    def __init__(self, initialised: bool = True) -> None:
        super().__init__("horovod.torch")
        self.initialised = initialised
        self.sent: list[torch.dtype] = []
        self.global_process_set = types.SimpleNamespace(rank=lambda: 0, size=lambda: 1)
        self.Sum = object()

    def is_initialized(self) -> bool:
        return self.initialised

    def _check(self, t: torch.Tensor) -> torch.Tensor:
        assert t.dtype != torch.bfloat16
        self.sent.append(t.dtype)
        return t

    def allgather_async(self, t: torch.Tensor, name: str, **options: Any) -> Any:
        return self._check(t).clone()

    def alltoall_async(self, t: torch.Tensor, splits: torch.Tensor, name: str, **options: Any) -> Any:
        assert int(splits.sum()) == t.shape[0]
        return self._check(t).clone(), splits

    def gloo_enabled(self) -> bool:
        return False

    def synchronize(self, started: Any) -> Any:
        return started


@pytest.fixture
def horovod(monkeypatch: pytest.MonkeyPatch) -> FakeHorovod:
    fake = FakeHorovod()
    package = types.ModuleType("horovod")
    package.torch = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "horovod", package)
    monkeypatch.setitem(sys.modules, "horovod.torch", fake)
    return fake


def test_bare_bf16_is_like_bare_fp16_where_it_can_travel() -> None:
    t = torch.tensor([1.0, 1 / 3, -2.5], dtype=torch.float64)
    for made in (Compression.bf16, Compression.bf16()):
        sent, context = made.compress(t)
        assert sent.dtype == torch.bfloat16
        assert torch.equal(made.decompress(sent, context), t.to(torch.bfloat16).double())
    integers = torch.tensor([1, 2])
    assert Compression.bf16.compress(integers)[0] is integers


def test_bare_bf16_on_horovod_names_bind(horovod: FakeHorovod) -> None:
    for made in (Compression.bf16, Compression.bf16()):
        with pytest.raises(CompressionError, match=r"bf16\.bind\(model\)"):
            made.compress(torch.ones(3))
    assert Compression.fp16.compress(torch.ones(3))[0].dtype == torch.float16, "control"
    horovod.initialised = False
    assert Compression.bf16.compress(torch.ones(3))[0].dtype == torch.bfloat16, "control: Horovod is imported and not running"


@pytest.mark.parametrize("transport", [HorovodTransport, SlotTransport])
def test_an_all_reduce_of_bfloat16_on_horovod_says_what_to_do(horovod: FakeHorovod, transport: Any) -> None:
    with pytest.raises(CompressionError, match=r"Compression\.bf16\(\).*TwoPass"):
        transport().allreduce_(torch.ones(3, dtype=torch.bfloat16), "w")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(6,), (0,), (3, 2), (0, 2)])
def test_what_horovod_does_not_know_travels_as_bytes(horovod: FakeHorovod, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = (torch.arange(6.0).to(dtype) if 0 not in shape else torch.empty(0, dtype=dtype)).view(shape)
    transport = SlotTransport()
    for handle in (transport.allgather(t, "a", [t.shape[0]]), transport.allgather(t, "b"), transport.alltoall(t, [t.shape[0]], "c")):
        (received,) = handle.wait()
        assert received.dtype == dtype
        assert received.shape == t.shape
        assert torch.equal(received, t)
    wire = torch.uint8 if dtype == torch.bfloat16 else dtype
    assert set(horovod.sent) == {wire, torch.int64}  # int64: the number of rows


def test_bf16_is_a_mean_rounded_once_on_each_way() -> None:
    """Two workers: the mean of the rounded gradients, in float32, rounded once more; error feedback keeps what was rounded off."""
    gradients = [torch.tensor([1.001, 3.0, -1 / 3]), torch.tensor([1.0, 1 / 7, 1e-3])]

    def worker(transport: Any) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("w", p)], Compression.bf16(**ALL), transport=transport)
        (p * gradients[transport.rank]).sum().backward()
        optimizer.step()
        return p.detach()

    expected = -(sum(g.bfloat16().float() for g in gradients) / 2).bfloat16().float()
    for result in run_simulated(2, worker):
        assert torch.equal(result, expected)
    assert not torch.equal(expected, -sum(gradients) / 2), "control: rounding shows"


def test_bf16_sends_half_the_bytes() -> None:
    ratios = [trained(3, make, steps=2)[0][1].traffic.ratio for make in (METHODS["bf16"], METHODS["bf16, all-reduce"])]
    assert ratios == pytest.approx([2.0, 2.0], rel=0.05)


def test_unsummed_bfloat16_payloads_add_up_in_an_all_reduce() -> None:
    v = torch.tensor([1.0, 2.0, -3.0])
    segments = Segments.of([("w", v)])
    payload = Cast(torch.bfloat16).extract_(v.clone(), segments, Key(0, 0))
    out = torch.zeros(3)
    Cast(torch.bfloat16).add_(out, payload + payload, segments, Key(0, 0), 0.5)
    assert torch.equal(out, v)
