"""Steps in which something went wrong: caught exceptions, reentrant checkpoints, replaced optimizers, converted models, calls in any order."""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from hvd_ecsgd import Compression, CompressionError, DisagreementError, DistributedOptimizer
from hvd_ecsgd.errors import SequenceError
from hvd_ecsgd.optimizer.backward import BackwardPass, BackwardPasses
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, Case, by_name, ids, rows_that_cover
from tests.problems import batch, mlp, same_bits, train, weights
from tests.versions import half_losses


def wrapped(compression: Any = Compression.none, model: Any = None, momentum: float = 0.9, **options: Any) -> tuple[Any, Any]:
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    return model, DistributedOptimizer(optimizer, model.named_parameters(), compression, **options)


def backward(model: Any, rank: int = 0, t: int = 0) -> None:
    x, y = batch(rank, t, next(model.parameters()).dtype)
    torch.nn.functional.cross_entropy(model(x), y).backward()


# -- an exception in a backward pass, caught -----------------------------------------------------------------------------------


class Failure(Exception):
    pass


def failing(model: Any, rank: int, t: int) -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise Failure

    handle = model[0].weight.register_hook(fail)
    with pytest.raises(Failure):
        backward(model, rank, t)
    handle.remove()


def with_a_failure(make: Callable[[], Any], rank_that_fails: int | None, how: str, **options: Any) -> list[Any]:
    """By rank: weights after four steps, of which the second may fail on a rank; and what was raised."""

    def worker(transport: Transport) -> Any:
        model, optimizer = wrapped(make(), transport=transport, **options)
        raised = ""
        for t in range(4):
            optimizer.zero_grad()
            if t == 1 and transport.rank == rank_that_fails:
                failing(model, transport.rank, t)
                if how == "next batch":
                    optimizer.zero_grad()
                    backward(model, transport.rank, t)
            elif t != 1 or rank_that_fails is not None:
                backward(model, transport.rank, t)
            else:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    optimizer.step()
            except CompressionError as error:
                raised += f"{t}: {error}"
        return weights(model, optimizer.compression), raised, optimizer.compression.undone_steps

    return run_simulated(2, worker)


@pytest.mark.parametrize("how", ["step", "next batch"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["none", "top_k", "random_block", "double_squeeze", "detached"])
def test_an_exception_that_one_rank_caught_undoes_the_step_on_all(name: str, overlap: bool, how: str) -> None:
    make = by_name(name).make if name != "none" else (lambda: Compression.none)
    results = with_a_failure(make, 1, how, overlap=overlap)
    assert same_bits(w for w, *_ in results)
    for _, raised, undone in results:
        assert raised.startswith("1: a backward pass on rank 1 was ended by an exception") and raised.count("ended by") == 1, raised
        assert undone == 1
    if name == "none":  # other methods draw by step
        assert same_bits([results[0][0], with_a_failure(make, None, how)[0][0]]), "nothing of that step was applied"


def test_a_pass_that_failed_when_all_gradients_were_there_is_whole() -> None:
    """The control: a hook that raises after the last gradient loses nothing."""
    model, optimizer = wrapped()
    x = batch(0, 0)[0].requires_grad_()
    x.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x * 1).sum().backward()
    optimizer.step()
    assert optimizer.compression.undone_steps == 0


# -- several gradients in one backward pass ------------------------------------------------------------------------------------


