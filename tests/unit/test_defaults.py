"""A script's default device and default type are its own: whatever they are, everything in here gives the bits that it gives without."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_ecsgd
import mpi_backend
from hvd_ecsgd import Compression, DistributedOptimizer, GradientExchange, load_checkpoint, save_checkpoint
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import COMPRESSORS, Case, bound_method, ids, rows_that_cover
from tests.problems import batch, mlp
from tests.unit.test_state import equal
from tests.versions import cpu_scaler

Defaults = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Of the whole process, while a default device is of one thread."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    """Set for good, as scripts do; the other way is `with torch.device("meta")`."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def backward(model: torch.nn.Module, loss: torch.Tensor) -> None:
    """torch sets a default device aside while `loss.backward()` runs. So all of the exchange is left to the optimizer's step."""
    for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = gradient


class Script:
    """Model and batches, made before any default is set."""

    def __init__(self, rank: int, steps: int) -> None:
        self.model = mlp()
        self.batches = [batch(rank, step) for step in range(steps)]

    def wrap(self, compression: Any, transport: Transport, momentum: float = 0.0) -> Any:
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=momentum, weight_decay=1e-4)
        return DistributedOptimizer(sgd, self.model.named_parameters(), compression, transport=transport)

    def step(self, optimizer: Any, step: int, factor: float = 1.0) -> None:
        optimizer.zero_grad()
        x, y = self.batches[step]
        backward(self.model, factor * torch.nn.functional.cross_entropy(self.model(x), y))
        optimizer.step()

    def state(self, optimizer: Any) -> dict[str, Any]:
        with optimizer.compression.at("averaged"):
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return {"weights": weights, "optimizer": optimizer.state_dict()["state"], "compression": optimizer.compression.state_dict()}


def steps_of(case: Case) -> int:
    """As many as it takes to warm up, to exchange after local steps, and to follow a schedule of ratios."""
    method = bound_method(case)
    return 7 if getattr(method.feedback, "period", 1) > 1 or method.warmup_steps or method.ratio_schedule else 3


