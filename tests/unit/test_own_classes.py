"""Optimizers as people write them, wrapped: the arguments and names of their classes are theirs, step hooks run once, and copies are refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, ids
from tests.problems import batch, mlp, same_bits, weights
from tests.versions import cpu_scaler

# -- optimizers of others --------------------------------------------------------------------------------------------------------


class Fused(torch.optim.Optimizer):
    """As apex's fused ones: `zero_grad` without arguments, a `step` with further ones, and states of its own."""

    def __init__(self, params: Any, lr: float, set_grad_none: bool = True) -> None:
        super().__init__(params, {"lr": lr, "step": 0})
        self.set_grad_none, self.scale_of_last = set_grad_none, 0.0

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Any = None, grads: Any = None, output_params: Any = None, scale: float = 1.0) -> Any:  # type: ignore[override]
        assert grads is None and output_params is None
        self.scale_of_last = scale
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad / scale, alpha=-group["lr"])
        return loss


class NoClosure(torch.optim.SGD):
    """`step()` takes nothing."""

    def step(self) -> str:  # type: ignore[override]
        super().step()
        return "stepped"


class Named(torch.optim.SGD):
    """Methods and attributes named like what others have, `__slots__` and accessors of its own."""

    __slots__ = ("_mine", "_never")
    compression = "its own"

    def __init__(self, params: Any, lr: float) -> None:
        self._settings, self._results, self._names, self._passes, self._hooks = "settings", [1.0], "names", 3, "hooks"
        self._sum, self._inner, self.driver, self._submitted, self._opening, self.hooks, self.transport = True, "inner", "driver", 7, 8, 9, 10
        self._mine = {"slot": 0}
        super().__init__(params, lr=lr, momentum=0.9)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "invented":
            return "by __getattr__"
        raise AttributeError(name)

    def _start(self) -> float:
        return 1.0

    def _broadcast(self, factor: float) -> float:
        return factor * self._start()

    def _exchange(self) -> float:
        return self._broadcast(self._results[0])

    def listens(self) -> float:
        return self._exchange()

    def check_join(self) -> float:
        return self.listens()

    @torch.no_grad()
    def step(self, closure: Any = None, *, factor: float = 1.0) -> Any:  # type: ignore[override]
        self._mine["slot"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor * self.check_join())
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """As timm's and others: it holds an optimizer, whose groups are its own, and leaves `Optimizer.__init__` out."""

    def __init__(self, base: torch.optim.Optimizer, alpha: float = 0.5, k: int = 2) -> None:
        self._base, self.alpha, self.k = base, alpha, k
        self.state = defaultdict(dict)

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self._base.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self._base.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] = group.get("lookahead_step", 0) + 1
            if group["lookahead_step"] % self.k == 0:
                for p in group["params"]:
                    state = self._base.state[p]
                    slow = state.setdefault("slow", p.detach().clone())
                    slow.add_(p.detach() - slow, alpha=self.alpha)
                    p.data.copy_(slow)
        return loss

    def zero_grad(self) -> None:  # type: ignore[override]
        self._base.zero_grad()

    def state_dict(self) -> Any:
        return self._base.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._base.load_state_dict(state_dict)


class Adafactor(torch.optim.Optimizer):
    """As transformers': factored second moments, options that are None or tuples."""

    def __init__(self, params: Any, lr: float, eps: tuple[float, float] = (1e-30, 1e-3), beta1: float | None = None) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "beta1": beta1, "relative_step": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, square = self.state[p], p.grad**2 + group["eps"][0]
                state["step"] = state.get("step", 0) + 1
                beta = 1 - math.pow(state["step"], -0.8)
                for name, mean in [("rows", square.mean(-1)), ("columns", square.mean(0))]:
                    state[name] = state.get(name, torch.zeros_like(mean)).lerp(mean, 1 - beta)
                update = p.grad / (state["rows"].unsqueeze(-1) * state["columns"] / state["rows"].mean()).sqrt().clamp_(min=1e-6)
                p.add_(update / max(1.0, float(update.norm() / update.numel() ** 0.5)), alpha=-group["lr"])
        return loss


