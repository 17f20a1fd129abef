"""One rank of: DDP's hook against `DistributedOptimizer` over the same transport.  program_ddp.py FILE [all] [covering] [use] [METHOD…]"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvd_ecsgd import (
    Compression,
    CompressionError,
    DisagreementError,
    DistributedOptimizer,
    SequenceError,
    ddp,
    load_checkpoint,
    save_checkpoint,
    telemetry,
)
from hvd_ecsgd.optimizer.executor import Inline
from hvd_ecsgd.telemetry.runs import Run
from hvd_ecsgd.transport.torch_dist import TorchTransport
from tests.cases import ALL, CASES, COVERING, SWITCHES, Case, bound_method, by_name
from tests.problems import batch, flat, mlp, weights
from tests.torch.meeting import meet
from tests.unit.test_state import equal

RATES = (0.1, 0.1, 0.05, 0.0, 0.05, 0.1, 0.1)
INF_AT = 5


def options(case: Case) -> dict[str, float]:
    method = bound_method(case)
    more = {"weight_decay": 1e-4} if method.feedback.takes.update else {}
    return {"momentum": 0 if "momentum=0" in repr(method) else case.momentum, **more}


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], step: int, rank: int | None = None) -> torch.Tensor:
    x, y = batch(dist.get_rank() if rank is None else rank, step)
    return torch.nn.functional.cross_entropy(model(x), y)


def steps(optimizer: Any, model: Any, rates: tuple[float, ...] = RATES) -> Iterator[int]:
    """Train, with a schedule and an inf on rank 1; yields between backward and step."""
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = loss_of(model, step)
        (loss * float("inf") if step == INF_AT and dist.get_rank() == 1 else loss).backward()
        yield step
        optimizer.step()


def kept(hook: ddp.DDPHook) -> dict[str, Any]:
    """Its state, but for the order of DDP's buckets, which an optimizer has not."""
    return {key: value for key, value in hook.state_dict().items() if key != "layout"}


def by_hook(case: Case, **settings: Any) -> tuple[torch.Tensor, dict[str, Any], int]:
    model = mlp()
    wrapped = DistributedDataParallel(model, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options(case))  # type: ignore[arg-type]
    hook = ddp.register(wrapped, case.make())
    hook.compression.attach(optimizer)
    for _ in steps(optimizer, wrapped):
        pass
    return weights(model, hook.compression), kept(hook), hook.compression.undone_steps


def by_optimizer(case: Case) -> tuple[torch.Tensor, dict[str, Any], int]:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, **options(case))  # type: ignore[arg-type]
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=TorchTransport())
    for _ in steps(optimizer, model):
        pass
    return weights(model, optimizer.compression), optimizer.compression.state_dict(), optimizer.compression.undone_steps


def methods(cases: tuple[Case, ...]) -> None:
    """Weights and all state are the same to the bit, with a schedule, a rate of zero, and a step that is undone."""
    wrong = []
    for i, case in enumerate(cases):
        settings: dict[str, Any] = [{}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 0.002}, {"static_graph": True}][i % 4]
        mine, expected = by_hook(case, **settings), by_optimizer(case)
        if not (equal(mine[0], expected[0]) and equal(mine[1], expected[1])):
            wrong.append(f"{case.name} {settings}: {(mine[0] - expected[0]).abs().max()}")
        assert mine[2] == expected[2] and mine[0].isfinite().all(), case.name
    assert not wrong, wrong


class Passes(TorchDispatchMode):
    """Operations that write as much as a bucket of gradients, or make it anew. Compiled kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.rpartition("::")[2]
        written = any(a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments)
        largest = max((t.nbytes for t in tree_leaves(args if result is None else result) if isinstance(t, torch.Tensor)), default=0)
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = any(isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known for t in tree_leaves(result))
        if largest >= SIDE * SIDE * 4 and (written or new) and "c10d" not in str(operation):
            self.seen.append(name)
        return result


SIDE = 160
"""Of a layer, whose gradients are too many to be sent to everybody at once."""


def passes(compression: Any, copied: bool = False, **settings: Any) -> list[str]:
    """Within the hook, in the fifth step, with a bucket of DDP's for each layer. `copied`: means have memory of their own, and DDP copies."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE) for _ in range(3)))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=SIDE * SIDE * 4 / 2**20, **settings)
    hook = ddp.register(wrapped, compression)
    hook.compression.attach(optimizer := torch.optim.SGD(model.parameters(), lr=1e-4))
    hook._step.executor = hook._step.meeting._executor = Inline()  # this thread is watched
    if copied:
        hook._apart = False
        hook._lent = lambda *given: None  # type: ignore[method-assign]
    watch, take = Passes(), hook.take
    for step in range(5):
        if step == 4:
            hook.take = lambda bucket: _within(watch, take, bucket)  # type: ignore[method-assign]
        optimizer.zero_grad()
        wrapped(torch.ones(2, SIDE) * (dist.get_rank() + 1)).sum().backward()
        optimizer.step()
    assert len(hook._layout) == 3 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return watch.seen