def trained(case: Case, n: int, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """What each of n workers has after some steps, the last one from its own state, loaded."""
    steps = steps_of(case)

    def worker(transport: Transport) -> dict[str, Any]:
        script = Script(transport.rank, steps)
        with torch.device(device):
            optimizer = script.wrap(case.make(), transport, case.momentum)
            for step in range(steps - 1):
                script.step(optimizer, step)
            optimizer.compression.load_state_dict(optimizer.compression.state_dict())
            script.step(optimizer, steps - 1)
            return script.state(optimizer)

    with default_type(dtype):
        return run_simulated(n, worker)


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_defaults_change_no_method(case: Case) -> None:
    for n in (1, 2):
        plain, other = trained(case, n, torch.float32, "cpu"), trained(case, n, torch.float64, "meta")
        for rank in range(n):
            assert equal(other[rank], plain[rank]), f"rank {rank} of {n}"


def used(folder: Path, defaults: Defaults) -> list[dict[str, Any]]:
    """What two workers have after all that can be done with a method but plain steps."""

    def worker(transport: Transport) -> dict[str, Any]:
        script, other, third = (Script(transport.rank, 10) for _ in range(3))
        gradients = [torch.full_like(p, 1.0 + transport.rank) for p in script.model.parameters()]
        found: dict[str, Any] = {}
        with defaults():
            preset = Compression.detached(8, verify_every=2)
            optimizer = script.wrap(preset, transport)
            for step in range(5):
                script.step(optimizer, step, float("nan") if step == transport.rank == 1 else 1.0)
            with optimizer.compression.at("virtual"):
                found["virtual"] = {name: p.detach().clone() for name, p in script.model.named_parameters()}
            save_checkpoint(folder, script.model, optimizer, optimizer.compression, extras={"best": 0.5, "rank": gradients[0], "words": b"x"})
            resumed = other.wrap(preset, transport)
            found["extras"] = load_checkpoint(folder, other.model, resumed, resumed.compression).extras
            other.step(resumed, 5)
            found["resumed"] = other.state(resumed)

            optimizer = third.wrap(Compression.top_k(8), transport)
            for step, method in enumerate((Compression.double_squeeze(), Compression.threshold(4), Compression.top_k(8))):
                third.step(optimizer, step)
                optimizer.compression.switch(method)
            optimizer.load_state_dict(optimizer.state_dict())
            scaler = cpu_scaler(init_scale=4.0)
            optimizer.compression.attach(optimizer, scaler)
            optimizer.zero_grad()
            backward(third.model, scaler.scale(third.model(third.batches[3][0]).square().sum()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.compression.attach(optimizer)
            if transport.rank:
                third.step(optimizer, 4)
            optimizer.join()
            found["joined"] = third.state(optimizer)
            exchange = GradientExchange(script.model.named_parameters(), Compression.top_k(8), transport)
            found["means"] = exchange.reduce(gradients)
        return found

    return run_simulated(2, worker)


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf")
@pytest.mark.parametrize(
    ("dtype", "defaults"),
    [(torch.float64, contextlib.nullcontext), (torch.float32, lambda: torch.device("meta")), (torch.float32, default_device)],
    ids=["float64", "with torch.device", "set_default_device"],
)
def test_defaults_change_nothing_else(tmp_path: Path, dtype: torch.dtype, defaults: Defaults) -> None:
    plain = used(tmp_path / "plain", contextlib.nullcontext)
    with default_type(dtype):
        other = used(tmp_path / "other", defaults)
    for rank in range(2):
        for what, expected in plain[rank].items():
            assert equal(other[rank][what], expected), f"rank {rank}: {what}"


def test_defaults_change_no_contraction() -> None:
    """What a compressor says of itself."""
    v = torch.linspace(-1, 2, 37)
    plain = [case.compressor.delta(v) for case in COMPRESSORS]
    with default_type(torch.float64), torch.device("meta"):
        assert [case.compressor.delta(v) for case in COMPRESSORS] == plain


def test_sparse_means_are_where_the_gradients_are() -> None:
    """SparseAdam itself makes tensors where the default says, so only the exchange is under it."""
    table = torch.nn.Embedding(50, 40, sparse=True)
    optimizer = DistributedOptimizer(torch.optim.SparseAdam(table.parameters()), table.named_parameters(), transport=SelfTransport())
    table(torch.tensor([3, 7])).sum().backward()
    with default_type(torch.float64), torch.device("meta"):
        optimizer.synchronize()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse and table.weight.grad.device.type == "cpu"
    assert table.weight.grad.coalesce().indices().tolist() == [[3, 7]]


CONSTRUCTORS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace", "nested_tensor", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    *("sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csr_tensor"),
}
"""What torch makes on the default device where none is named."""


def unnamed(source: str) -> list[str]:
    """The calls in `source` that leave device or type to the defaults. Values of a tensor or an array bring their type along."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch":
            typed = node.func.attr.startswith(("sparse", "as")) or node.func.attr == "randperm"
            expected = {"device"} if typed else {"device", "dtype"}
            if node.func.attr in CONSTRUCTORS and not expected <= {k.arg for k in node.keywords}:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("package", [hvd_ecsgd, mpi_backend], ids=lambda p: p.__name__)
def test_what_is_made_names_its_device_and_its_type(package: Any) -> None:
    """Also where only a GPU or an unmodified Horovod would come by. `reproduce` is a program of its own, in which nobody sets defaults."""
    root = Path(package.__file__).parent
    files = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "reproduce"]
    assert len(files) > 15
    assert {str(path.relative_to(root)): calls for path in files if (calls := unnamed(path.read_text(encoding="utf-8")))} == {}


def test_what_names_neither_is_found() -> None:
    """The control of the test above."""
    source = "torch.zeros(1, device=d)\ntorch.full((2,), 1.0, dtype=t)\ntorch.empty(0, device=d, dtype=t)\ntorch.cat([a])\ntorch.asarray(a)"
    assert unnamed(source) == ["torch.zeros(1, device=d)", "torch.full((2,), 1.0, dtype=t)", "torch.asarray(a)"]