MAKE: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "apex": (lambda params: Fused(params, 0.05), {"scale": 2.0}),
    "no closure": (lambda params: NoClosure(params, 0.05, momentum=0.9), {}),
    "names": (lambda params: Named(params, 0.05), {"factor": 0.5}),
    "Lookahead": (lambda params: Lookahead(torch.optim.SGD(params, 0.05, momentum=0.9)), {}),
    "Adafactor": (lambda params: Adafactor(params, 0.01), {}),
    "control": (lambda params: torch.optim.Adam(params, 0.01), {}),
}


def loss_of(model: torch.nn.Module, rank: int, t: int) -> torch.Tensor:
    x, y = batch(rank, t, torch.float64)
    return torch.nn.functional.cross_entropy(model(x), y)


def trained(what: str, size: int) -> list[Any]:
    """By rank: weights, what the last step returned, the optimizer's state, and the optimizer."""
    make, options = MAKE[what]

    def worker(transport: Transport) -> Any:
        model = mlp(torch.float64)
        optimizer = DistributedOptimizer(make(model.parameters()), model.named_parameters(), transport=transport)
        for t in range(5):
            optimizer.zero_grad(**({"set_to_none": True} if t % 2 else {}))
            loss_of(model, transport.rank, t).backward()
            returned = optimizer.step(**options)
            if t == 2:
                optimizer.load_state_dict(optimizer.state_dict())
        return weights(model), returned, optimizer.state_dict()["state"], optimizer

    return run_simulated(size, worker)


def alone(what: str, size: int) -> Any:
    """The same without us, in one process, with the mean of the workers' losses."""
    make, options = MAKE[what]
    model = mlp(torch.float64)
    optimizer = make(model.parameters())
    for t in range(5):
        optimizer.zero_grad()
        torch.stack([loss_of(model, r, t) for r in range(size)]).mean().backward()
        returned = optimizer.step(**options)
        if t == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    return weights(model), returned, optimizer.state_dict()["state"], optimizer


@pytest.mark.parametrize("what", MAKE)
def test_an_optimizer_of_others_is_what_it_is_without_us(what: str) -> None:
    (one,), expected = trained(what, 1), alone(what, 1)
    assert torch.equal(one[0], expected[0]), "with one worker"
    assert one[1] == expected[1], "what step() returns"
    two, expected = trained(what, 2), alone(what, 2)
    assert same_bits(w for w, *_ in two)
    assert (two[0][0] - expected[0]).abs().max() < 1e-12
    assert (two[0][0] - one[0]).abs().max() > 1e-4, "control: other data"
    assert {p: sorted(state) for p, state in two[0][2].items()} == {p: sorted(state) for p, state in expected[2].items()}


def test_joining_brings_the_state_of_an_inner_optimizer() -> None:
    def worker(transport: Transport) -> torch.Tensor:
        model = mlp(torch.float64)
        optimizer = DistributedOptimizer(MAKE["Lookahead"][0](model.parameters()), model.named_parameters(), transport=transport)
        for t in range(2 + 4 * transport.rank):
            optimizer.zero_grad()
            loss_of(model, transport.rank, t).backward()
            optimizer.step()
        optimizer.join()
        held = optimizer.state_dict()["state"]
        assert sorted(held[0]) == ["momentum_buffer", "slow"]
        return torch.cat([weights(model), *(value.flatten() for p in range(4) for _, value in sorted(held[p].items()))])

    assert same_bits(run_simulated(2, worker))


def test_names_like_ours_are_the_classs_own() -> None:
    model = mlp()
    inner = Named(model.parameters(), 0.1)
    optimizer = DistributedOptimizer(inner, model.named_parameters())
    assert set(vars(optimizer)) - set(vars(inner)) == {"_hvd_ecsgd_driver"}
    assert {name: value for name, value in vars(optimizer).items() if name in vars(inner)} == vars(inner)
    assert (optimizer.compression, optimizer.invented, optimizer.listens(), optimizer._mine) == ("its own", "by __getattr__", 1.0, {"slot": 0})
    with pytest.raises(AttributeError, match="nowhere"):
        optimizer.nowhere  # noqa: B018