class Shared(torch.nn.Module):
    """One layer in two checkpoints, another in one, a third in none."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40).double() for _ in range(3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 6)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1, 0):
            x = checkpoint(lambda x, i=i: self.layers[i](x).tanh(), x, use_reentrant=self.reentrant)
        return self.layers[2](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", ["none", "top_k", "detached"])
def test_a_layer_in_two_reentrant_checkpoints(name: str, passes: int) -> None:
    """As without checkpoints, to rounding; and two real passes are one too many still."""

    def run(reentrant: bool) -> list[Any]:
        def worker(transport: Transport) -> Any:
            model = Shared(reentrant)
            made = Compression.none if name == "none" else by_name(name).make()
            _, optimizer = wrapped(made, model, transport=transport, backward_passes_per_step=passes, bucket_bytes=0)

            def loss(t: int) -> torch.Tensor:
                x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * t + transport.rank), dtype=torch.float64)
                return model(x.requires_grad_()).square().mean()

            for t in range(4):
                optimizer.zero_grad()
                for i in range(passes):
                    loss(2 * t + i).backward()
                optimizer.step()
            after = weights(model, optimizer.compression)
            optimizer.zero_grad()
            for i in range(passes):
                loss(i).backward()
            if reentrant:
                with pytest.raises(SequenceError, match=r"backward_passes_per_step.*reentrant checkpoints: use use_reentrant=False"):
                    loss(0).backward()
            return after

        return run_simulated(2, worker)

    reentrant, plain = run(True), run(False)
    assert same_bits(reentrant)
    assert (reentrant[0] - plain[0]).abs().max() < 1e-12


def test_reentrant_checkpoints_do_not_stop_the_overlap() -> None:
    """From the second step on only the buckets of parameters with several gradients wait for step()."""
    started: list[list[str]] = []

    def observe(name: str, what: str, begin: float, end: float) -> None:
        if what == "COMPRESS":
            started[-1].append(name)

    model = Shared(True)
    _, optimizer = wrapped(Compression.none, model, bucket_bytes=0, observer=observe)
    in_backward = []
    for _ in range(2):
        started.append([])
        model(torch.ones(4, 40, dtype=torch.float64).requires_grad_()).sum().backward()
        in_backward.append(len(started[-1]))
        optimizer.step()
        optimizer.zero_grad()
    assert in_backward == [2, 4]  # of six: the last layer's; and that of the layer in one checkpoint
    assert [len(names) for names in started] == [6, 6]


def test_what_cannot_be_waited_for_is_an_error_with_the_remedy() -> None:
    """A gradient outside of all checkpoints comes first, and its exchange has started."""
    layer = torch.nn.Linear(40, 40)
    _, optimizer = wrapped(Compression.none, layer)
    x = torch.ones(4, 40).requires_grad_()
    with pytest.raises(SequenceError, match="use_reentrant=False"):
        layer(checkpoint(layer, x, use_reentrant=True)).sum().backward()
    with pytest.raises(CompressionError, match="was changed after its exchange had started"):
        optimizer.step()
    _, optimizer = wrapped(Compression.none, layer)
    optimizer.zero_grad()
    layer(checkpoint(layer, x, use_reentrant=False)).sum().backward()
    optimizer.step()


def test_reentrant_passes_in_a_thread_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose nodes run in such a thread, while the script's thread waits: an ordinary thread stands for it here."""

    class InAThread(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: p.square().sum().backward()).result()
            return gradient

    monkeypatch.setattr("hvd_ecsgd.optimizer.backward._NODE", threading.Thread._bootstrap.__code__)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.5), [("p", p)])
    x = torch.ones(3, requires_grad=True)
    InAThread.apply(InAThread.apply(x)).sum().backward()
    with pytest.raises(SequenceError, match="more than backward_passes_per_step=1"):
        InAThread.apply(x).sum().backward()
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.25), [("p", p)])
    optimizer.zero_grad()
    InAThread.apply(InAThread.apply(x)).sum().backward()
    optimizer.step()
    assert torch.equal(p.detach(), torch.zeros(3)), "1 − .25 · (2 + 2)"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_of_a_reentrant_pass_on_another_device(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients come in a thread of the engine's, on whose stack no pass is seen: it is one within another when two are running. An ordinary
    thread that is given a number stands for it here. The control: one is running, so what came before it was interrupted."""
    here, engine = threading.local(), torch.autograd.Variable._execution_engine
    number = torch._C._current_graph_task_id
    stand_in = types.SimpleNamespace(run_backward=engine.run_backward, queue_callback=lambda ended: None)
    monkeypatch.setattr("torch.autograd.Variable._execution_engine", stand_in)
    monkeypatch.setattr("torch._C._current_graph_task_id", lambda: getattr(here, "number", number()))
    passes, found = BackwardPasses(), []

    def elsewhere() -> BackwardPass:
        here.number = 2**30
        return passes.current()

    def ask(gradient: torch.Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(elsewhere).result())

    def outer(gradient: torch.Tensor) -> None:
        passes.current()
        if not reentrant:
            ask(gradient)
            return
        inner = torch.ones(1, requires_grad=True)
        inner.register_hook(ask)
        with torch.enable_grad():
            inner.sum().backward()

    x = torch.ones(1, requires_grad=True)
    x.register_hook(outer)
    x.sum().backward()
    assert [(p.reentrant, passes.interrupted) for p in found] == [(reentrant, not reentrant)]


def test_a_backward_pass_in_another_thread() -> None:
    model, optimizer = wrapped()
    before = weights(model)
    thread = threading.Thread(target=backward, args=(model,))
    thread.start()
    thread.join()
    optimizer.step()
    assert not torch.equal(weights(model), before)


# -- optimizers and models that are not what they were --------------------------------------------------------------------------


def test_a_replaced_optimizer_must_not_step() -> None:
    model, first = wrapped()
    _, second = wrapped(model=model)
    backward(model)
    before = weights(model)
    for call in (first.step, first.synchronize):
        with pytest.raises(CompressionError, match=r"newer DistributedOptimizer was made for its parameters \('0\.weight'"):
            call()
    assert torch.equal(weights(model), before)
    second.step()
    assert not torch.equal(weights(model), before), "control"


@pytest.mark.parametrize("convert", [torch.nn.Module.double, pytest.param(torch.nn.Module.half, marks=half_losses), lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("name", ["none", "top_k", "detached"])
def test_a_model_that_is_converted_after_wrapping(name: str, convert: Any) -> None:
    model, optimizer = wrapped(Compression.none if name == "none" else by_name(name).make())
    train(model, optimizer, 0, range(1))
    convert(model)
    with pytest.raises(CompressionError, match=r"was torch.float32 on cpu when it was bound, and is torch\.\w+ on cpu now.* before"):
        train(model, optimizer, 0, range(1, 2))
    model = convert(mlp())
    train(*wrapped(Compression.none, model), 0, range(1))  # control


@pytest.mark.parametrize("overlap", [True, False])
def test_a_parameter_frozen_on_some_ranks_only_is_named(overlap: bool) -> None:
    def worker(transport: Transport) -> str:
        model, optimizer = wrapped(Compression.top_k(4), transport=transport, overlap=overlap)
        train(model, optimizer, transport.rank, range(2))
        model[0].bias.requires_grad_(False)
        train(model, optimizer, transport.rank, range(2, 3))  # control: everywhere
        model[0].weight.requires_grad_(transport.rank == 0)
        with pytest.raises(DisagreementError) as told:
            train(model, optimizer, transport.rank, range(3, 4))
        return str(told.value)

    for said in run_simulated(2, worker):
        assert "frozen since the compression was bound" in said and "'0.weight'" in said


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(("dtype", "gradients"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_gradients_of_another_type_than_their_parameter(case: Case, dtype: torch.dtype, gradients: torch.dtype) -> None:
    """`p.grad` has the type that was asked for, also when a rate of zero, an overflow or another worker makes it."""
    model = mlp(dtype)
    for p in model.parameters():
        p.grad_dtype = gradients
    _, optimizer = wrapped(case.make(), model, case.momentum)
    scale = torch.tensor(1.0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for t in range(4):
            optimizer.param_groups[0]["lr"] = 0.0 if t == 1 else 0.05
            optimizer.zero_grad(set_to_none=t != 2)
            scale.fill_(float("nan") if t == 2 else 1.0)
            if t < 3:
                x, y = batch(0, t, dtype)
                (torch.nn.functional.cross_entropy(model(x).float(), y) * scale).backward()
            optimizer.step()
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} <= {gradients}
    assert weights(model, optimizer.compression).isfinite().all()


# -- calls in any order ----------------------------------------------------------------------------------------------------------

CALLS = ("backward", "synchronize", "clip", "step", "step inside", "zero_grad", "discard")


def calls_of(model: Any, optimizer: Any, backward: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """What a script may call, by name."""

    def inside() -> None:
        with optimizer.skip_synchronize():
            optimizer.step()

    return {
        "backward": backward,
        "synchronize": optimizer.synchronize,
        "clip": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        "step": optimizer.step,
        "step inside": inside,
        "zero_grad": optimizer.zero_grad,
        "discard": optimizer.discard,
    }


class Expected:
    """What should come of a call: IDLE, gradients HERE, or EXCHANGED. `keeps`: the method keeps something of what it exchanges, so it can neither be
    thrown away nor exchanged twice without a word."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.here = self.exchanged = self.left = False
        self.moves = 0

    def __call__(self, call: str) -> type[Exception] | None:
        if call == "backward":
            error = SequenceError if self.here or (self.keeps and self.exchanged) else None
            self.here = self.left = True
            self.exchanged = False
            return error
        if call == "zero_grad":
            if self.here or (self.keeps and self.exchanged):
                return SequenceError
            self.exchanged = self.left = False
        if call in ("synchronize", "step") and self.keeps and self.left and not (self.here or self.exchanged):
            return SequenceError
        if call == "synchronize":
            self.here, self.exchanged = False, True
        if call == "step inside" and not self.exchanged:
            return CompressionError
        if call in ("step", "step inside"):
            self.here = self.exchanged = False
            self.moves += 1
        if call == "discard":
            self.here = self.exchanged = self.left = False
        return None


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    calls=st.lists(st.sampled_from(CALLS), max_size=9), name=st.sampled_from(["none", "top_k", "local_momentum"]), overlap=st.booleans()
)
def test_calls_in_any_order(calls: list[str], name: str, overlap: bool) -> None:
    """Each does what it should, or is an error that has words; then an ordinary step is one."""
    model, optimizer = wrapped(Compression.none if name == "none" else getattr(Compression, name)(4, **ALL), overlap=overlap)
    expected, clipped = Expected(keeps=name != "none"), False

    do = calls_of(model, optimizer, lambda: backward(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in calls:
            clipped = clipped or call == "clip"  # what clipping may and may not do is tested elsewhere
            error = expected(call)
            try:
                do[call]()
            except (CompressionError, SequenceError) as raised:
                assert str(raised)
                assert error is not None or clipped or "ended by an exception" in str(raised), (calls, call)
            else:
                assert error is None or clipped, (calls, call)
            if error is SequenceError and call == "backward":
                break  # one pass too many: what follows is the test of lost steps above
        for _ in range(2):  # what was written to while it travelled is an error once
            with contextlib.suppress(CompressionError):
                optimizer.discard()
        optimizer.zero_grad()
        before = weights(model)
        backward(model)
        optimizer.step()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("name", ["top_k", "local_momentum"])
def test_all_orders_of_three_calls_leave_two_workers_equal(name: str) -> None:
    """Whatever was raised, and caught, on both: each hears the same, and no order of calls moves them apart."""

    def worker(calls: Sequence[str], transport: Transport) -> tuple[torch.Tensor, list[str]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), getattr(Compression, name)(2, **ALL), transport=transport)
        do = calls_of(model, optimizer, lambda: model(torch.full((1, 3), 1.0 + transport.rank)).square().sum().backward())
        said = []
        for call in calls:
            try:
                do[call]()
                said.append("")
            except (CompressionError, SequenceError) as error:
                said.append(str(error))
        return weights(model, optimizer.compression), said

    heard = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for calls in itertools.product(CALLS, repeat=3):
            if "backward" in calls[:2]:
                (first, said), (second, also_said) = run_simulated(2, partial(worker, calls))
                assert torch.equal(first, second) and said == also_said, (calls, said, also_said)
                heard.update(said)
    assert any("what a further backward pass has added" in text for text in heard) or name != "top_k", "the case that did move them apart"


def test_a_mean_that_a_backward_pass_has_added_to_can_be_thrown_away_only() -> None:
    model, optimizer = wrapped(Compression.top_k(4, **ALL))
    before = weights(model)
    backward(model)
    optimizer.synchronize()
    with pytest.raises(SequenceError, match="a backward pass after synchronize"):
        backward(model)
    for _ in range(2):
        with (
            pytest.raises(SequenceError, match=r"'\d\.(weight|bias)' holds the mean .* Throw the step away by optimizer\.discard"),
            optimizer.skip_synchronize(),
        ):
            optimizer.step()
    optimizer.discard()
    assert torch.equal(weights(model), before)
    backward(model)
    optimizer.step()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("name", ["none", "top_k"])
def test_discarding_gradients_that_were_changed(name: str) -> None:
    """What is kept of them is taken back from what they were; where nothing is kept, or a copy, there is nothing to tell."""
    for exact in (True, False):
        options = {"exact": True} if exact and name == "top_k" else {}
        model, optimizer = wrapped(Compression.none if name == "none" else Compression.top_k(4, **ALL, **options))
        before = weights(model)
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if name == "top_k" and not exact:
            with pytest.raises(CompressionError, match="was changed after its exchange had started"):
                optimizer.discard()
            continue
        optimizer.discard()
        assert torch.equal(weights(model), before) and not any(p.grad is not None for p in model.parameters())
