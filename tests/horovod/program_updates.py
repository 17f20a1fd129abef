"""Methods that apply the update themselves (DEF, SAEF, local momentum, …) on the stock optimizer, doing what users do. Also run on one process."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.protocols import Role
from hvd_ecsgd.transport import SelfTransport, run_simulated
from tests.cases import ALL
from tests.horovod.programs import hvd, run_checks, same_on_all
from tests.problems import batch, flat, slot, weights

METHODS: dict[str, Callable[[], Compression]] = {
    "def": lambda: Compression.detached(4, **ALL),
    "def with local steps": lambda: Compression.detached(4, period=3, average_errors=6, dense_below=300),
    "saef": lambda: Compression.detached(8, 1.0, dense_below=300),
    "local_momentum": lambda: Compression.local_momentum(4, **ALL),
    "pef": lambda: Compression.pef(4, **ALL),
}
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


class Awkward(torch.nn.Module):
    """A weight used twice under two names, a frozen one, one that only rank 0 uses, and one that is frozen in mid-training."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator) / 5)

        self.first, self.second, self.sometimes, self.later, self.out = weight(20, 20), weight(20, 20), weight(20, 20), weight(20), weight(20, 5)
        self.tied = self.first
        self.second.requires_grad_(False)

    def forward(self, x: torch.Tensor, everything: bool) -> torch.Tensor:
        hidden = torch.tanh(x @ self.first @ self.second @ self.tied) * self.later
        return (hidden + torch.tanh(x @ self.sometimes) if everything else hidden) @ self.out


def one_step(model: Awkward, optimizer: Any, rank: int, t: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.05 / (1 + t // 3)
    optimizer.zero_grad()
    x, y = batch(rank, t)
    torch.nn.functional.cross_entropy(model(x, rank == 0 and t % 2 == 0), y).backward()
    optimizer.step()


def points(model: Awkward, compression: Any) -> list[torch.Tensor]:
    held = [weights(model, compression), flat(model.parameters())]
    if compression.method.feedback.unit == "update":
        with compression.at("virtual"):
            held.append(flat(model.parameters()))
    return held


def run(model: Awkward, optimizer: Any, compression: Any, rank: int, steps: range) -> list[torch.Tensor]:
    """All that must agree with the simulation: x, p and z on the way and at the end, and what is kept."""
    seen: list[torch.Tensor] = []
    for t in steps:
        model.later.requires_grad_(t < 6)
        one_step(model, optimizer, rank, t)
        if t % 4 == 1:
            seen += points(model, compression)
    return [*seen, *points(model, compression), slot(compression, "residual"), slot(compression, "momentum")]


def named(model: torch.nn.Module, prefix: str) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{prefix}/{n}", p) for n, p in model.named_parameters()]


def stock(make: Callable[[], Any], prefix: str, **options: Any) -> tuple[Awkward, Any, Any]:
    model = Awkward()
    compression = make().bind(named(model, prefix))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), **SGD), named_parameters=named(model, prefix), compression=compression, **options
    )
    return model, optimizer, compression


def the_simulation() -> None:
    """The same bits on two ranks as on two simulated ones; to rounding on three. x is the same on all ranks, p is not where it is shifted."""
    for name, make in METHODS.items():

        def worker(transport: Any, name: str = name, make: Callable[[], Any] = make) -> list[torch.Tensor]:
            model = Awkward()
            own = DistributedOptimizer(torch.optim.SGD(model.parameters(), **SGD), named(model, name), make(), transport=transport)
            return run(model, own, own.compression, transport.rank, range(10))

        model, optimizer, compression = stock(make, name)
        compression.attach(optimizer)
        expected = run_simulated(hvd.size(), worker)[hvd.rank()] if hvd.size() > 1 else worker(SelfTransport())
        frozen = model.second.clone()
        seen = run(model, optimizer, compression, hvd.rank(), range(10))
        for i, (a, b) in enumerate(zip(seen, expected, strict=True)):
            assert (a - b).abs().max() <= (0.0 if hvd.size() <= 2 else 2e-5), (name, i, (a - b).abs().max())
        assert same_on_all(weights(model, compression), name)
        assert torch.equal(model.second, frozen)
        assert not torch.equal(model.first, Awkward().first)
        if Role.POINT in compression.method.slot_names and hvd.size() > 1:
            assert not same_on_all(flat(model.parameters()), f"{name} p"), "control: p is shifted"


