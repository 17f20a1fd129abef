"""DistributedOptimizer as scripts use it: what stock Horovod offers, and what it gets wrong."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import mpi_backend as hvd
from hvd_ecsgd.optimizer import driver_of
from mpi_backend import runtime
from mpi_backend.optimizer import resources
from tests.mpi.verdict import Verdict

verdict = Verdict()
hvd.init()
rank, size = hvd.rank(), hvd.size()


def conv(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2)).to(dtype)


def batch(r: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(100 * step + r)).to(dtype)


def reference(steps: int, passes: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float32, members: Any = None) -> torch.nn.Module:
    """One process that sees everybody's batches."""
    members = list(range(size)) if members is None else members
    model = conv(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(passes):
            for r in members:
                (model(batch(r, passes * step + i, dtype)).square().mean() * scale / len(members)).backward()
        optimizer.step()
    return model


def same(model: torch.nn.Module, expected: torch.nn.Module, what: str, tolerance: float = 1e-5) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        verdict.expect(torch.allclose(a, b, rtol=tolerance, atol=tolerance), f"{what}: {name} differs by {(a - b).abs().max()}")
        verdict.same_bits(a, f"{what}: {name}")


def wrap(model: torch.nn.Module, **options: Any) -> Any:
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), **options)


def train(steps: int, step: Callable[[Any, Callable[[], torch.Tensor]], None], passes: int = 1, **options: Any) -> torch.nn.Module:
    model = conv()
    optimizer = wrap(model, **options)
    for t in range(steps):
        for i in range(passes):

            def loss(i: int = i, t: int = t) -> torch.Tensor:
                return model(batch(rank, passes * t + i)).square().mean()

            if i < passes - 1:
                loss().backward()
            else:
                step(optimizer, loss)
        optimizer.zero_grad()
    return model


def plain(optimizer: Any, loss: Callable[[], torch.Tensor]) -> None:
    loss().backward()
    optimizer.step()


def closure(optimizer: Any, loss: Callable[[], torch.Tensor]) -> None:
    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    returned = optimizer.step(evaluate)
    verdict.expect(returned is not None and returned.dim() == 0, "step(closure) returns the loss")


def apart(optimizer: Any, loss: Callable[[], torch.Tensor]) -> None:
    loss().backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()


def scaled(optimizer: Any, loss: Callable[[], torch.Tensor]) -> None:
    (loss() * 1024).backward()
    optimizer.synchronize()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad /= 1024
    with optimizer.skip_synchronize():
        optimizer.step()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


for how in (plain, closure, apart, scaled):
    same(train(4, how), reference(4), how.__name__)
same(train(3, plain, passes=2, backward_passes_per_step=2), reference(3, passes=2), "two backward passes")
control = torch.cat([p.flatten() for p in reference(3, passes=2).parameters()])
other = torch.cat([p.flatten() for p in reference(6).parameters()])
verdict.expect(not torch.allclose(control, other, atol=1e-4), "the control: two passes are not two steps")
same(train(2, plain, op=hvd.Sum), reference(2, scale=size), "op=Sum")
same(train(2, plain, gradient_predivide_factor=2.0), reference(2), "predivided")
parameters = list(conv().parameters())
same(train(2, plain, groups=2), reference(2), "groups")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same(train(2, plain, num_groups=2), reference(2), "num_groups")
verdict.expect(DeprecationWarning in [w.category for w in caught], "num_groups is deprecated")

# The number of passes may change between steps.
model, expected = conv(), conv()
optimizer, alone = wrap(model), torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
for t, passes in enumerate((1, 3, 1)):
    optimizer.set_backward_passes_per_step(passes)
    for i in range(passes):
        model(batch(rank, 10 * t + i)).square().mean().backward()
        if i == 0 and passes > 1:
            verdict.raises(ValueError, lambda: optimizer.set_backward_passes_per_step(2), "in the middle", "after step()")
        for r in range(size):
            (expected(batch(r, 10 * t + i)).square().mean() / size).backward()
    optimizer.step()
    alone.step()
    optimizer.zero_grad(set_to_none=bool(t % 2))
    alone.zero_grad(set_to_none=bool(t % 2))
    verdict.expect(all((p.grad is None) == bool(t % 2) for p in model.parameters()), "zero_grad(set_to_none)")
same(model, expected, "set_backward_passes_per_step")

# channels_last and bfloat16 gradients.
model = conv().to(memory_format=torch.channels_last)
optimizer = wrap(model)
for t in range(3):
    optimizer.zero_grad()
    model(batch(rank, t).to(memory_format=torch.channels_last)).square().mean().backward()
    if t == 0:
        verdict.expect(not model[0].weight.grad.is_contiguous(), "the gradient is channels_last")
    optimizer.step()
same(model, reference(3), "channels_last")
model = conv(torch.bfloat16)
optimizer = wrap(model)
for t in range(3):
    optimizer.zero_grad()
    model(batch(rank, t, torch.bfloat16)).square().mean().backward()
    optimizer.step()
same(model, reference(3, dtype=torch.bfloat16), "bfloat16", tolerance=2e-2)
verdict.expect(next(model.parameters()).grad.dtype == torch.bfloat16, "gradients stay bfloat16")