def _within(watch: Passes, take: Callable[..., Any], bucket: Any) -> Any:
    with watch:
        return take(bucket)


def means_are_not_copied() -> None:
    """No pass of torch's over what has the size of gradients, and no memory of it, beside the kernels; `none` is added where it travels, and divided
    there. Where DDP copies, and means have memory of their own all the same, they are copied twice (control)."""
    pairs = {
        "none": (Compression.none, ["add"] * 3),
        "random_block": (Compression.random_block(8), ["zero_"] * 3),
        "top_k": (Compression.top_k(8), []),
        "double_squeeze": (Compression.double_squeeze(), []),
        "detached": (Compression.detached(8), []),
        "power_sgd": (Compression.power_sgd(1), []),
    }
    for name, (compression, expected) in pairs.items():
        for settings in ({}, {"gradient_as_bucket_view": True}):
            found = passes(compression, **settings)
            copied = (
                name == "power_sgd" and settings != {}
            )  # it changes its residual in the pass that decodes, so neither waits for the step to stand
            assert found == expected + 3 * ["_foreach_copy_"] * copied, (name, settings, found)
        if name != "detached":
            assert [one for one in passes(compression, copied=True) if "copy" in one], name


def means_become_the_gradients() -> None:
    """After a backward pass `p.grad` is the memory that means were decoded into. A gradient that was there before, alone or as a part of something
    larger, holds the mean itself, as DDP has it; one that was made in this pass is replaced (control)."""
    for make in (Compression.top_k, lambda: Compression.none):
        model, wrapped, optimizer, hook = made(make())
        plain = DistributedDataParallel(mlp())
        loss_of(plain, 0).backward()
        whole = torch.zeros(sum(p.numel() for p in model.parameters()))
        parts = [part.view_as(p) for part, p in zip(whole.split([p.numel() for p in model.parameters()]), model.parameters())]
        for case in ("made", "alone", "part of a larger one"):
            for p, part in zip(model.parameters(), parts):
                p.grad = None if case == "made" else torch.zeros_like(p) if case == "alone" else part
            before, seen = [p.grad for p in model.parameters()], list[torch.Tensor]()
            handle = model[0].weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad))  # type: ignore[index,union-attr]
            loss_of(wrapped, 0).backward()
            handle.remove()
            after: list[torch.Tensor] = [p.grad for p in model.parameters()]  # type: ignore[misc]
            results = [range(out.data_ptr(), out.data_ptr() + out.nbytes) for r in hook._step.reductions if (out := r.out) is not None]
            for mine, old, p in zip(after, before, plain.parameters()):
                assert any(mine.data_ptr() in memory for memory in results) == (case == "made") and (mine is old) == (case != "made"), case
                assert make is Compression.top_k or torch.allclose(mine, p.grad, atol=1e-6), case  # type: ignore[arg-type]
            assert (seen[0] is model[0].weight.grad) == (case != "made")  # type: ignore[index]
            optimizer.step()
            model.load_state_dict(plain.module.state_dict())


