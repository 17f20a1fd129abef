"""What scripts do to gradients on an unmodified Horovod: writing to them while they travel, clipping, throwing a step away. Two ranks."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hvd_ecsgd import Compression, CompressionError, SequenceError
from tests.cases import ALL, by_name
from tests.horovod.programs import hvd, run_checks, same_on_all, stock
from tests.problems import batch, held, mlp, slot, weights


def made(compression: Compression, prefix: str, **options: Any) -> tuple[Any, Any, Any]:
    model = mlp()
    bound = compression.bind(model)
    optimizer = stock(model, bound, prefix, **options)
    bound.attach(optimizer)
    return model, optimizer, bound


def backward(model: Any, t: int) -> None:
    x, y = batch(hvd.rank(), t)
    torch.nn.functional.cross_entropy(model(x), y).backward()


def told(fragment: str, call: Any) -> None:
    try:
        call()
    except CompressionError as error:
        assert fragment in str(error), error
    else:
        raise AssertionError("nothing was raised")


def _assign(p: Any) -> None:
    p.grad.data = p.grad.clamp(-1e-3, 1e-3)


def _numpy(p: Any) -> None:
    p.grad.numpy()[:] *= 0.01


WRITES: dict[str, Any] = {
    "data.clamp_": lambda p: p.grad.data.clamp_(-1e-3, 1e-3),
    "data=": _assign,
    "numpy": _numpy,
    "clamp_": lambda p: p.grad.clamp_(-1e-3, 1e-3),
}


def written_on_their_way() -> None:
    for name, make in (("top", lambda: Compression.top_k(4, **ALL)), ("block", lambda: Compression.random_block(4, **ALL))):
        for what, write in WRITES.items():
            model, optimizer, _ = made(make(), f"way.{name}.{what}")
            backward(model, 0)
            write(model[0].weight)
            told("was changed after its exchange had started", optimizer.step)


def written_afterwards() -> None:
    for what, write in {**WRITES, "None": lambda p: setattr(p, "grad", None)}.items():
        model, optimizer, _ = made(Compression.detached(4, **ALL), f"after.{what}")
        for t in range(2):
            optimizer.zero_grad()
            backward(model, t)
            optimizer.synchronize()
            if t:
                write(model[0].weight)

            def step(optimizer: Any = optimizer) -> None:
                with optimizer.skip_synchronize():
                    optimizer.step()

            told("was changed after it had been exchanged", step) if t else step()


def clipping_inside() -> None:
    """By value it is clipping by hand; by norm it is refused."""
    for name, make in (("top", Compression.top_k), ("def", Compression.detached)):
        held = []
        for inside in (True, False):
            model, optimizer, bound = made(make(4, **ALL, **({"clip_value": 0.02} if inside else {})), f"clip.{name}.{inside}")  # type: ignore[operator]
            for t in range(3):
                optimizer.zero_grad()
                hooks = [] if inside else [p.register_hook(lambda g: g.clamp(-0.02, 0.02)) for p in model.parameters()]
                backward(model, t)
                for hook in hooks:
                    hook.remove()
                optimizer.step()
            held.append(weights(model, bound))
        assert torch.equal(*held) and same_on_all(held[0], f"clip.{name}")
    told("clip_norm", lambda: made(Compression.top_k(4, clip_norm=1.0), "norm"))


def discarded() -> None:
    for name, make in (("top", lambda: Compression.top_k(4, exact=True, **ALL)), ("def", lambda: Compression.detached(4, **ALL))):
        model, optimizer, bound = made(make(), f"discard.{name}")
        for t in range(3):
            optimizer.zero_grad()
            backward(model, t)
            optimizer.step()
        before, residual = weights(model, bound), slot(bound, "residual")
        optimizer.zero_grad()
        backward(model, 3)
        optimizer.synchronize()
        told("between a backward pass", bound.state_dict)
        kept = held(bound)
        told("discard()", optimizer.synchronize)  # nothing is exchanged a second time
        assert all(map(torch.equal, kept, held(bound))), "nor kept"
        bound.discard()
        assert torch.equal(weights(model, bound), before)
        torch.testing.assert_close(slot(bound, "residual"), residual, rtol=1e-5, atol=1e-6)
        backward(model, 4)
        optimizer.step()
        assert not torch.equal(weights(model, bound), before) and same_on_all(weights(model, bound), f"discard.{name}")


def exchanged_once() -> None:
    """A second `synchronize()` is an error, and leaves all that the method keeps, and the mean, as the first has left them."""
    for name in ("random_block", "top_k", "local_momentum", "double_squeeze"):
        reached = []
        for again in (False, True):
            model, optimizer, bound = made(by_name(name).make(), f"once.{name}.{again}", momentum=by_name(name).momentum)
            for t in range(3):
                optimizer.zero_grad()
                backward(model, t)
                optimizer.synchronize()
                kept = held(bound)
                if again:
                    told("skip_synchronize", optimizer.synchronize)
                    assert kept and all(map(torch.equal, kept, held(bound))), (name, t)
                with optimizer.skip_synchronize():
                    optimizer.step()
            reached.append(torch.cat([weights(model, bound), *(h.flatten().float() for h in held(bound))]))
        assert torch.equal(*reached), name


def never_applied() -> None:
    model, optimizer, bound = made(Compression.top_k(4, **ALL), "never")
    backward(model, 0)
    optimizer.synchronize()
    told("exact=True", bound.discard)
    optimizer.zero_grad()
    told("discard()", lambda: backward(model, 1))


def set_after_the_backward_pass() -> None:
    """A rate that no step can be taken with: the inner optimizer does not apply the mean by it."""
    model, optimizer, bound = made(Compression.top_k(4, **ALL), "late rate")
    before = weights(model)
    backward(model, 0)
    optimizer.param_groups[0]["lr"] = float("nan")
    told("Nothing was applied on this rank", optimizer.step)
    assert torch.equal(weights(model), before)
    optimizer.param_groups[0]["lr"] = 0.1
    with optimizer.skip_synchronize():
        optimizer.step()
    assert not torch.equal(weights(model), before) and same_on_all(weights(model), "late rate") and bound.undone_steps == 0


def step_hooks() -> None:
    """Once in a step of an optimizer that was attached, around the inner step, so that they see the mean: before and after a scheduler was made, and
    after a state was loaded. Of one that was not (the control) twice, as without us."""
    for name, make in (("top", Compression.top_k), ("def", Compression.detached)):
        for when in ("never", "at once", "after the scheduler", "twice"):
            if (name, when) == ("def", "never"):
                continue
            model = mlp()
            seen: list[Any] = []
            optimizer = stock(model, make(4, **ALL).bind(model), f"hooks.{name}.{when}")
            if when in ("at once", "twice"):
                optimizer._compression.attach(optimizer)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            if when in ("after the scheduler", "twice"):
                optimizer._compression.attach(optimizer)
            optimizer.load_state_dict(optimizer.state_dict())
            everywhere = register_optimizer_step_post_hook(lambda o, *_: seen.append(type(o).__name__))  # noqa: B023
            optimizer.register_step_pre_hook(lambda o, *_: seen.append(model[0].weight.grad))  # noqa: B023
            backward(model, 0)
            before = weights(model)
            with torch.autograd.profiler.profile() as profile, warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
                schedule.step()  # warns where nobody has told it of the step
            everywhere.remove()
            once = when != "never"
            assert len(seen) == (2 if once else 4) and seen.count("SGD") == (1 if once else 2), (name, when, seen)
            if once:
                (gradient,) = (g for g in seen if not isinstance(g, str))
                assert gradient is None if name == "def" else same_on_all(gradient, f"hooks.{name}.{when}"), "the mean, or it was applied already"
            assert [event.name for event in profile.function_events].count("Optimizer.step#SGD.step") == (1 if once else 2)
            assert not torch.equal(weights(model), before)


CALLS = ("backward", "synchronize", "clip", "step", "step inside", "zero_grad", "discard")


def in_any_order() -> None:
    """All orders of three calls, and two of four: errors that were raised, and caught, on both ranks have words, and leave them equal."""
    further = [("backward", "backward", "synchronize", "synchronize"), ("backward", "synchronize", "backward", "backward")]
    heard = set()
    for i, calls in enumerate([*itertools.product(CALLS, repeat=3), *further]):
        if "backward" not in calls[:2]:
            continue
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        bound = Compression.top_k(2, **ALL).bind(model)
        optimizer = stock(model, bound, f"order.{i}", momentum=0)
        bound.attach(optimizer)

        def inside(optimizer: Any = optimizer) -> None:
            with optimizer.skip_synchronize():
                optimizer.step()

        do: dict[str, Any] = {
            "backward": lambda model=model: model(torch.full((1, 3), 1.0 + hvd.rank())).square().sum().backward(),
            "synchronize": optimizer.synchronize,
            "clip": lambda model=model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1),
            "step": optimizer.step,
            "step inside": inside,
            "zero_grad": optimizer.zero_grad,
            "discard": bound.discard,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for call in calls:
                try:
                    do[call]()
                except (CompressionError, SequenceError, AssertionError) as error:  # the last are Horovod's own
                    heard.add(str(error))
        assert same_on_all(weights(model), f"order.{i}"), calls
    assert all(heard), "one without a word"
    for words in ("holds the mean of this step and, on top of it", "Horovod takes it for started still", "needs optimizer.synchronize() before it"):
        assert any(words in text for text in heard), (words, heard)


if __name__ == "__main__":
    hvd.init()
    run_checks(
        {
            check.__name__: check
            for check in (
                written_on_their_way,
                written_afterwards,
                clipping_inside,
                set_after_the_backward_pass,
                discarded,
                exchanged_once,
                never_applied,
                step_hooks,
                in_any_order,
            )
        }
    )
