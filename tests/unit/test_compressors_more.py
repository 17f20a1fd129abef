"""Settings that are refused or warned of, bfloat16 on every road, and payloads of variable size in the exchanges."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hvd_ecsgd import BoundCompression, Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import (
    QSGD,
    BlockTopK,
    Cast,
    GlobalRandomBlock,
    Identity,
    Natural,
    RandomBlock,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    base,
)
from hvd_ecsgd.exchange import AllGather, AllReduce, TwoPass
from hvd_ecsgd.feedback import ErrorFeedback, LocalMomentum, NoFeedback
from hvd_ecsgd.horovod.transport import HorovodTransport, SlotTransport
from hvd_ecsgd.protocols import Compressor, StepContext, UnbiasedCompressor
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import run_simulated

ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    base._warned.clear()
    yield
    base._warned.clear()


# -- settings --------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "cast to float32": (lambda: Cast(torch.float32), "float16 or torch.bfloat16"),
    "global ratio": (lambda: Compression.global_random_block(0.5), "ratio"),
    "fewer blocks than the ratio": (lambda: Compression.global_random_block(64, 10), "blocks ≥ ratio"),
    "no blocks": (lambda: Compression.global_random_block(4, 0), "blocks"),
    "blocks a fraction": (lambda: GlobalRandomBlock(4, 2.5), "blocks"),  # type: ignore[arg-type]
    "random_k ratio": (lambda: Compression.random_k(0.1), "ratio"),
    "random_k unbiased": (lambda: RandomK(4, 1), "unbiased"),  # type: ignore[arg-type]
    "threshold ratio": (lambda: Compression.threshold(float("nan")), "ratio"),
    "sample 0": (lambda: Compression.threshold(sample=0), "sample"),
    "sample above 1": (lambda: Compression.threshold(sample=1.5), "sample"),
    "two bits": (lambda: Compression.threshold(two_bits=2), "two_bits"),
    "sample true": (lambda: Threshold(4, True), "sample"),
    "k and block": (lambda: Compression.top_k(k=3, block=512), "not both"),
    "block 0": (lambda: Compression.top_k(block=0), "block"),
    "block beyond int16": (lambda: BlockTopK(4, 2**15 + 1), "block"),
    "sign block": (lambda: Compression.one_bit(block=-1), "block"),
    "ternary scale": (lambda: Compression.ternary("max"), "scale"),  # type: ignore[arg-type]
    "levels 0": (lambda: Compression.qsgd(0), "levels"),
    "levels above 127": (lambda: Compression.qsgd(128), "levels"),
    "bucket": (lambda: Compression.qsgd(bucket=True), "bucket"),
    "norm": (lambda: Compression.qsgd(norm="l1"), "norm"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings(what: str) -> None:
    make, message = WRONG[what]
    with pytest.raises(CompressionError, match=message):
        make()


def test_compressors_are_what_the_protocols_say() -> None:
    every = [Cast(), GlobalRandomBlock(), RandomK(), Threshold(), BlockTopK(), Sign(), Ternary(), QSGD(), Natural(), Identity(), TopK()]
    assert all(isinstance(c, Compressor) for c in every)
    assert [c for c in every if c.unbiased] == [QSGD(), Natural(), Identity()]
    assert all(isinstance(c, UnbiasedCompressor) for c in every if c.unbiased)
    assert isinstance(RandomK(unbiased=True), UnbiasedCompressor)
    assert not isinstance(TopK(), UnbiasedCompressor)


# -- feedback and δ --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[], Any]] = {
    "error feedback": lambda: Compression(RandomK(4, True)),
    "by the preset": lambda: Compression.random_k(4, unbiased=True, error_feedback=True),
    "local momentum": lambda: Compression(RandomK(4, True), LocalMomentum(0.3)),
    "on the worker of two": lambda: Compression.double_squeeze(RandomK(4, True), Identity()),
    "on the server": lambda: Compression(TopK(), ErrorFeedback(), TwoPass(RandomK(4, True))),
    "on the server, by default": lambda: Compression(RandomK(4, True), NoFeedback(), TwoPass()),
    "on a server that skips": lambda: Compression.comp_skip(None, None, TopK(), RandomK(4, True)),
    "in a reset": lambda: Compression.cser(TopK(), RandomK(4, True)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unbiased_scaling_with_feedback_is_refused(what: str) -> None:
    with pytest.raises(CompressionError, match=r"2 − d/k.*unbiased=False"):
        REFUSED[what]()


def test_unbiased_scaling_without_feedback_is_allowed() -> None:
    """Control."""
    assert Compression.random_k(4, unbiased=True).method.feedback == NoFeedback()
    Compression(RandomK(4, True), NoFeedback(), TwoPass(server_feedback=False))
    Compression(RandomK(4, True), NoFeedback(), TwoPass(TopK()))
    assert Compression.random_k(4).method.feedback == ErrorFeedback()


BIASED = [Sign(), Ternary(), TopK(), BlockTopK(), Threshold(), RandomK(4), RandomBlock(), GlobalRandomBlock(), Cast(), "qsgd"]


@pytest.mark.parametrize("compressor", BIASED, ids=repr)
def test_methods_for_unbiased_compressors_refuse_others(compressor: Any) -> None:
    with pytest.raises(CompressionError, match=r"unbiased: expected an unbiased compressor.*error feedback"):
        Compression.unbiased(compressor)


def test_methods_for_unbiased_compressors_take_them() -> None:
    """Control."""
    for compressor in (QSGD(), Natural(), RandomK(4, unbiased=True), Identity()):
        assert Compression.unbiased(compressor).method.feedback == NoFeedback()
    assert Compression.unbiased(RandomK(4, unbiased=True)).method == Compression.random_k(4, unbiased=True).method


WARNED: dict[str, tuple[Callable[[], Any], str]] = {
    "sign": (lambda: Compression.one_bit("l2"), "2‖v‖₁/"),
    "ternary": (lambda: Compression.ternary("l2"), "√nnz"),
    "both sides": (lambda: Compression.double_squeeze(Ternary()), "√nnz"),
    "server only": (lambda: Compression(TopK(), NoFeedback(), TwoPass(Sign("l2"))), "2‖v‖₁/"),
    "qsgd": (lambda: Compression.qsgd(7, error_feedback=True), "ω = 3.23"),
    "momentum": (lambda: Compression(Sign("l2"), LocalMomentum(0.0)), "2‖v‖₁/"),
}


@pytest.mark.parametrize("what", WARNED)
def test_no_contraction_in_general_warns_once(what: str) -> None:
    make, message = WARNED[what]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            make()
    (warning,) = caught
    assert warning.category is UserWarning
    assert warning.filename == __file__, "it points at the line that chose the method"
    assert message in str(warning.message)
    assert "contraction" in str(warning.message)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Compression.one_bit("l2", error_feedback=False),
        lambda: Compression.one_bit(),
        lambda: Compression.one_bit(block=64),
        lambda: Compression.ternary(),
        lambda: Compression.ternary("l2", error_feedback=False),
        lambda: Compression(Ternary(), NoFeedback(), TwoPass(server_feedback=False)),
        lambda: Compression.qsgd(7),
        lambda: Compression.qsgd(error_feedback=True),
        lambda: Compression.natural(error_feedback=True),
        lambda: Compression.double_squeeze(),
        lambda: Compression.threshold(),
        lambda: Compression.global_random_block(),
    ],
)
def test_contractions_and_methods_without_feedback_do_not_warn(make: Callable[[], Any]) -> None:
    """Control."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