def steps_are_undone_though_means_were_decoded() -> None:
    """What the residual holds after an inf is what it held, to rounding: where DDP copies means from its buffers, they are decoded over the gradients
    there before that is known, unless there is no other copy. Also of scaled and clipped gradients, and where rank 1 has joined and DDP stands in
    with zeros. A step that stands does change it (control)."""
    copies, views = {"static_graph": True}, {"gradient_as_bucket_view": True}
    for settings, scaled, options, joined in (
        ({}, False, {}, False),
        ({}, True, {}, False),
        ({}, False, {}, True),
        (views, False, {}, False),
        (copies, False, {}, False),
        (copies, True, {}, False),
        (copies, False, {"clip_value": 1e-3}, False),
        (copies, False, {"clip_norm": 1e-2}, False),
    ):
        model, wrapped, optimizer, hook = made(Compression.top_k(10, **ALL, **options), bucket_cap_mb=0.002, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, enabled=scaled)
        hook.compression.attach(optimizer, scaler if scaled else None)
        held, lent, finish = list[list[torch.Tensor]](), list[Any](), hook._finish

        def looked_at(finish: Callable[[], None] = finish, hook: ddp.DDPHook = hook, held: Any = held, lent: Any = lent) -> None:
            finish()
            lent.append([r.lent for r in hook._step.reductions if r.lent is not None])
            held.append([b.residual.clone() for b in hook._step.aggregator.state.buckets if b.residual is not None])

        hook._finish = looked_at  # type: ignore[method-assign]
        last = 2 if joined and dist.get_rank() == 1 else 5
        with wrapped.join() if joined else nullcontext():
            for step in range(last):
                optimizer.zero_grad(set_to_none=not joined)  # so that a worker that has joined has gradients of its last step
                loss = loss_of(wrapped, step)
                # Of the last layer's gradients, which come first, those of both ranks are finite: they have been accumulated.
                bad = step == 3 and dist.get_rank() == 0
                if bad:
                    model[0].bias.register_hook(lambda g: g * float("inf"))  # type: ignore[index]
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                if bad:
                    model[0].bias._backward_hooks.clear()  # type: ignore[index]
                scaler.step(optimizer)
                scaler.update()
        what = settings, scaled, options, joined, dist.get_rank()
        assert hook.compression.undone_steps == 1 and len(held) == 5, what
        for before, after, later in zip(*held[2:], strict=True):
            assert before.any() and torch.allclose(before, after, atol=1e-6), (what, (before - after).abs().max())
            assert not torch.allclose(before, later, atol=1e-5), what
        assert bool(lent[-1]) == (settings != {}) and all(one.at_once == (settings is copies) for one in lent[-1]), what


def means_are_copied_while_others_travel() -> None:
    """Where DDP copies, and nobody asks for gradients again, means are in `p.grad` before the hook ends the step, and not with a method that does
    (control). Then, also where nothing is copied, steps that some rank spoils, refuses or cannot end: NaN in all gradients, also of layers that were
    finite everywhere; and errors in our words."""
    for settings in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}):
        for compression, early in ((Compression.none, True), (Compression.fp16(), True), (Compression.top_k(1, dense_below=0), False)):
            model, wrapped, optimizer, hook = made(compression, bucket_cap_mb=0.002, **settings)
            plain, in_time, end = DistributedDataParallel(copy.deepcopy(model)), list[bool](), hook._end

            def has_mean(model: Any = model, plain: Any = plain) -> bool:
                return all(torch.allclose(p.grad, q.grad, atol=1e-3) for p, q in zip(model.parameters(), plain.parameters()))

            def looked_at(*copied: Any, has_mean: Any = has_mean, in_time: Any = in_time, end: Any = end) -> None:
                in_time.append(has_mean())
                end(*copied)

            hook._end = looked_at  # type: ignore[method-assign]
            for step in range(3):
                plain.zero_grad()
                loss_of(plain, step).backward()
                optimizer.zero_grad()
                loss_of(wrapped, step).backward()
                assert has_mean() or not early, (compression, settings)
            # Views of DDP's memory hold means as soon as that does.
            assert len(in_time) == 3 and (in_time[-1] == (early and settings != {}) or "gradient_as_bucket_view" in settings), (
                compression,
                settings,
                in_time,
            )
            if not early:
                continue
            before = weights(model)
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                model[0].bias.register_hook(lambda g: g * float("inf"))  # type: ignore[index]
            loss_of(wrapped, 3).backward()
            assert hook.compression.undone_steps == 1 and all(p.grad is not None and p.grad.isnan().all() for p in model.parameters()), settings
            optimizer.step()
            assert torch.equal(weights(model), before)
    _, wrapped, _, _ = made(Compression.none if dist.get_rank() else Compression.fp16(), bucket_cap_mb=0.002)
    with pytest.raises(DisagreementError, match="compressor"):
        loss_of(wrapped, 0).backward()
    _, wrapped, _, hook = made(Compression.none, bucket_cap_mb=0.002)
    loss_of(wrapped, 0).backward()
    hook._step._advance = _broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        loss_of(wrapped, 1).backward()