# Sparse gradients: the optimizer is given dense means, SparseAdam sparse ones.
for inner, as_dense in ((torch.optim.SGD, False), (torch.optim.Adagrad, False), (torch.optim.SparseAdam, False), (torch.optim.SGD, True)):
    torch.manual_seed(0)
    table = torch.nn.Embedding(6, 3, sparse=True)
    whole = copy.deepcopy(table)
    optimizer = hvd.DistributedOptimizer(inner(table.parameters(), lr=0.5), table.named_parameters(), sparse_as_dense=as_dense)
    alone = inner(whole.parameters(), lr=0.5)
    for words in (lambda r: [r, 5] if r or size == 1 else [], lambda r: [r, 5]):
        for o in (optimizer, alone):
            o.zero_grad()
        if words(rank):
            table(torch.tensor(words(rank))).sum().backward()
        optimizer.step()
        for r in range(size):
            if words(r):
                (whole(torch.tensor(words(r))).sum() / size).backward()
        alone.step()
    same(table, whole, f"sparse gradients, {inner.__name__}, sparse_as_dense={as_dense}")
    verdict.expect(table.weight.grad.is_sparse == (inner is torch.optim.SparseAdam), "the mean is dense, sparse for SparseAdam")

# A process set: its members exchange, the others train by themselves.
if size > 1:
    members = [0, 1] if size > 2 else [0]
    chosen = hvd.add_process_set(members)
    model = conv()
    optimizer = wrap(model, process_set=chosen)
    for t in range(3):
        optimizer.zero_grad()
        model(batch(rank, t)).square().mean().backward()
        optimizer.step()
    expected = reference(3, members=members if rank in members else [rank])
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        verdict.expect(torch.allclose(a, b, rtol=1e-5, atol=1e-5), "within a process set")