def statistics() -> None:
    """Of batch norm: averaged after an exchange, each rank's own between them (control)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 5))
    compression = Compression.detached(4, period=2, **ALL).bind(model)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), **SGD), named(model, "statistics"), compression=compression)
    compression.attach(optimizer)
    for t in range(4):
        optimizer.zero_grad()
        x, y = batch(hvd.rank(), t)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        own = flat([model[1].running_mean, model[1].running_var])
        optimizer.step()
        held = flat([model[1].running_mean, model[1].running_var])
        mean = hvd.allreduce(own, name=f"statistics.{t}") if t % 2 else own
        torch.testing.assert_close(held, mean)
        assert same_on_all(held, f"statistics {t}") == (t % 2 == 1 or hvd.size() == 1)


def resume() -> None:
    """State loaded after `attach` or before it: bit for bit the run through. Without it (control), or with the model saved where it was held: not."""
    for name, make in METHODS.items():
        finals: dict[str, torch.Tensor] = {}
        for how in ("through", "before", "after", "without"):
            model, optimizer, compression = stock(make, f"resume {name}")
            compression.attach(optimizer)
            for t in range(5):
                one_step(model, optimizer, hvd.rank(), t)
            if how != "through":
                with compression.at("averaged"):
                    content = copy.deepcopy([model.state_dict(), optimizer.state_dict(), compression.state_dict()])
                file = io.BytesIO()
                torch.save(content, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model, optimizer, compression = stock(make, f"resume {name}")
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                if how == "before":
                    compression.load_state_dict(saved[2])
                compression.attach(optimizer)
                if how == "after":
                    compression.load_state_dict(saved[2])
            for t in range(5, 9):
                one_step(model, optimizer, hvd.rank(), t)
            finals[how] = weights(model, compression)
        assert torch.equal(finals["before"], finals["through"]), name
        assert torch.equal(finals["after"], finals["through"]), name
        assert not torch.equal(finals["without"], finals["through"]), f"control: {name}"


def an_undone_step() -> None:
    """x is as before, residual, shift and momentum to rounding; every rank's gradients hold NaN after synchronize(), for a GradScaler to see."""
    for name, make in METHODS.items():
        model, optimizer, compression = stock(make, f"undone {name}")
        compression.attach(optimizer)
        for t in range(5):
            one_step(model, optimizer, hvd.rank(), t)
        x, p, momentum = weights(model, compression), flat(model.parameters()), slot(compression, "momentum")
        optimizer.zero_grad()
        data, labels = batch(hvd.rank(), 5)
        loss = torch.nn.functional.cross_entropy(model(data, True), labels)
        (loss * float("nan") if hvd.rank() == 0 else loss).backward()
        optimizer.synchronize()
        assert hvd.size() == 1 or all(q.grad is None or q.grad.isnan().all() for q in model.parameters())
        with optimizer.skip_synchronize():
            optimizer.step()
        assert compression.undone_steps == 1
        assert torch.equal(x, weights(model, compression))
        off = torch.stack([(p - flat(model.parameters())).abs().max(), (slot(compression, "momentum") - momentum).abs().max()])
        assert (hvd.allgather(off, name=f"off {name}") < 1e-5).all(), "on any rank, of which one alone would leave the others waiting"
        for t in range(6, 9):
            one_step(model, optimizer, hvd.rank(), t)
        assert not torch.equal(x, weights(model, compression)), "control"
        assert weights(model, compression).isfinite().all()


def a_grad_scaler() -> None:
    """Scaled by a power of two: the bits of the run without a scaler. An overflow on one rank is found on all, and undoes the step."""
    if hvd.size() == 1:
        return  # Horovod averages nothing then, and the scaler's own unscaling of local gradients is right
    finals = []
    for scaled in (False, True):
        model, optimizer, compression = stock(METHODS["def"], "scaler")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        compression.attach(optimizer, scaler)
        for t in range(6):
            optimizer.zero_grad()
            x, y = batch(hvd.rank(), t)
            loss = torch.nn.functional.cross_entropy(model(x, True), y)
            scaler.scale(loss * float("inf") if t == 4 and hvd.rank() == 0 else loss).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        assert compression.undone_steps == 1
        finals += [weights(model, compression), slot(compression, "momentum")]
        scales = hvd.allgather(torch.tensor([float(scaler.get_scale())]), name=f"scale {scaled}")
        assert len(set(scales.tolist())) == 1
    assert (finals[0] - finals[2]).abs().max() < 1e-6
    assert (finals[1] - finals[3]).abs().max() < 1e-5
    assert finals[0].isfinite().all()
    assert (finals[0] - flat(Awkward().requires_grad_(True).parameters())).abs().max() > 1e-2, "control: something was trained"