def _broken(reduction: Any) -> None:
    reduction.pending.wait()
    raise ZeroDivisionError("on purpose")


def buckets_follow_the_method() -> None:
    """Where `none` sends DDP's buffers as they are, small parameters are among the others; not with what compresses, before and after."""
    for first, second in (
        (Compression.none, Compression.top_k(10)),
        (Compression.fp16, Compression.none),
        (Compression.none, Compression.power_sgd(1)),
    ):
        found = []
        for by_hook in (True, False):
            model = mlp()
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            if by_hook:
                wrapped: Any = DistributedDataParallel(model)
                compression = ddp.register(wrapped, first).compression
                compression.attach(optimizer := sgd)
            else:
                optimizer = DistributedOptimizer(sgd, model.named_parameters(), first, transport=TorchTransport())
                wrapped, compression = model, optimizer.compression  # type: ignore[attr-defined]
            for step in range(6):
                if step == 3:
                    compression.switch(second)
                optimizer.zero_grad()
                loss_of(wrapped, step).backward()
                optimizer.step()
            found.append(weights(model))
        assert torch.allclose(*found, atol=1e-6), (first, second)


def skipped_steps_move_nothing() -> None:
    """Also against the optimizer's own momentum, where the method leaves the update to it."""
    case = Case("skipping", SWITCHES[6])
    mine, expected = by_hook(case), by_optimizer(case)
    assert mine[0].isfinite().all() and equal(mine[0], expected[0]) and equal(mine[1], expected[1])


def param_groups_keep_their_settings() -> None:
    """Two of them, with rates that differ and change, under methods of both units: the bits of our optimizer, also where the rest begins from a state
    that is loaded before the optimizer is attached. One rate for all is another training (control)."""
    for make in (lambda: Compression.local_momentum(8, **ALL), lambda: Compression.top_k(10, **ALL)):
        optimizer, model = grouped()
        ours = DistributedOptimizer(optimizer, model.named_parameters(), make(), transport=TorchTransport())
        for _ in steps(ours, model):
            pass
        expected = weights(model, ours.compression)
        saved: Any = None
        for begin, second in ((0, 1e-4), (4, 1e-4), (0, 0.1)):
            optimizer, model = grouped()
            wrapped = DistributedDataParallel(model)
            hook = ddp.register(wrapped, make())
            if begin:
                model.load_state_dict(saved[0])
                hook.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
            hook.compression.attach(optimizer)
            for step in range(begin, len(RATES)):
                if step == 4 and saved is None:
                    with hook.compression.at("averaged"):
                        saved = copy.deepcopy((model.state_dict(), hook.state_dict(), optimizer.state_dict()))
                optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = RATES[step], second
                optimizer.zero_grad()
                loss = loss_of(wrapped, step)
                (loss * float("inf") if step == INF_AT and dist.get_rank() == 1 else loss).backward()
                optimizer.step()
            mine = weights(model, hook.compression), kept(hook)
            same = equal(mine[0], expected) and equal(mine[1], ours.compression.state_dict())
            assert same == (second == 1e-4), (begin, second, (mine[0] - expected).abs().max())
        # Ranks have agreed on the buckets by now: groups may be joined, and must not be parted.
        hook.compression.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0))
        with pytest.raises(CompressionError, match=r"'2\.bias' and '2\.weight' are in different param groups"):
            hook.compression.attach(torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1))
    # A parameter that the optimizer does not hold is not exchanged by the settings of those that it holds.
    model, wrapped, _, hook = made(Compression.top_k(10))
    hook.compression.attach(torch.optim.SGD(model[2].parameters(), lr=0.1))  # type: ignore[index]
    with pytest.raises(CompressionError, match=r"'0\.(weight|bias)' is in no param group of the attached optimizer"):
        loss_of(wrapped, 0).backward()


def grouped() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    """The last layer, whose gradients come first, is a param group of its own. Without momentum, so that residuals follow the rate down, too."""
    model = mlp()
    return torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-4}], lr=0.1, momentum=0), model


# -- what scripts do -----------------------------------------------------------------------------------------------------------------


