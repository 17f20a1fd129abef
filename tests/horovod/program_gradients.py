"""What scripts do to gradients on an unmodified Horovod: writing to them while they travel, clipping, throwing a step away. Two ranks."""

from __future__ import annotations

from typing import Any

import torch

from hvd_ecsgd import Compression, CompressionError
from tests.cases import ALL
from tests.horovod.programs import hvd, run_checks, same_on_all, stock
from tests.problems import batch, mlp, slot, weights


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
        told("discard()", optimizer.synchronize)  # nothing is exchanged a second time
        bound.discard()
        assert torch.equal(weights(model, bound), before)
        torch.testing.assert_close(slot(bound, "residual"), residual, rtol=1e-5, atol=1e-6)
        backward(model, 4)
        optimizer.step()
        assert not torch.equal(weights(model, bound), before) and same_on_all(weights(model, bound), f"discard.{name}")


def never_applied() -> None:
    model, optimizer, bound = made(Compression.top_k(4, **ALL), "never")
    backward(model, 0)
    optimizer.synchronize()
    told("exact=True", bound.discard)
    optimizer.zero_grad()
    told("discard()", lambda: backward(model, 1))


if __name__ == "__main__":
    hvd.init()
    run_checks({check.__name__: check for check in (written_on_their_way, written_afterwards, clipping_inside, discarded, never_applied)})
