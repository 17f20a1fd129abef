"""One rank of: what real scripts do around the optimizer, on either backend, against the same on simulated workers.   program_lifecycle.py BACKEND"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from hvd_ecsgd import CompressionError, DistributedOptimizer
from tests.conformance.lifecycle import METHODS, Build, backward, check_run, check_simulated, compression_of, everywhere, hvd, prefixed, real
from tests.conformance.lifecycle_arithmetic import autocast, channels_last, drift, exact, scaler, unattached_scaler
from tests.problems import batch, mlp, told, weights
from tests.verdicts import end_all

# -- learning rates --------------------------------------------------------------------------------------------------------------

FACTORS = (0, 0, 0.25, 1, 0.5, 0, 0, 1, 0.1, 0.01)
"""Warm-up from zero, cosine to zero, a restart, and drops by ten."""


def schedules() -> None:
    def run(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: FACTORS[min(t, len(FACTORS) - 1)])
        for step, factor in enumerate(FACTORS):
            before = weights(model, optimizer.bound) if step else None
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()
            still = before is not None and torch.equal(before, weights(model, optimizer.bound))
            assert before is None or still == (factor == 0), f"step {step}: moved although η = 0, or stood still although it is not"
            lr.step()

    check_run("schedules", run)


def no_numbers() -> None:
    """Hyper-parameters that no step can be taken with, on all ranks or on one: every rank is told, nothing moves, and training goes on."""

    def on_all(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        for step in range(5):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = float("nan") if step == 2 else 0.1
            backward(model, rank, step)
            if step != 2:
                optimizer.step()
                continue
            before = weights(model, optimizer.bound)
            told(CompressionError, optimizer.step, "param group 0", "lr=nan", "undone on all ranks")
            assert torch.equal(before, weights(model, optimizer.bound))

    check_run("no numbers", on_all)
    for method in METHODS:
        model = mlp()
        optimizer = real(model, method, f"no number on one rank.{method}")
        group = optimizer.param_groups[0]
        for step in range(7):
            option, value = {2: ("lr", float("inf")), 3: ("momentum", float("nan")), 5: ("lr", -0.1)}.get(step, ("lr", 0.1))
            good = group[option]
            group[option] = value if hvd.rank() == 1 else good
            optimizer.zero_grad()
            backward(model, hvd.rank(), step)
            if value != 0.1:
                before = weights(model, optimizer.bound)
                told(CompressionError, optimizer.step, f"rank 1: param group 0 of SGD has {option}={value}", "undone on all ranks")
                assert torch.equal(before, weights(model, optimizer.bound)), f"{method}: moved by a step that was refused"
                group[option] = good
            else:
                optimizer.step()
        w = weights(model, optimizer.bound)
        assert w.isfinite().all() and not torch.equal(w, before) and optimizer.bound.undone_steps == 3, "it trains on"
        assert all(torch.equal(w, other) for other in everywhere(w, f"no number.{method}"))


class WithoutRate(torch.optim.Optimizer):
    """As Adafactor with a relative step: SGD whose param groups say nothing of its learning rate."""

    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.add_(p.grad, alpha=-0.1)


def without_learning_rate() -> None:
    """The ratio of learning rates is 1, said once; with constant ones the steps are the same. Who needs η itself is told."""

    def run(make: Callable[[Any], torch.optim.Optimizer], method: str) -> tuple[torch.Tensor, list[str]]:
        model = mlp()
        bound = compression_of(method).bind(prefixed(model, f"no rate.{method}"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = hvd.DistributedOptimizer(make(model.parameters()), named_parameters=bound.named, compression=bound)
            bound.attach(optimizer)
            for step in range(3):
                optimizer.zero_grad()
                backward(model, hvd.rank(), step)
                optimizer.step()
        return weights(model, bound), [str(w.message) for w in caught if "learning rate" in str(w.message)]

    for method in METHODS[:3]:
        w, said = run(WithoutRate, method)
        with_rate, nothing = run(lambda params: torch.optim.SGD(params, lr=0.1), method)
        assert torch.equal(w, with_rate) and not nothing
        assert len(said) == 1 and "param group 0 of WithoutRate has no learning rate" in said[0], said
    assert torch.equal(run(lambda params: torch.optim.SGD(params, lr=torch.tensor(0.1)), "top_k-k")[0], run(WithoutRate, "top_k-k")[0])
    told(CompressionError, lambda: run(WithoutRate, "hessian_aided"), "HessianAided", "param group 0 of WithoutRate has none", "gradient units")
    told(CompressionError, lambda: run(WithoutRate, "detached"), "WithoutRate")


# -- what happens between backward and step --------------------------------------------------------------------------------------


def clipping() -> None:
    """synchronize, clip the mean, step. What applies the update itself has no mean to clip, and says so."""

    def run(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        for step in range(4):
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.synchronize()
            if not optimizer.bound.method.feedback.takes.update:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            with optimizer.skip_synchronize():
                optimizer.step()

    check_run("clipping", run)
    model = mlp()
    optimizer = real(model, "top_k-k", "clipped too early")
    backward(model, hvd.rank(), 0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    told(CompressionError, optimizer.step, "after its exchange had started", "synchronize()")


def passes() -> None:
    def run(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        for step in range(4):
            optimizer.zero_grad()
            for i in range(2):
                backward(model, rank, 2 * step + i)
            optimizer.step()

    check_run("passes", run, backward_passes_per_step=2)


# -- which parameters ------------------------------------------------------------------------------------------------------------


def freezing() -> None:
    """Wrapped while all is trainable, frozen and unfrozen later: it stands still and goes on."""

    def run(model: Any, optimizer: Any, rank: int) -> None:
        for step in range(8):
            model[0].weight.requires_grad_(not 2 <= step < 5)
            with optimizer.bound.at("averaged") if step else nullcontext():
                before = model[0].weight.detach().clone()
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()
            with optimizer.bound.at("averaged"):
                assert torch.equal(before, model[0].weight) == (2 <= step < 5), step

    check_run("freezing", run)


def unfrozen_late() -> None:
    """Frozen when it was bound: an error with the remedy, which then works with the state before."""
    for method in METHODS:
        model = mlp()
        model[0].weight.requires_grad_(False)
        optimizer = real(model, method, f"late.{method}")
        optimizer.zero_grad()
        backward(model, hvd.rank(), 0)
        optimizer.step()
        model[0].weight.requires_grad_(True)
        optimizer.zero_grad()
        backward(model, hvd.rank(), 1)
        told(CompressionError, optimizer.step, "(64, 20)", "frozen", "new")


def added() -> None:
    """add_param_group after wrapping: an error, at once or at the next step."""
    model, extra = mlp(), torch.nn.Parameter(torch.ones(3))
    optimizer = real(model, "top_k-k", "added")
    optimizer.zero_grad()
    backward(model, hvd.rank(), 0)
    optimizer.step()

    def add_and_step() -> None:
        optimizer.add_param_group({"params": [extra]})
        optimizer.zero_grad()
        backward(model, hvd.rank(), 1)
        extra.sum().backward()
        optimizer.step()

    told(CompressionError, add_and_step, "add", "wrap")


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.common = torch.nn.Parameter(torch.randn(20, 24, generator=generator) / 5)
        self.mine = torch.nn.ParameterList([torch.randn(24, 24, generator=generator) / 5 for _ in range(3)])


def without_gradient() -> None:
    """Some parameters are used by one rank only, one by none."""

    def run(model: Any, optimizer: Any, rank: int) -> None:
        for step in range(5):
            optimizer.zero_grad()
            x = batch(rank, step)[0] @ model.common
            if (rank + step) % 2:
                x = torch.tanh(x @ model.mine[0])
            torch.tanh(x @ model.mine[1] if rank == 0 else x).square().mean().backward()
            optimizer.step()

    check_run("without gradient", run, Branches)


def gan() -> None:
    """Two optimizers over two models; the discriminator is frozen while the generator's loss goes backward through it."""

    def train(build: Build, rank: int, method: str) -> torch.Tensor:
        maker, judge = mlp(), torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
        with torch.no_grad():
            for p in judge.parameters():
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view(p.shape))
        optimizers = [build(maker, method, f"gan.maker.{method}"), build(judge, method, f"gan.judge.{method}")]
        for step in range(4):
            x, y = batch(rank, step)
            optimizers[1].zero_grad()
            (judge(maker(x).detach()).mean() - judge(torch.nn.functional.one_hot(y, 5).float()).mean()).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            judge.requires_grad_(False)
            (-judge(maker(x)).mean()).backward()
            judge.requires_grad_(True)
            optimizers[0].step()
        return torch.cat([weights(m, o.bound) for m, o in zip((maker, judge), optimizers)])

    def simulated(method: str, transport: Any) -> torch.Tensor:
        def build(model: torch.nn.Module, name: str, prefix: str) -> Any:
            sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            own = DistributedOptimizer(sgd, prefixed(model, prefix), compression_of(name), transport=transport)
            own.bound = own.compression
            return own

        return train(build, transport.rank, method)

    check_simulated("gan", {method: train(real, hvd.rank(), method) for method in METHODS}, simulated)