def test_names_of_horovods_are_ours_and_a_warning_says_so() -> None:
    class Synchronizes(torch.optim.SGD):
        def synchronize(self) -> None:
            raise AssertionError

    model = mlp()
    with pytest.warns(UserWarning, match="Synchronizes has synchronize of its own"):
        optimizer = DistributedOptimizer(Synchronizes(model.parameters(), 0.1), model.named_parameters())
    optimizer.synchronize()


def test_arguments_that_a_step_does_not_take_are_its_own_errors() -> None:
    """Before anything is exchanged."""
    model = mlp()
    optimizer = DistributedOptimizer(NoClosure(model.parameters(), 0.1), model.named_parameters())
    for call in (lambda: optimizer.step(lambda: 1.0), lambda: optimizer.step(scale=1.0), lambda: optimizer.zero_grad(why=1)):
        with pytest.raises(TypeError):
            call()
    assert optimizer.compression.state_dict()["step"] == 0


class SAM(torch.optim.SGD):
    """Moves up, and takes the gradient there."""

    once = False

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None
        if self.once:
            closure()
        else:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(0.1)
        return closure()


@pytest.mark.parametrize("once", [False, True])
def test_optimizers_that_want_gradients_at_two_points_are_refused(once: bool) -> None:
    model = mlp()
    inner = SAM(model.parameters(), 0.1)
    inner.once = once
    optimizer = DistributedOptimizer(inner, model.named_parameters())

    def closure() -> torch.Tensor:
        loss = model(batch(0, 0)[0]).sum()
        loss.backward()
        return loss

    with pytest.raises(CompressionError, match=r"SAM evaluates its closure (several times|after it has moved)"):
        optimizer.step(closure)


# -- hooks -----------------------------------------------------------------------------------------------------------------------