def made(
    compression: Any, model: torch.nn.Module | None = None, **settings: Any
) -> tuple[torch.nn.Module, DistributedDataParallel, torch.optim.Optimizer, ddp.DDPHook]:
    model = mlp() if model is None else model
    wrapped = DistributedDataParallel(model, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ddp.register(wrapped, compression)
    hook.compression.attach(optimizer)
    return model, wrapped, optimizer, hook


def nothing_is_lost_without_compression() -> None:
    """`none` is DDP's own mean; a lossy method is not (the control)."""
    plain = DistributedDataParallel(mlp())
    loss_of(plain, 0).backward()
    expected = flat(p.grad for p in plain.parameters() if p.grad is not None)
    for compression, same in ((Compression.none, True), (Compression.top_k(10), False)):
        model, wrapped, _, _ = made(compression)
        loss_of(wrapped, 0).backward()
        assert torch.allclose(flat(p.grad for p in model.parameters() if p.grad is not None), expected, atol=1e-7) == same
    # In its first step DDP has all in one buffer, in the order of the model, and we have it the other way round.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30, bias=False), torch.nn.Linear(30, 5, bias=False))
    found = []
    for compression in (None, Compression.none):
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        if compression is not None:
            ddp.register(wrapped, compression)
        loss_of(wrapped, 0).backward()
        found.append(flat(p.grad for p in wrapped.parameters() if p.grad is not None))
    assert torch.allclose(*found, atol=1e-7)


def a_closure_is_evaluated_before_the_step() -> None:
    """As Lightning steps: the backward pass is in the closure, and the step is that of a script without one; with an undone step, too."""

    def evaluated(optimizer: torch.optim.Optimizer, model: Any, step: int, told: list[int]) -> torch.Tensor:
        told.append(step)
        optimizer.zero_grad()
        loss = loss_of(model, step)
        (loss * float("inf") if step == INF_AT and dist.get_rank() == 1 else loss).backward()
        return loss

    for name in ("none", "top_k", "detached"):
        case, told = by_name(name), list[int]()
        model = mlp()
        wrapped = DistributedDataParallel(model)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, **options(case))  # type: ignore[arg-type]
        hook = ddp.register(wrapped, case.make())
        hook.compression.attach(optimizer)
        for step, lr in enumerate(RATES):
            optimizer.param_groups[0]["lr"] = lr
            assert optimizer.step(partial(evaluated, optimizer, wrapped, step, told)).item() > 0 and told == list(range(step + 1)), name
        expected = by_hook(case)
        assert equal(weights(model, hook.compression), expected[0]) and equal(kept(hook), expected[1]), name
        assert hook.compression.undone_steps == expected[2] == 1
    _, wrapped, _, _ = made(Compression.top_k(10, **ALL))
    several = torch.optim.LBFGS(wrapped.parameters(), lr=0.1, max_iter=3)
    with pytest.raises(CompressionError, match="LBFGS evaluates its closure"):
        several.step(partial(evaluated, several, wrapped, 0, []))


def gradients_accumulate() -> None:
    """Within `no_sync` nothing is sent; the next backward pass sends the sum."""
    model, wrapped, optimizer, hook = made(Compression.top_k(1, **{"dense_below": 0, "dense_1d": False}))
    with wrapped.no_sync():
        loss_of(wrapped, 0).backward()
    assert hook.compression.traffic.sent == 0
    loss_of(wrapped, 1).backward()
    mine = flat(p.grad for p in model.parameters() if p.grad is not None)
    expected = torch.zeros_like(mine)
    for rank in range(dist.get_world_size()):
        other = mlp()
        (loss_of(other, 0, rank) + loss_of(other, 1, rank)).backward()
        expected += flat(p.grad for p in other.parameters() if p.grad is not None) / dist.get_world_size()
    assert torch.allclose(mine, expected, atol=1e-6)
    optimizer.step()