def loading() -> None:
    """load_state_dict in the middle changes nothing; with a step's exchange under way it is an error."""

    def run(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        for step in range(5):
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.bound.load_state_dict(optimizer.bound.state_dict())
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()

    check_run("loading", run)
    model = mlp()
    optimizer = real(model, "top_k-k", "loading under way")
    optimizer.zero_grad()
    backward(model, hvd.rank(), 0)
    optimizer.step()
    state = optimizer.bound.state_dict()
    optimizer.zero_grad()
    backward(model, hvd.rank(), 1)
    told(CompressionError, lambda: optimizer.bound.load_state_dict(state), "between a backward pass and its optimizer.step()")
    optimizer.step()


# -- compiled models, in this file as tests/ranks.py looks for torch.compile in it -------------------------------------------------


def compiled() -> None:
    """The gradients of a compiled model (traced by torch.compile; no code generation, which takes long) are exchanged as any."""

    def run(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        forward = torch.compile(model, backend="aot_eager") if is_real(optimizer) else model
        for step in range(4):
            optimizer.zero_grad()
            backward(forward, rank, step)
            optimizer.step()

    check_run("compiled", run)


def is_real(optimizer: Any) -> bool:
    return type(optimizer.bound.transport).__name__ != "SimulatedTransport"


def run_checks(checks: Iterable[Callable[[], None]]) -> None:
    """Run all. One that fails ends the job at once."""
    for check in checks:
        try:
            check()
        except Exception:
            end_all(check.__name__)
        hvd.allgather_object(None, name=f"verdict.{check.__name__}")
        if hvd.rank() == 0:
            print(f"passed {check.__name__}", flush=True)
    hvd.shutdown()


CHECKS = (schedules, clipping, passes, freezing, unfrozen_late, added, without_gradient, gan, loading, compiled, channels_last)


CHECKS += (no_numbers, without_learning_rate)


CHECKS += (scaler, unattached_scaler, autocast, exact, drift)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    hvd.init()
    run_checks([c for c in CHECKS if c.__name__ in sys.argv[2:] or not sys.argv[2:]])
