"""Mistakes that every rank must be told of, without hanging; and what goes wrong silently where nobody looks (control)."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import hvd_ecsgd.core.agreement
import hvd_ecsgd.horovod.slot
from hvd_ecsgd import Compression, CompressionError, DisagreementError, UnboundParameterError
from hvd_ecsgd.horovod import opening
from tests.cases import ALL
from tests.horovod.programs import hvd, prefixed, run_checks, same_on_all, stock, train_stock
from tests.problems import batch, mlp, told


def one_step(prefix: str, compression: Any, model: Any = None, **options: Any) -> None:
    model = model or mlp()
    train_stock(model, stock(model, compression, prefix, **options), range(1))


def odd() -> bool:
    return hvd.rank() == hvd.size() - 1


def bound_to(model: Any, prefix: str, compression: Compression) -> Any:
    return compression.bind(prefixed(model, prefix))


def disagreement(prefix: str, make: Callable[[], Compression], *fragments: str) -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    told(DisagreementError, lambda: one_step(prefix, bound_to(model, prefix, make()), model), *fragments)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())), "no parameter was changed"


def ratio() -> None:
    disagreement("ratio", lambda: Compression.random_block(8 if odd() else 4, **ALL), "ratio=4", "ratio=8", "rank 0")


def seed() -> None:
    disagreement("seed", lambda: Compression.random_block(8, seed=int(odd())), "seed")


def method() -> None:
    disagreement("method", lambda: Compression.one_bit() if odd() else Compression.top_k(), "compressor")


def late() -> None:
    """A rank that comes to its first step long after the others are out of patience: they wait, and all are told."""
    patience, hvd_ecsgd.core.agreement._PATIENCE = hvd_ecsgd.core.agreement._PATIENCE, 0.2
    try:
        model = mlp()
        bound = bound_to(model, "late", Compression.random_block(8 if odd() else 4, **ALL))
        if odd():
            time.sleep(1.5)
        told(DisagreementError, lambda: one_step("late", bound, model), "ratio=4", "ratio=8")
        # Another object that will have its first step later, or never: patience ends, and training goes on.
        waiting = bound_to(mlp(), "waiting", Compression.top_k())
        model = mlp()
        if odd():
            time.sleep(1.0)
        one_step("late.2", bound_to(model, "late.2", Compression.one_bit(**ALL)), model)
        del waiting
    finally:
        hvd_ecsgd.core.agreement._PATIENCE = patience


def models() -> None:
    """Other shapes, names, numbers or orders of parameters on one rank: told at the first gradient, and training can begin anew."""

    def shape(model: Any) -> Any:
        model[2] = torch.nn.Linear(model[2].in_features, model[2].out_features + 1) if odd() else model[2]
        return model

    def names(model: Any) -> Any:
        return torch.nn.Sequential(model[0], torch.nn.Tanh(), *model[1:]) if odd() else model

    def freeze(model: Any) -> Any:
        model[0].weight.requires_grad_(not odd())
        return model

    for change, what, *values in (
        (shape, "2.weight'", "rank 0 has (", f"rank {hvd.size() - 1} has ("),
        (names, "2.weight'", "has none", "torch.float32"),
        (freeze, "0.weight'", "torch.float32, frozen"),
    ):
        model = change(mlp())  # type: ignore[operator]
        bound = Compression.random_block(8, **ALL).bind(model)
        optimizer = stock(model, bound, f"models.{change.__name__}")
        loss = model(torch.ones(2, model[0].in_features)).sum()
        told(DisagreementError, loss.backward, "do not agree on parameter '", what, *values)  # in a hook, before anything of Horovod's
        del optimizer
        model = mlp()
        one_step(f"anew.{change.__name__}", Compression.random_block(8, **ALL).bind(model), model)

    model = mlp()
    named = list(model.named_parameters())
    bound = Compression.top_k(10, **ALL).bind(named[::-1] if odd() else named)
    told(DisagreementError, lambda: one_step("order", bound, model), "in different orders")


def looked_at() -> None:
    """Methods that one rank only has bound, let go or kept, do not count, of this model or another."""
    model = mlp()
    if odd():
        repr(Compression.random_block(4).bind(model))
    bound = Compression.random_block(8, **ALL).bind(model)
    assert same_on_all(train_stock(model, stock(model, bound, "looked.at"), range(2)), "looked.at")
    model = mlp()
    kept = Compression.random_block(4).bind(model) if odd() else None
    bound = Compression.random_block(8, **ALL).bind(model)
    assert same_on_all(train_stock(model, stock(model, bound, "kept"), range(2)), "kept")
    model = mlp()
    other = Compression.random_block(4).bind(mlp()) if odd() else None
    bound = Compression.random_block(8, **ALL).bind(model)
    assert same_on_all(train_stock(model, stock(model, bound, "other"), range(2)), "other")
    del kept, other


def collected() -> None:
    """Collectors run at other times on each rank: not at all on rank 0, after everything that was let go on the last. Nothing depends on it."""

    def made(prefix: str) -> tuple[Any, Any]:
        model = mlp()
        bound = bound_to(model, "collected", Compression.top_k(8, **ALL))  # names that no other check has: one table for all models here
        optimizer = stock(model, bound, prefix)
        bound.attach(optimizer)
        return model, optimizer

    def collect() -> None:
        if odd():
            gc.collect()

    gc.disable()
    try:
        for case, (dropped, steps) in enumerate([(1, 0), (0, 2), (3, 0), (2, 1), (1, 0)]):
            prefix = f"collected.{case}"
            for i in range(dropped):  # before any step, or after some
                model, optimizer = made(f"{prefix}.dropped.{i}")
                train_stock(model, optimizer, range(steps if i else 0))
                del model, optimizer
                collect()
            a, b = made(f"{prefix}.a"), made(f"{prefix}.b")
            if case % 2:  # two models in one backward pass, in different orders
                x, _ = batch(hvd.rank(), 0)
                first, second = (b, a) if odd() else (a, b)
                (first[0](x).square().mean() + second[0](x).abs().mean()).backward()
                for _, optimizer in (a, b):
                    optimizer.step()
            for name, (model, optimizer) in {"b": b, "a": a}.items():
                assert same_on_all(train_stock(model, optimizer, range(1, 3)), f"{prefix}.{name}")
            del a, b, model, optimizer
            collect()
        told(DisagreementError, lambda: one_step("other", Compression.random_block(8 if odd() else 4, **ALL).bind(m := mlp()), m), "ratio=8")
    finally:
        gc.enable()


def waited_for() -> None:
    """A rank that compresses nothing, or late: the others say what they wait for."""
    silence, opening.SILENCE = opening.SILENCE, 0.2
    try:
        model = mlp()
        bound = bound_to(model, "waited", Compression.one_bit(**ALL))
        if odd():
            time.sleep(1.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one_step("waited", bound, model)
        waited = [str(w.message) for w in caught if "has waited 0.2 s" in str(w.message)]
        assert len(waited) == 1 or (odd() and not waited), waited  # on a busy machine the late one may wait, too
    finally:
        opening.SILENCE = silence


def another_step() -> None:
    """One rank starts from an older state."""
    prefix, model = "step", mlp()
    bound = bound_to(model, prefix, Compression.random_block(8))
    optimizer = stock(model, bound, prefix)
    train_stock(model, optimizer, range(2))
    older = bound.state_dict()
    train_stock(model, optimizer, range(2, 4))
    newer = bound.state_dict()
    model = mlp()
    resumed = bound_to(model, prefix, Compression.random_block(8))
    resumed.load_state_dict(older if odd() else newer)
    told(DisagreementError, lambda: one_step(prefix, resumed, model), "step")


def another_step_while_running() -> None:
    """One rank loads an older state between two steps: noticed by all, within a few steps (16 values of the check), never a hang."""
    for name, make in (("block", lambda: Compression.random_block(8, **ALL)), ("top", lambda: Compression.top_k(10, **ALL))):
        prefix, model = f"running.{name}", mlp()
        bound = bound_to(model, prefix, make())
        optimizer = stock(model, bound, prefix)
        train_stock(model, optimizer, range(2))
        older = bound.state_dict()
        train_stock(model, optimizer, range(2, 4))
        if odd():
            bound.load_state_dict(older)
        told(DisagreementError, lambda model=model, optimizer=optimizer: train_stock(model, optimizer, range(4, 10)), "step")  # type: ignore[misc]


def unbound() -> None:
    told(CompressionError, lambda: one_step("unbound", Compression.top_k()), "bind")


def another_model() -> None:
    told(UnboundParameterError, lambda: one_step("another", bound_to(mlp(), "another", Compression.top_k())), "no bound parameter", "bind(model)")


def update_units() -> None:
    model = mlp()
    told(CompressionError, lambda: one_step("update", bound_to(model, "update", Compression.detached()), model), "attach(optimizer)")


def averaged_twice() -> None:
    """synchronize() and then step(), as without compression is only slow."""
    for name, make in (("block", Compression.random_block), ("top", Compression.top_k)):
        prefix, model = f"twice.{name}", mlp()
        optimizer = stock(model, bound_to(model, prefix, make()), prefix)
        for step in range(2):  # right
            optimizer.zero_grad()
            x, y = batch(hvd.rank(), step)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.synchronize()
        told(CompressionError, optimizer.step, "skip_synchronize")


def adasum() -> None:
    """Where stock Horovod has Adasum for this number of ranks."""
    model = mlp()
    try:
        optimizer = stock(model, bound_to(model, "adasum", Compression.top_k()), "adasum", momentum=0.0, op=hvd.Adasum)
    except NotImplementedError:
        return
    told(CompressionError, lambda: train_stock(model, optimizer, range(1)), "Adasum")


def frozen() -> None:
    """Frozen when it was bound, unfrozen before Horovod's optimizer was made."""
    model = mlp()
    model[2].bias.requires_grad_(False)
    bound = bound_to(model, "frozen", Compression.top_k())
    model[2].bias.requires_grad_(True)
    told(UnboundParameterError, lambda: one_step("frozen", bound, model), "frozen", "2.bias")