class Counts:
    """Step hooks, of an optimizer and global ones, and the order of what they saw."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen: list[str] = []
        handles = [
            optimizer.register_step_pre_hook(lambda o, args, kwargs: self.seen.append("pre") if o is optimizer else None),
            optimizer.register_step_post_hook(lambda o, args, kwargs: self.seen.append("post")),
            register_optimizer_step_pre_hook(lambda o, args, kwargs: self.seen.append("all pre")),
            register_optimizer_step_post_hook(lambda o, args, kwargs: self.seen.append("all post")),
        ]
        self.remove = lambda: [handle.remove() for handle in handles]


@pytest.fixture
def counts() -> Iterator[Callable[[Any], list[str]]]:
    made: list[Counts] = []

    def count(optimizer: Any) -> list[str]:
        made.append(Counts(optimizer))
        return made[-1].seen

    yield count
    for each in made:
        each.remove()


ONCE = ["all pre", "pre", "post", "all post"]


@pytest.mark.parametrize("how", ["step", "synchronize", "closure", "undone", "loaded", "scaled"])
@pytest.mark.parametrize("name", ["none", "top_k", "detached", "local_momentum", "dist_ef_sgd"])
def test_step_hooks_run_once(name: str, how: str, counts: Callable[[Any], list[str]]) -> None:
    """In every call of step(), as torch runs them, and in one range of the profiler; the pre-hook sees what was exchanged."""
    model = mlp(torch.float64)
    made = getattr(Compression, name)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), made if name == "none" else made())
    scaler = cpu_scaler(init_scale=4.0, enabled=how == "scaled")
    optimizer.compression.attach(optimizer, scaler)
    if how == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    seen = counts(optimizer)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(args[1:]) if how == "closure" else None)

    def closure() -> torch.Tensor:
        loss = scaler.scale(loss_of(model, 0, 0) * (math.nan if how == "undone" else 1.0))
        loss.backward()
        return loss

    before = weights(model)
    if how != "closure":
        closure()
    with torch.autograd.profiler.profile() as profile, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if how == "synchronize":
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        elif how == "scaled":
            scaler.step(optimizer)
        else:
            optimizer.step(*([closure] if how == "closure" else []))
    assert seen == [*ONCE[:2], *([(closure,)] if how == "closure" else []), *ONCE[2:]]
    assert [event.name for event in profile.function_events].count("Optimizer.step#SGD.step") == 1
    with optimizer.compression.at("averaged"):
        assert torch.equal(weights(model), before) == (how == "undone")


def test_step_hooks_run_once_in_a_silent_step(counts: Callable[[Any], list[str]]) -> None:
    model = mlp()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), Compression.detached(8, period=5))
    seen = counts(optimizer)
    for _ in range(2):
        model(batch(0, 0)[0]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == 2 * ONCE


def test_a_pre_hook_may_clip_the_mean() -> None:
    """As without us; it is the mean that it sees."""

    def worker(transport: Transport) -> torch.Tensor:
        model = mlp(torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), transport=transport)
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01) and None)
        before = weights(model)
        loss_of(model, transport.rank, 0).backward()
        optimizer.step()
        return weights(model) - before

    moved = run_simulated(2, worker)
    assert same_bits(moved)
    assert float(moved[0].norm()) == pytest.approx(0.01, rel=1e-3)


def schedule(wrap: bool, first: bool, inside: bool, stepped: bool) -> list[str]:
    """The warnings of a scheduler made before (`first`) or after wrapping, for the optimizer inside or the wrapped one."""
    model = mlp()
    inner: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = StepLR(inner, 1) if first else None
        optimizer = DistributedOptimizer(inner, model.named_parameters()) if wrap else inner
        for t in range(3):
            if scheduler is None:
                optimizer.step()  # an earlier step does not count for a scheduler made later
                scheduler = StepLR(inner if inside else optimizer, 1)
            if stepped or t:
                optimizer.step()
            scheduler.step()
    return [str(w.message)[:40] for w in caught]


@pytest.mark.parametrize(("first", "inside"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("stepped", [True, False])
def test_schedulers_warn_when_they_would_without_us(first: bool, inside: bool, stepped: bool) -> None:
    assert schedule(True, first, inside, stepped) == (warned := schedule(False, first, inside, stepped))
    assert bool(warned) == (not stepped), "control"


# -- copies ----------------------------------------------------------------------------------------------------------------------


class Copied(torch.optim.SGD):
    """With ways of its own to be copied."""

    def __copy__(self) -> str:
        return "copied"

    def __deepcopy__(self, memo: Any) -> str:
        return "copied"


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("what", ["optimizer", "compression"])
def test_copies_are_refused(what: str, used: bool) -> None:
    """`copy`, `deepcopy`, `pickle` (so multiprocessing's spawn, too) and `torch.save`, with the remedy; state_dicts are what can be kept."""
    model = mlp()
    compression = Compression.top_k().bind(model)
    if used or what == "optimizer":
        optimizer = DistributedOptimizer(Copied(model.parameters(), lr=0.1), model.named_parameters(), compression)
    if used:
        model(batch(0, 0)[0]).sum().backward()
        optimizer.step()
    thing: Any = compression if what == "compression" else optimizer
    attempts = (copy.copy, copy.deepcopy, pickle.dumps, ForkingPickler.dumps, lambda it: torch.save(it, io.BytesIO()), lambda it: copy.deepcopy([it]))
    for attempt in attempts:
        with pytest.raises(CompressionError, match=r"state_dict\(\)"):
            attempt(thing)
    copy.deepcopy(model)
    pickle.dumps(thing.state_dict())


@pytest.mark.parametrize("case", [*CASES, None], ids=ids)
def test_what_is_not_bound_can_be_copied(case: Any) -> None:
    made = Compression.random_block(4, **ALL) if case is None else case.make()
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(again) == repr(made)