# -- bfloat16 --------------------------------------------------------------------------------------------------------------------


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


# -- training on simulated workers -----------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    made = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return made


def trained(
    n: int, make: Callable[[], Any], steps: int = 8, bucket_bytes: int = 2**20, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, BoundCompression]]:
    def worker(transport: Any) -> tuple[torch.Tensor, BoundCompression]:
        net = model(dtype)
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, net.named_parameters(), make(), transport=transport, bucket_bytes=bucket_bytes)
        for step in range(steps):
            x = torch.randn(5, 7, generator=torch.Generator().manual_seed(100 * step + transport.rank)).to(dtype)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()]), optimizer.compression

    return run_simulated(n, worker)


METHODS: dict[str, Callable[[], Any]] = {
    "threshold, all-gather": lambda: Compression.threshold(4, **ALL),
    "threshold, two-pass": lambda: Compression.double_squeeze(Threshold(4), **ALL),
    "threshold, two-pass, dense server": lambda: Compression.double_squeeze(Threshold(4), Identity(), **ALL),
    "signs, two-pass, threshold server": lambda: Compression.double_squeeze(Sign(), Threshold(4), **ALL),
    "global random block": lambda: Compression.global_random_block(4, 40, **ALL),
    "global random block, two-pass": lambda: Compression.double_squeeze(GlobalRandomBlock(4, 40), **ALL),
    "global random block, all-gather": lambda: Compression(GlobalRandomBlock(4, 40), ErrorFeedback(), AllGather(), **ALL),
    "random k": lambda: Compression.random_k(4, **ALL),
    "qsgd, two-pass": lambda: Compression.double_squeeze(QSGD(15, 64, "max"), Natural(), **ALL),
    "bf16": lambda: Compression.bf16(**ALL),
    "bf16, all-reduce": lambda: Compression(Cast(torch.bfloat16), exchange=AllReduce(), **ALL),
}