def gathered() -> None:
    """Horovod gathers sparse gradients beside the compression, unless told otherwise (which program_variants.py tests)."""
    for compression in (Compression.random_block(8), Compression.top_k()):
        model = torch.nn.Embedding(50, 40, sparse=True)
        prefix = f"gathered.{type(compression.method.compressor).__name__}"
        optimizer = stock(model, bound_to(model, prefix, compression), prefix, momentum=0.0)
        model(torch.arange(5)).square().sum().backward()
        told(CompressionError, optimizer.step, "sparse_as_dense=True", "sparse gradient of shape (50, 40)")


def unchecked() -> None:
    """Control: with the comparison of settings and the checksum taken out, another seed on one rank trains to other weights, silently."""
    reference_model = mlp()
    reference = train_stock(
        reference_model, stock(reference_model, bound_to(reference_model, "unchecked", Compression.random_block(8, **ALL)), "unchecked"), range(8)
    )
    agreement, slot = hvd_ecsgd.core.agreement, hvd_ecsgd.horovod.slot
    kept = agreement.raise_on_other_texts, slot.without_tail
    agreement.raise_on_other_texts = lambda packed: None
    slot.without_tail = lambda reduced, name, size: (reduced[:-5], 1.0, False)
    try:
        model = mlp()
        bound = bound_to(model, "unchecked", Compression.random_block(8, seed=int(odd()), **ALL))
        w = train_stock(model, stock(model, bound, "unchecked"), range(8))
    finally:
        agreement.raise_on_other_texts, slot.without_tail = kept
    assert not same_on_all(w, "unchecked")
    assert (w - reference).abs().max() > 1e-3


if __name__ == "__main__":
    hvd.init()
    checks = (
        ratio,
        seed,
        method,
        models,
        looked_at,
        collected,
        waited_for,
        late,
        another_step,
        another_step_while_running,
        unbound,
        another_model,
        update_units,
    )
    checks += (averaged_twice, adasum, frozen, gathered, unchecked)
    run_checks({check.__name__: check for check in checks})