def refused(message: str, act: Callable[[], object]) -> None:
    try:
        act()
    except CompressionError as error:
        assert message in str(error), error
        return
    raise AssertionError(f"expected an error about {message}")


def mistakes() -> None:
    make = METHODS["def"]
    model, optimizer, compression = stock(make, "no attach")
    refused("attach(optimizer)", lambda: one_step(model, optimizer, hvd.rank(), 0))
    model, optimizer, compression = stock(make, "another optimizer")
    refused("horovod.torch.DistributedOptimizer", lambda: compression.attach(torch.optim.SGD(model.parameters(), lr=0.1)))
    model = Awkward()
    compression = make().bind(named(model, "adam"))
    adam = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters()), named_parameters=named(model, "adam"), compression=compression)
    refused("torch.optim.SGD", lambda: compression.attach(adam))
    model, optimizer, compression = stock(make, "nesterov")
    optimizer.param_groups[0]["nesterov"] = True
    refused("nesterov", lambda: compression.attach(optimizer))
    model, optimizer, compression = stock(make, "written to")
    compression.attach(optimizer)
    one_step(model, optimizer, hvd.rank(), 0)
    with torch.no_grad(), compression.at("averaged"):
        model.first.mul_(0.5)  # right: kept
    one_step(model, optimizer, hvd.rank(), 1)
    with torch.no_grad():
        model.first.mul_(0.5)
    refused("at('averaged')", lambda: one_step(model, optimizer, hvd.rank(), 2))
    model, optimizer, compression = stock(make, "written to by data")
    compression.attach(optimizer)
    one_step(model, optimizer, hvd.rank(), 0)
    with compression.at("averaged"):
        model.first.data.mul_(0.5)  # right: kept
        written = model.first.detach().clone()
    with compression.at("averaged"):
        assert torch.equal(model.first, written)
    one_step(model, optimizer, hvd.rank(), 1)
    model.first.data.mul_(0.5)
    refused("at('averaged')", lambda: one_step(model, optimizer, hvd.rank(), 2))
    with warnings.catch_warnings(record=True) as caught:  # in gradient units, the exchange is Horovod's, which has none with one process
        warnings.simplefilter("always")
        model, optimizer, compression = stock(lambda: Compression.top_k(4), "alone")
        compression.attach(optimizer)
    assert ["Horovod does not compress with one process" in str(w.message) for w in caught] == [True] * (hvd.size() == 1)
    if hvd.size() == 1:
        return
    model, optimizer, compression = stock(make, "sum", op=hvd.Sum)
    compression.attach(optimizer)
    refused("averages updates", lambda: one_step(model, optimizer, hvd.rank(), 0))
    model, optimizer, compression = stock(make, "clipped")
    compression.attach(optimizer)
    for t in range(2):  # synchronize() and step() apart, as they should be
        model(*[batch(hvd.rank(), t)[0], True]).square().mean().backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    model(batch(hvd.rank(), 2)[0], True).square().mean().backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    def step() -> None:
        with optimizer.skip_synchronize():
            optimizer.step()

    refused("after it had been exchanged", step)
    model, optimizer, compression = stock(make, "never applied")
    compression.attach(optimizer)
    model(batch(hvd.rank(), 2)[0], True).square().mean().backward()
    optimizer.synchronize()
    optimizer.zero_grad()
    refused("never applied", lambda: one_step(model, optimizer, hvd.rank(), 0))


if __name__ == "__main__":
    hvd.init()
    checks = {check.__name__: check for check in (the_simulation, statistics, resume, an_undone_step, a_grad_scaler, mistakes)}
    run_checks({name: checks[name] for name in sys.argv[1:] or checks})
