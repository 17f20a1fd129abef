"""Classes written for Horovod's `compression=` do the same with our optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.compressors import Identity, TopK
from hvd_ecsgd.exchange import AllReduce, CompressedAllReduce
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, flat, mlp, same_bits, simulate, weights

GRADIENT_NAMES = [name for name, _ in mlp().named_parameters()]


class Halves:
    """As a class, its functions static: Horovod's own way."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        return tensor.half(), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        return tensor.to(ctx)


class Steps:
    """An object with a setting, that sends integers, and a context of another kind."""

    def __init__(self, width: float) -> None:
        self.width = width

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return (tensor.reshape(-1) / self.width).round().to(torch.int32), (tensor.shape, self.width)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        shape, width = ctx
        return tensor.view(shape) * width


class Blocks:
    """Sends a matrix of another shape: the mean of each row."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Size]:
        return tensor.view(tensor.shape[0], -1).mean(1), tensor.shape

    @staticmethod
    def decompress(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return tensor.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def mean(compressor: Any, gradients: list[torch.Tensor]) -> torch.Tensor:
    """What the definition says, of one parameter's gradients by rank."""
    pairs = [compressor.compress(g.clone()) for g in gradients]
    total = torch.stack([t for t, _ in pairs]).to(torch.float64).sum(0)
    if not pairs[0][0].dtype.is_floating_point:
        total = (total / len(gradients)).trunc().to(pairs[0][0].dtype)
    elif pairs[0][0].dtype == torch.float16:  # summed exactly enough and rounded, then divided
        total = total.float().half() / len(gradients)
    else:
        total = (total / len(gradients)).to(pairs[0][0].dtype)
    return compressor.decompress(total, pairs[0][1])


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("compressor", [Halves, Steps(0.001), Blocks], ids=["class", "object", "other shapes"])
def test_the_gradient_is_the_decompressed_mean_of_what_was_compressed(compressor: Any, n: int, sums: bool) -> None:
    def worker(transport: Transport) -> list[torch.Tensor]:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), compressor, transport=transport, sum_gradients=sums)
        x, y = batch(transport.rank, 0)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.synchronize()
        return [p.grad.clone() for p in model.parameters()]

    def own(rank: int) -> list[torch.Tensor]:
        model = mlp()
        x, y = batch(rank, 0)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return [p.grad.clone() for p in model.parameters()]

    results, gradients = run_simulated(n, worker), [own(r) for r in range(n)]
    for i, name in enumerate(GRADIENT_NAMES):
        expected = mean(compressor, [g[i] for g in gradients]) * (n if sums else 1)
        plain = torch.stack([g[i] for g in gradients]).mean(0) * (n if sums else 1)
        assert expected.dim() == 1 or not torch.equal(expected, plain), "control: compression changes something"
        for r in range(n):
            torch.testing.assert_close(results[r][i], expected, rtol=1e-6, atol=1e-9, msg=f"{name} on rank {r} of {n}")
    assert same_bits(flat(r) for r in results)


def test_it_saves_what_the_functions_save() -> None:
    def traffic(compression: Any) -> Any:
        return simulate(2, lambda: compression, range(2), after=lambda model, optimizer, transport: optimizer.compression.traffic)[0]

    dense, half = traffic(Compression.none), traffic(Halves)
    overhead = 2 * 8 * len(GRADIENT_NAMES)  # two steps, 8 bytes a parameter
    assert half.payload == dense.payload // 2 + overhead
    assert dense.dense == half.dense