# GradScaler, as with Horovod: unscale what was exchanged. An overflow on one rank is everybody's, and lowers the scale everywhere.
# With a method without state nothing need be attached, also for a plain scaler.step: a stock script is right.
for attached, recipe in ((True, True), (False, True), (False, False)):
    model = conv()
    optimizer = wrap(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    if attached:
        optimizer.compression.attach(optimizer, scaler)
    stepped = 0
    for t in range(4):
        optimizer.zero_grad()
        loss = scaler.scale(model(batch(rank, stepped)).square().mean())
        (loss * float("inf") if t == 1 and rank == 0 else loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if recipe:
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
        scaler.update()
        stepped += t != 1
    verdict.expect(scaler.get_scale() == 32.0, f"the scale is {scaler.get_scale()} after one overflow")
    same(model, reference(3), f"GradScaler, attached {attached}, recipe {recipe}")
optimizer = wrap(model, compression=hvd.Compression.top_k(4))
scaler.scale(model(batch(rank, 0)).square().mean()).backward()
verdict.raises(ValueError, lambda: scaler.step(optimizer), "the control: with state", "this GradScaler is not attached")

# Ranks list their parameters in different orders, in the optimizer and beside it.
model = conv()
turned = [*model.named_parameters()][rank:] + [*model.named_parameters()][:rank]
sgd = torch.optim.SGD([p for _, p in reversed(turned)], lr=0.1, momentum=0.9)
optimizer = hvd.DistributedOptimizer(sgd, turned, hvd.Compression.global_random_block(1, 8, dense_below=0, dense_1d=False))
for t in range(3):
    optimizer.zero_grad()
    model(batch(rank, t)).square().mean().backward()
    optimizer.step()
same(model, reference(3), "parameters in different orders")


class Eighths:
    """A compressor as users of Horovod write them: integers travel."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        return (tensor * 2**12).to(torch.int32), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        return tensor.to(ctx) / 2**12


model, expected = conv(), conv()
optimizer = wrap(model, compression=Eighths)
alone = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
for t in range(3):
    optimizer.zero_grad()
    alone.zero_grad()
    model(batch(rank, t)).square().mean().backward()
    expected(batch(rank, t)).square().mean().backward()
    for i, p in enumerate(expected.parameters()):
        p.grad = hvd.allreduce(p.grad, name=f"eighths.{t}.{i}", compression=Eighths)
    optimizer.step()
    alone.step()
for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
    verdict.equal(p.detach(), q.detach(), f"a user's own compressor, in the optimizer and in allreduce: {name}")
verdict.expect(not torch.allclose(flat(model), flat(reference(3)), rtol=1e-5, atol=1e-5), "the control: it is lossy")


# Tied parameters that are listed under both of their names; derived from Horovod's classes, a user's compressor.
class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = conv(), torch.nn.Module()
        self.outer.weight = self.inner[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Derived(hvd.Compression.fp16):  # type: ignore[misc, valid-type]
    pass


class Whole(hvd.compression.Compressor):
    compress = staticmethod(hvd.compression.NoneCompressor.compress)
    decompress = staticmethod(hvd.compression.NoneCompressor.decompress)


for listed in (lambda m: m.state_dict(keep_vars=True).items(), lambda m: m.named_parameters(remove_duplicate=False)):
    for compressor, tolerance in ((hvd.compression.FP16Compressor, 1e-3), (Derived, 1e-3), (Whole, 1e-5)):
        tied = Tied()
        sgd = torch.optim.SGD(tied.parameters(), lr=0.1, momentum=0.9)
        optimizer = hvd.DistributedOptimizer(sgd, listed(tied), compressor)
        for t in range(3):
            optimizer.zero_grad()
            tied(batch(rank, t)).square().mean().backward()
            optimizer.step()
        same(tied.inner, reference(3), f"tied, {compressor.__name__}", tolerance)
model = conv()
sgd, twice = torch.optim.SGD(model.parameters(), lr=0.1), [*model.named_parameters()] * 2
verdict.raises(ValueError, lambda: hvd.DistributedOptimizer(sgd, twice), "the same names twice", "two parameters are named")
for absent, said in (("elastic", "mpi_backend has no elastic"), ("alreduce", "no attribute 'alreduce'")):
    verdict.raises(AttributeError, lambda absent=absent: getattr(hvd, absent), absent, said)

# An exception that one rank's backward pass ended with, and that its script caught: the step is undone, and all ranks are told. Then all go on.
model = conv()
optimizer = wrap(model)


def fail(gradient: torch.Tensor) -> None:
    raise ZeroDivisionError


for t, data in enumerate((0, 1, 1, 2)):
    optimizer.zero_grad()
    handle = model[0].weight.register_hook(fail) if (t, rank) == (1, size - 1) else None
    with contextlib.suppress(ZeroDivisionError):
        model(batch(rank, data)).square().mean().backward()
    if handle is not None:
        handle.remove()
    if t != 1:
        optimizer.step()
        continue
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict.raises(ValueError, optimizer.step, "half a step", f"a backward pass on rank {size - 1} was ended by an exception")
same(model, reference(3), "after a step that was undone for an exception")

# Arguments that are refused.
model = conv()
for options, message in (
    ({"op": hvd.Min}, "Average or Sum"),
    ({"gradient_predivide_factor": 2.0, "op": hvd.Sum}, "goes with op=Average"),
    ({"groups": -1}, "non-negative"),
    ({"groups": [[1]]}, "consist of tensors"),
    ({"groups": [[parameters[0]], [parameters[0]]]}, "only appear once"),
    *(({"groups": wrong}, "non-negative integer or lists of parameters") for wrong in (2.5, "x", parameters[:1], parameters[0])),
    ({"num_groups": None}, "non-negative integer or lists of parameters"),
    *(({"gradient_predivide_factor": wrong}, "must be a positive number") for wrong in ("x", None, 0, -1.0, float("nan"), float("inf"))),
    ({"compression": None}, "expected Compression.<preset>"),
    ({"compression": "top_k"}, "expected Compression.<preset>"),
    ({"process_set": None}, "no usable process set"),
    ({"backward_passes_per_step": 0}, "≥ 1"),
    ({"process_set": hvd.ProcessSet([0])}, "add_process_set first"),
):
    verdict.raises(ValueError, lambda options=options: wrap(model, **options), str(options), message)
verdict.raises(NotImplementedError, lambda: wrap(model, op=hvd.Adasum), "Adasum", "op=Average")
for wrong in (None, model, model.parameters()):
    verdict.raises(ValueError, lambda wrong=wrong: hvd.DistributedOptimizer(wrong), f"{type(wrong)}", "expected a torch.optim optimizer")

# What is on its way goes on while a backward pass makes further gradients, though nobody waits for it yet.
model, looks = conv(), [0]
optimizer = wrap(model)
transport = driver_of(optimizer).state.transport
if size > 1 and runtime.context().engine.threaded:
    operations = transport.link.operations
    advance = operations._advance

    def counted() -> bool:
        looks[0] += 1
        return advance()

    operations._advance = counted
    travelling = torch.zeros(1)
    handle = None
    if rank == 0:  # the others come later
        driver_of(optimizer).step.executor.submit(lambda: None)
        handle = transport.allreduce_(travelling, "early")
        driver_of(optimizer).step.executor.submit(lambda: None)
        looks[0], until = 0, time.monotonic() + 60
        while looks[0] <= 100 and time.monotonic() < until:
            time.sleep(0.01)
        verdict.expect(looks[0] > 100, f"{looks[0]} looks in a minute")
    hvd.barrier()
    (transport.allreduce_(travelling, "early") if handle is None else handle).wait()
    operations._advance = advance

# Shutting down completes the buckets of a backward pass that no step follows, also those that have not begun by then.
model = conv()
before = set(resources._backgrounds)
optimizer = wrap(model)
background = next(iter(set(resources._backgrounds) - before), None)
verdict.expect((background is not None) == runtime.context().engine.threaded, "a thread of its own, where there are threads")
if background is not None:
    background.submit(lambda: time.sleep(0.5))
sum(p.sum() for p in model.parameters()).backward()
hvd.shutdown()
verdict.expect(background is None or background._error is None, f"buckets at shutdown: {background and background._error!r}")
hvd.init()
verdict.conclude()