@pytest.mark.parametrize("what", METHODS)
def test_all_ranks_hold_the_same_bits_whatever_the_buckets(what: str) -> None:
    """Three workers, one bucket or one per parameter; pieces of some parameters are empty."""
    runs = [trained(3, METHODS[what], bucket_bytes=size) for size in (0, 2**20)]
    reference = runs[0][0][0]
    assert all(torch.equal(weights, reference) for run in runs for weights, _ in run)
    assert reference.isfinite().all()
    assert not torch.equal(reference, torch.cat([p.detach().flatten() for p in model().parameters()]))


@pytest.mark.parametrize("exchange", [AllGather(), TwoPass(Identity(), server_feedback=False)], ids=repr)
@pytest.mark.parametrize("compressor", [QSGD(1, 64), QSGD(7, 64, "max"), Natural()], ids=repr)
def test_private_draws_average_out(compressor: Any, exchange: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradient on n workers: the error of the mean has 1/n of a draw's exact variance. With draws that ranks share (control) it has all."""
    v = torch.randn(8192, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def error(n: int) -> float:
        def worker(transport: Any) -> float:
            p = torch.nn.Parameter(torch.zeros_like(v))
            method = Compression(compressor, NoFeedback(), exchange, **ALL)
            optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("p", p)], method, transport=transport)
            p.grad = v.clone()
            optimizer.step()
            return float((p.detach() + v).square().sum() / v.square().sum())

        return run_simulated(n, worker)[0]

    exact = 1 - compressor.delta(v)
    for n in (2, 8):
        assert error(n) == pytest.approx(exact / n, rel=0.15)
    monkeypatch.setattr(StepContext, "key", lambda self, compressor, stage, rank=None: Key(self.seed, self.step, None, stage, self.size))
    assert error(8) == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("what", [m for m in METHODS if "bf16" not in m])
def test_nothing_is_lost(what: str) -> None:
    """One step from zero residuals: mean update = mean gradient − mean e − E, to float64 rounding."""
    runs = trained(3, METHODS[what], steps=1, dtype=torch.float64)
    dense = trained(3, lambda: Compression.none(), steps=1, dtype=torch.float64)
    states = [bound.state_dict()["parameters"] for _, bound in runs]
    start = torch.cat([p.detach().flatten() for p in model(torch.float64).parameters()])
    held = torch.zeros_like(start)
    at = 0
    for name, p in model().named_parameters():
        part = held[at : at + p.numel()]
        for state in states:
            part += state[name]["residual"].flatten() / len(states)
        server = [state[name]["server_residual"].flatten() for state in states if "server_residual" in state[name]]
        if server:
            part += torch.cat(server)
        at += p.numel()
    assert held.any()
    torch.testing.assert_close(runs[0][0] - start - 0.05 * held, dense[0][0] - start, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(runs[0][0], dense[0][0]), "control: without the residuals it does not add up"


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