def test_results_do_not_depend_on_buckets() -> None:
    each, one = (simulate(3, lambda: Halves, bucket_bytes=size) for size in (0, 2**20))
    assert same_bits([*each, *one])


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("compressor", [Halves, Steps(0.001)], ids=["floats", "integers"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_undoes_the_step_on_all_ranks(compressor: Any, bad: float) -> None:
    """Also where the payload could not say so: integers have no NaN."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compressor, transport=transport)
        seen = []
        for step in range(3):
            x, y = batch(transport.rank, step)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss * bad if (step, transport.rank) == (1, 1) else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(weights(model))
        return seen, optimizer.compression.undone_steps

    results = run_simulated(3, worker)
    for seen, undone in results:
        assert undone == 1 and torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert same_bits(seen[-1] for seen, _ in results)


class Overflows(Halves):
    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        return (tensor * 0 + 60000).half(), tensor.dtype


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
def test_a_sum_that_overflows_undoes_the_step() -> None:
    def undone(n: int) -> list[int]:
        return simulate(n, lambda: Overflows, range(1), after=lambda model, optimizer, transport: optimizer.compression.undone_steps)

    assert undone(2) == [1, 1]
    assert undone(1) == [0], "control: alone it fits"


class Uneven(Halves):
    def __init__(self, rank: int, dtype: torch.dtype = torch.float16) -> None:
        self.rank, self.dtype = rank, dtype

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:  # type: ignore[override]
        return tensor.reshape(-1)[: tensor.numel() - self.rank].to(self.dtype), None


@pytest.mark.parametrize(
    "make", [lambda rank: Uneven(rank), lambda rank: Uneven(0, (torch.float16, torch.bfloat16)[rank % 2])], ids=["shape", "dtype"]
)
def test_tensors_that_cannot_be_added_are_an_error_on_all_ranks(make: Callable[[int], Any]) -> None:
    errors: list[str] = []

    def worker(transport: Transport) -> None:
        model = mlp()
        compressor = make(transport.rank)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compressor, transport=transport)
        x, y = batch(transport.rank, 0)
        try:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        except DisagreementError as error:
            errors.append(str(error))

    run_simulated(2, worker)
    assert len(errors) == 2
    assert all("parameter '2.bias'" in e and "Uneven" in e and "rank 0 and rank 1" in e for e in errors)


class NoPair(Halves):
    @staticmethod
    def compress(tensor: torch.Tensor) -> Any:
        return tensor


class Shorter(Halves):
    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        return tensor.reshape(-1)[1:].to(ctx)


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (NoPair, r"parameter '2.bias'.*NoPair.*compress must return a tensor and a context, got tensor"),
        (Shorter, r"parameter '2.bias'.*Shorter.*decompress must return a tensor of 5 elements, got \(4,\)"),
    ],
)
def test_functions_that_return_something_else(compressor: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        simulate(1, lambda: compressor, range(1))


@pytest.mark.parametrize("compressor", [Steps, Compression.top_k, object(), TopK(4)], ids=["class for object", "preset uncalled", "neither", "ours"])
def test_what_has_not_the_two_functions_is_refused(compressor: Any) -> None:
    with pytest.raises(CompressionError, match=r"expected Compression\.<preset>\(…\), bound or not, or what has compress\(tensor\) and decompress"):
        simulate(1, lambda: compressor, range(1))


def test_different_classes_on_different_ranks() -> None:
    def worker(transport: Transport) -> None:
        model = mlp()
        compressor = (Halves, Blocks)[transport.rank]
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compressor, transport=transport)
        x, y = batch(transport.rank, 0)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    with pytest.raises(DisagreementError, match=r"exchange: rank 0 has CompressedAllReduce\(.*Halves\), rank 1 has .*Blocks\)"):
        run_simulated(2, worker)


def test_the_settings_of_objects_are_not_told_apart_by_their_addresses() -> None:
    assert repr(CompressedAllReduce(Steps(0.5))) == repr(CompressedAllReduce(Steps(0.5)))
    assert "Steps" in repr(CompressedAllReduce(Steps(0.5)))


def test_it_takes_no_compressor_of_ours_besides() -> None:
    with pytest.raises(CompressionError, match="compresses by itself"):
        Compression(TopK(4), exchange=CompressedAllReduce(Halves))
    Compression(Identity(), exchange=AllReduce())