class Parted(torch.nn.Module):
    """Uses one of two layers, chosen by rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(20, 40) for _ in range(2)])
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = self.layers[dist.get_rank() % 2](x)
        return chosen


def unused_and_frozen_parameters() -> None:
    model = Parted()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ddp.register(wrapped, Compression.top_k(1, dense_below=0))
    hook.compression.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        wrapped(batch(dist.get_rank(), step)[0]).square().mean().backward()
        optimizer.step()
    everybodys = [torch.empty_like(flat(model.parameters())) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, flat(model.parameters()))
    assert all(torch.equal(w, everybodys[0]) for w in everybodys)
    fresh = Parted()
    assert all(not torch.equal(a, b) for a, b in zip(model.layers.parameters(), fresh.layers.parameters())), "both layers have moved"


def uneven_inputs() -> None:
    """DDP's `join`: a rank without data takes part with zeros, and what its residual holds goes on being sent."""
    for compression in (Compression.top_k(10), Compression.none):
        _, wrapped, optimizer, hook = made(compression)
        with wrapped.join():
            for step in range(2 + 2 * (dist.get_rank() == 0)):
                optimizer.zero_grad()
                loss_of(wrapped, step).backward()
                optimizer.step()
        assert hook.compression.aggregator.state.step == 4


def a_scaler_finds_the_overflow() -> None:
    """On all ranks, and the scale does not enter the state."""
    states = []
    for scaled in (False, True):
        model, wrapped, optimizer, hook = made(Compression.detached(8))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        hook.compression.attach(optimizer, scaler if scaled else None)
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(wrapped, step)
            bad = step == 2 and dist.get_rank() == 0
            scaler.scale(loss * float("inf") if bad else loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        assert hook.compression.undone_steps == 1
        assert not scaled or scaler.get_scale() == 128.0
        states.append(weights(model, hook.compression))
    assert torch.allclose(*states, atol=1e-6)


def the_mean_may_be_clipped() -> None:
    model, wrapped, optimizer, _ = made(Compression.double_squeeze())
    before = weights(model)
    loss_of(wrapped, 0).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert (weights(model) - before).norm() <= 1.01e-4
    model, wrapped, optimizer, hook = made(Compression.detached(8))
    before = weights(model, hook.compression)
    loss_of(wrapped, 0).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(CompressionError, match="changed after it had been exchanged"):
        optimizer.step()


def state_survives() -> None:
    """A checkpoint in the middle: the rest is the same to the bit; without the residuals it is not, nor, where gloo's ring adds what three ranks
    have, without the order of DDP's buckets (the controls)."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else nullcontext("") as folder:
        where = [folder]
        dist.broadcast_object_list(where)

        def run(make: Callable[[], Any], from_checkpoint: bool, without: str = "") -> torch.Tensor:
            model, wrapped, optimizer, hook = made(make(), model=mlp(hidden=1000))  # too much to be added at once
            begin = 3 * from_checkpoint
            if from_checkpoint:
                fresh = copy.deepcopy(hook.state_dict())
                load_checkpoint(where[0], model, optimizer, hook.compression)
                if without == "residuals":
                    hook.load_state_dict(fresh)
                elif without == "layout":
                    hook.load_state_dict(kept(hook))
            for step in range(begin, 6):
                if step == 3 and not from_checkpoint:
                    save_checkpoint(where[0], model, optimizer, hook.compression, overwrite=True)
                optimizer.zero_grad()
                loss_of(wrapped, step).backward()
                optimizer.step()
            return weights(model)

        for make, without in ((Compression.double_squeeze, "residuals"), (lambda: Compression.none, "layout")):
            expected = run(make, False)
            assert torch.equal(run(make, True), expected), make
            if without == "residuals" or dist.get_world_size() > 2:
                assert not torch.equal(run(make, True, without), expected), without
            dist.barrier()


def methods_are_switched_and_steps_discarded() -> None:
    """Thrown away bit for bit with a copy of the state, and to rounding without one; where DDP has copied means, that is an error."""
    for exact, settings in ((False, {"static_graph": True}), (False, {}), (True, {"static_graph": True}), (True, {})):
        model, wrapped, optimizer, hook = made(Compression.top_k(10, exact=exact), **settings)
        loss_of(wrapped, 0).backward()
        optimizer.step()
        bucket = next(b for b in hook._step.aggregator.state.buckets if b.residual is not None)
        was, before = bucket.residual.clone(), weights(model)  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss_of(wrapped, 1).backward()
        if settings and not exact:
            with pytest.raises(CompressionError, match="exact=True"):
                hook.compression.discard()
            continue
        hook.compression.discard()
        optimizer.step()
        now = next(b for b in hook._step.aggregator.state.buckets if b.residual is not None).residual
        assert now is not None and was.any() and torch.allclose(was, now, atol=1e-6) and (torch.equal(was, now) or not exact)
        assert torch.equal(weights(model), before)
    hook.compression.switch(Compression.double_squeeze())
    loss_of(wrapped, 2).backward()
    optimizer.step()
    assert not torch.equal(weights(model), before)


def wrong_use_is_told() -> None:
    model = mlp()
    with pytest.raises(CompressionError, match="expected a DistributedDataParallel, got a Sequential"):
        ddp.register(model, Compression.none)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"'0\.weight' is trained by the model and not bound"):
        ddp.register(DistributedDataParallel(model), Compression.top_k(10).bind(mlp()))
    model, wrapped, optimizer, hook = made(Compression.detached(8))
    with pytest.raises(CompressionError, match="has a communication hook already"):
        ddp.register(wrapped, Compression.none)
    with pytest.raises(CompressionError, match=r"torch\.optim\.SGD"):
        hook.compression.attach(torch.optim.Adam(model.parameters()))
    loss_of(wrapped, 0).backward()
    with pytest.raises(SequenceError, match="no_sync"):
        loss_of(wrapped, 0).backward()
    sparse = DistributedDataParallel(torch.nn.Embedding(50, 40, sparse=True))
    ddp.register(sparse, Compression.top_k(10))
    with pytest.raises(CompressionError, match="'weight' is sparse"):
        sparse(torch.tensor([1, 2])).sum().backward()
    # On one rank only, and told to all; afterwards training goes on.
    model, wrapped, optimizer, hook = made(Compression.top_k(10))
    loss_of(wrapped, 0).backward()
    optimizer.step()
    before = weights(model)
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = float("nan") if dist.get_rank() == 1 else 0.1
    loss_of(wrapped, 0).backward()
    with pytest.raises(CompressionError, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    loss_of(wrapped, 0).backward()
    optimizer.step()
    assert weights(model).isfinite().all() and not torch.equal(weights(model), before)


def ranks_that_differ_are_told() -> None:
    _, wrapped, _, _ = made(Compression.top_k(10 + dist.get_rank()))
    with pytest.raises(DisagreementError, match="compressor"):
        loss_of(wrapped, 0).backward()


def telemetry_changes_nothing() -> None:
    """Records of every step on rank 0, one of which is undone; another method does change something (control)."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for compression, logged in ((Compression.double_squeeze(), True), (Compression.double_squeeze(), False), (Compression.one_bit(), False)):
            _, wrapped, optimizer, hook = made(compression)
            logger = telemetry.Logger(hook.compression, f"{folder}/run.jsonl", norms_every=2) if logged else None
            for _ in steps(optimizer, wrapped):
                pass
            if logger is not None:
                logger.close()
            found.append(weights(wrapped.module, hook.compression))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        if dist.get_rank() == 0:
            records = Run.read(Path(folder) / "run.jsonl").records
            assert [r["outcome"] for r in records] == ["undone" if step == INF_AT else "stands" for step in range(len(RATES))]
            assert all("relative_error" in r for r in records[:INF_AT:2]) and "wait_seconds" in records[0]
            assert [r["groups"] for r in records if not r["groups"]] == [[]], "nothing is sent at a learning rate of 0"


USES = (
    means_are_not_copied,
    means_become_the_gradients,
    steps_are_undone_though_means_were_decoded,
    means_are_copied_while_others_travel,
    buckets_follow_the_method,
    telemetry_changes_nothing,
    skipped_steps_move_nothing,
    param_groups_keep_their_settings,
    a_closure_is_evaluated_before_the_step,
    nothing_is_lost_without_compression,
    gradients_accumulate,
    unused_and_frozen_parameters,
    uneven_inputs,
    a_scaler_finds_the_overflow,
    the_mean_may_be_clipped,
    state_survives,
    methods_are_switched_and_steps_discarded,
    wrong_use_is_told,
    ranks_that_differ_are_told,
)


def main(file: str, *what: str) -> None:
    rank, size = meet(file)
    warnings.filterwarnings("ignore", "a gradient or a payload held an inf")
    for name in what:
        if name in ("all", "covering"):
            methods(CASES if name == "all" else COVERING)
        elif name == "use":
            for use in USES:
                use()
        elif name in globals():
            globals()[name]()
        else:
            methods((by_name(name),))
    print(f"rank {rank} of {size}: all right")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
