"""What scripts do to gradients: writing to them while they travel, clipping, throwing them away, keeping them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hvd_ecsgd.core.guard
from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.errors import SequenceError
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, CASES, Case, bound_method, by_name, ids, rows_that_cover
from tests.problems import batch, held, mlp, weights
from tests.unit.test_undo import everything
from tests.versions import cpu_scaler


class Late:
    """An executor that runs nothing before it is asked to: a sending thread that is slow on purpose. `Inline` is the fast one."""

    concurrent = False

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def drain(self) -> None:
        while self._work:
            self._work.pop(0)()


def wrapped(compression: Any, lr: float = 1.0, momentum: float = 0.0, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return model, DistributedOptimizer(sgd, model.named_parameters(), compression, **options)


def backward(model: torch.nn.Module, t: int = 0, rank: int = 0, scale: Callable[[Any], Any] = lambda loss: loss) -> None:
    x, y = batch(rank, t)
    scale(torch.nn.functional.cross_entropy(model(x), y)).backward()


def _assign(p: torch.nn.Parameter) -> None:
    p.grad.data = p.grad.clamp(-1e-3, 1e-3)  # type: ignore[union-attr]


def _numpy(p: torch.nn.Parameter) -> None:
    p.grad.numpy()[:] *= 0.01  # type: ignore[union-attr]


WRITES: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "data.clamp_": lambda p: p.grad.data.clamp_(-1e-3, 1e-3),  # type: ignore[union-attr]
    "data =": _assign,
    "numpy": _numpy,
    "clamp_": lambda p: p.grad.clamp_(-1e-3, 1e-3),  # type: ignore[union-attr]
    "None": lambda p: setattr(p, "grad", None),
}


@pytest.mark.parametrize("executor", ["Inline", "Late"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["top_k", "detached"])
def test_what_is_written_to_gradients_on_their_way_is_an_error(name: str, write: str, executor: str) -> None:
    """Whether the sending thread has read them by then or not. Reading them is none (control)."""
    model, optimizer = wrapped(by_name(name).make(), executor=Late() if executor == "Late" else None)
    for t in range(5):  # beyond the steps in which all elements are compared
        optimizer.zero_grad()
        backward(model, t)
        assert all(p.grad is not None and p.grad.data.norm().item() >= 0 and p.grad.numpy().max() is not None for p in model.parameters())
        optimizer.step()
    optimizer.zero_grad()
    backward(model, 5)
    WRITES[write](model[0].weight)
    with pytest.raises(CompressionError, match=r"'0\.weight' was changed after its exchange had started.*clip_norm"):
        optimizer.step()


def test_a_single_element_is_noticed_in_the_first_steps_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def noticed(steps: int) -> bool:
        model, optimizer = wrapped(Compression.top_k(10))
        for t in range(steps):
            optimizer.zero_grad()
            backward(model, t)
            optimizer.step()
        optimizer.zero_grad()
        backward(model)
        assert model[0].weight.grad is not None and model[0].weight.grad.numel() > 1000
        model[0].weight.grad.data[3, 5] = 0.5
        try:
            optimizer.step()
        except CompressionError as error:
            return "'0.weight'" in str(error)
        return False

    monkeypatch.setattr(hvd_ecsgd.core.guard, "_EVERY", 5)
    assert [noticed(steps) for steps in (0, 2, 3, 4, 5)] == [True, True, False, False, True]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["detached", "local_momentum", "pef", "topk_sgd", "cser", "dist_ef_sgd"])
def test_a_change_after_the_exchange_is_an_error_where_the_method_applies_the_update(name: str, write: str) -> None:
    model, optimizer = wrapped(by_name(name).make())
    backward(model)
    optimizer.synchronize()
    WRITES[write](model[0].weight)
    with pytest.raises(CompressionError, match=r"'0\.weight' was changed after it had been exchanged.*clip_norm"), optimizer.skip_synchronize():
        optimizer.step()


@pytest.mark.parametrize("clips", [True, False])
def test_clipping_after_unscaling_is_noticed_too(clips: bool) -> None:
    """`unscale_` alone is not (control): the recipe of docs/reliability.md."""
    model, optimizer = wrapped(Compression.detached(8))
    scaler = cpu_scaler(init_scale=2.0**8)
    optimizer.compression.attach(optimizer, scaler)
    before = weights(model)
    backward(model, scale=scaler.scale)
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    if clips:
        for p in model.parameters():
            p.grad.data.mul_(0.1)  # type: ignore[union-attr]
        with pytest.raises(CompressionError, match="after it had been exchanged"), optimizer.skip_synchronize():
            scaler.step(optimizer)
    else:
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        assert not torch.equal(weights(model), before)


# -- hyper-parameters that are set between backward() and step() ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "detached"])
def test_what_is_set_after_the_backward_pass_does_not_race_with_the_sending_thread(name: str) -> None:
    """The exchange is that of the rates at its beginning, whether the thread is fast or slow; later ones count in the next step."""
    held = []
    for executor in (None, Late()):
        model, optimizer = wrapped(getattr(Compression, name)(8, **ALL), 0.1, executor=executor)
        for t in range(4):
            optimizer.zero_grad()
            backward(model, t)
            optimizer.param_groups[0]["lr"] = 0.1 / (2 + t)
            optimizer.step()
        assert not optimizer.compression.undone_steps
        held.append(weights(model, optimizer.compression))
    assert torch.equal(*held)
    model, optimizer = wrapped(getattr(Compression, name)(8, **ALL), 0.1)
    for t in range(4):
        optimizer.zero_grad()
        backward(model, t)
        optimizer.step()
    assert not torch.equal(held[0], weights(model, optimizer.compression)), "the control: the rates count"


@pytest.mark.parametrize("executor", ["Inline", "Late"])
@pytest.mark.parametrize("option", ["lr", "momentum"])
def test_a_bad_value_that_is_set_after_the_backward_pass_is_applied_by_nobody(option: str, executor: str) -> None:
    model, optimizer = wrapped(Compression.top_k(8, **ALL), 0.1, 0.9, executor=Late() if executor == "Late" else None)
    group, before = optimizer.param_groups[0], weights(model)
    good = group[option]
    backward(model)
    group[option] = float("nan")
    with pytest.raises(CompressionError, match=rf"{option}=nan, which was set after .* Nothing was applied .*skip_synchronize.*discard\(\)"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    group[option] = good
    with optimizer.skip_synchronize():
        optimizer.step()
    assert weights(model).isfinite().all() and not torch.equal(weights(model), before)
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    assert optimizer.compression.undone_steps == 0


# -- clipping inside the method --------------------------------------------------------------------------------------------------


def with_clip(case: Case, **clip: float) -> Compression:
    compression = case.make()() if not isinstance(case.make(), Compression) else case.make()
    m = compression.method
    options = {o: getattr(m, o) for o in ("dense_below", "dense_1d", "seed", "warmup_steps", "ratio_schedule", "exact", "verify_every")}
    return Compression(m.compressor, m.feedback, m.exchange, **options, **clip)


def by_hand(gradients: list[torch.Tensor], clip: str, limit: float) -> list[torch.Tensor]:
    if clip == "clip_value":
        return [g.clamp(-limit, limit) for g in gradients]
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    return [g * min(1.0, limit / (norm + 1e-6)) for g in gradients]


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_clipping_inside_is_clipping_by_hand(case: Case) -> None:
    """Of the local gradient, before everything else; the two ways in turns."""
    clip = ("clip_norm", "clip_value")[CASES.index(case) % 2]
    limit = {"clip_norm": 0.3, "clip_value": 0.02}[clip]

    def worker(transport: Transport) -> tuple[torch.Tensor, bool]:
        held, active = [], False
        for inside in (True, False):
            model, optimizer = wrapped(with_clip(case, **({clip: limit} if inside else {})), 0.1, case.momentum, transport=transport)
            for t in range(3):
                if case.momentum:
                    optimizer.param_groups[0]["weight_decay"] = 0.1 if optimizer.compression.method.feedback.takes.momentum else 0.0
                x, y = batch(transport.rank, t)
                optimizer.zero_grad()
                gradients = list(torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), list(model.parameters())))
                clipped = by_hand(gradients, clip, limit)
                active = active or not all(torch.equal(a, b) for a, b in zip(gradients, clipped))
                for p, g in zip(model.parameters(), gradients if inside else clipped):
                    p.grad = g
                optimizer.step()
            held.append(weights(model, optimizer.compression))
        return (held[0] - held[1]).abs().max(), active

    for difference, active in run_simulated(2, worker):
        assert active, "the control: there is something to clip"
        assert difference <= 1e-6


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("clip", ["clip_norm", "clip_value"])
def test_clipping_hides_no_inf(clip: str, value: float) -> None:
    model, optimizer = wrapped(Compression.detached(4, **ALL, **{clip: 0.1}))
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    optimizer.step()
    assert optimizer.compression.undone_steps == 1


@pytest.mark.parametrize("clip", ["clip_norm", "clip_value"])
def test_clipping_is_of_the_unscaled_gradient(clip: str) -> None:
    held = []
    for scale in (1.0, 2.0**10):
        model, optimizer = wrapped(Compression.random_block(4, **ALL, **{clip: 0.05}))
        scaler = cpu_scaler(init_scale=scale, enabled=scale != 1.0)
        optimizer.compression.attach(optimizer, scaler)
        for t in range(3):
            optimizer.zero_grad()
            backward(model, t, scale=scaler.scale)
            scaler.step(optimizer)
            scaler.update()
        held.append(weights(model))
    torch.testing.assert_close(held[0], held[1], rtol=1e-6, atol=1e-7)


def test_a_saved_method_without_clipping_is_told_as_before() -> None:
    assert repr(Compression.top_k(8).method).endswith("ratio_schedule=())")
    assert repr(Compression.top_k(8, clip_value=1.0).method).endswith("ratio_schedule=(), clip_value=1.0)")
    for wrong in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(CompressionError, match="clip_norm"):
            Compression.top_k(8, clip_norm=wrong)


# -- a step that is thrown away, and gradients that were exchanged already --------------------------------------------------------


@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_a_discarded_step_leaves_nothing(case: Case) -> None:
    """Weights and state are as they were, on all ranks; those of a step that stands are not (control). Before `synchronize()` and after, in turns."""
    when = ("synchronize", "backward")[CASES.index(case) // 2 % 2]

    def worker(transport: Transport) -> None:
        model, optimizer = wrapped(case.make(), 0.05, case.momentum, transport=transport)
        for t in range(4):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + t)
            optimizer.zero_grad()
            backward(model, t, transport.rank)
            if t == 3:
                break
            optimizer.step()
            before = everything(model, optimizer)
        if when == "synchronize":
            optimizer.synchronize()
            if optimizer.compression.method.stateful:
                with pytest.raises(SequenceError, match=r"discard\(\)"):
                    optimizer.zero_grad()
                with pytest.raises(CompressionError, match="between a backward pass"):
                    optimizer.compression.state_dict()
        optimizer.compression.discard() if when == "synchronize" else optimizer.discard()
        assert all(p.grad is None for p in model.parameters())
        after = everything(model, optimizer)
        assert before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        backward(model, 4, transport.rank)
        optimizer.step()
        later = everything(model, optimizer)
        if bound_method(case).stateful:
            assert any(not torch.allclose(later[name], before[name], rtol=1e-4, atol=1e-5) for name in before if name != "x")

    run_simulated(2, worker)


@pytest.mark.parametrize("name", ["random_block", "local_momentum", "double_squeeze", "top_k"])
@pytest.mark.parametrize("calls", ["synchronize", "step step", "step synchronize"])
def test_gradients_are_exchanged_once(name: str, calls: str) -> None:
    """Another call without new gradients changes nothing: a second synchronize() warns, and what a step has left is refused. After zero_grad() it is
    a step with gradients of zero."""
    model, optimizer = wrapped(by_name(name).make(), 0.1)
    for t in range(2):
        optimizer.zero_grad()
        backward(model, t)
        optimizer.step()
    optimizer.zero_grad()
    earlier = held(optimizer.compression)
    backward(model, 2)
    if calls == "synchronize":
        optimizer.synchronize()
        kept = held(optimizer.compression)
        with pytest.warns(UserWarning, match="not exchanged again"):
            optimizer.synchronize()
        assert optimizer.compression.aggregator.state.step == 3
        assert kept and all(map(torch.equal, kept, held(optimizer.compression)))
        assert len(earlier) == len(kept) and not all(map(torch.equal, earlier, kept)), "the control: the first has changed it"
        return
    first, second = calls.split()
    getattr(optimizer, first)()
    before = everything(model, optimizer)
    with pytest.raises(SequenceError, match="was exchanged already"):
        getattr(optimizer, second)()
    after = everything(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.compression.aggregator.state.step == 4


def test_the_messages_name_what_a_gan_does() -> None:
    model, optimizer = wrapped(Compression.top_k(10))
    backward(model)
    with pytest.raises(SequenceError, match=r"freeze.*discard\(\)"):
        optimizer.zero_grad()
    with pytest.raises(SequenceError, match=r"freeze.*discard\(\)"):
        backward(model)
    for what, call in (("zero_grad\\(\\)", lambda o, m: o.zero_grad()), ("a backward pass", lambda o, m: backward(m))):
        model, optimizer = wrapped(Compression.top_k(10))
        backward(model)
        optimizer.synchronize()
        with pytest.raises(SequenceError, match=rf"{what} after synchronize\(\) and before step.*skip_synchronize.*discard\(\), on every rank"):
            call(optimizer, model)


# -- gradients that a script keeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["none", "random_block"])
def test_gradients_that_are_kept_are_not_written_to(name: str, set_to_none: bool) -> None:
    w = torch.nn.Parameter(torch.zeros(2000))
    b = torch.nn.Parameter(torch.zeros(3))
    method = by_name(name).make()
    optimizer = DistributedOptimizer(torch.optim.SGD([w, b], lr=0.1), [("w", w), ("b", b)], method)
    kept, numpy = [], []
    for t in (1.0, 2.0, 3.0):
        optimizer.zero_grad(set_to_none=set_to_none)
        (t * b.sum() + w.sum()).backward()
        optimizer.step()
        assert b.grad is not None
        kept.append(b.grad if set_to_none else b.grad.clone())
        numpy.append(b.grad.detach().numpy() if set_to_none else b.grad.numpy().copy())
    assert [g.tolist() for g in kept] == [[t] * 3 for t in (1.0, 2.0, 3.0)]
    assert [g.tolist() for g in numpy] == [[t] * 3 for t in (1.0, 2.0, 3.0)]
    assert b.grad is not None
    file = io.BytesIO()
    torch.save(b.grad, file)
    assert len(file.getvalue()) < 4000, "and not the whole bucket"
    b.grad.detach_()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_result_buffers_are_used_again_in_the_usual_loop(set_to_none: bool) -> None:
    """One, or two in turns where gradients live in the last one; a new one each time where the script keeps the gradients (control)."""
    for keeps in (False, True):
        model, optimizer = wrapped(Compression.none())
        places, kept = [], []
        for t in range(6):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, t)
            optimizer.step()
            p = model[0].weight
            assert p.grad is not None
            places.append(p.grad.data_ptr())
            if keeps:
                kept.append(p.grad.detach())
                p.grad = None
        assert len(set(places)) == (6 if keeps else 1 if set_to_none else 2)


# -- parameters that are written to between backward() and step() ------------------------------------------------------------------

DECAYING: dict[str, Callable[[], Any]] = {
    "local_momentum": lambda: Compression.local_momentum(8, **ALL),
    "topk_sgd": lambda: Compression.topk_sgd(8, **ALL),
    "pef": lambda: Compression.pef(8, **ALL),
    "dist_ef_sgd": lambda: Compression.dist_ef_sgd(**ALL),
    "dist_ef_sgd(momentum=.9, weight_decay=.1)": lambda: Compression.dist_ef_sgd(momentum=0.9, weight_decay=0.1, **ALL),
    "detached": lambda: Compression.detached(8),
}
"""Methods that take weight decay off parameters that they do not shift; of `detached` those that travel uncompressed."""


def _of_theirs(p: torch.nn.Parameter) -> None:
    p.data = p.data * 0.5


MOVES: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "in place": lambda p: p.detach().mul_(0.5),
    "data": lambda p: p.data.mul_(0.5),
    "data =": _of_theirs,
    "numpy": lambda p: p.detach().numpy().__imul__(0.5),
}


@pytest.mark.parametrize("executor", ["Inline", "Late"])
@pytest.mark.parametrize(("name", "write"), [(name, "data") for name in DECAYING] + [("local_momentum", write) for write in MOVES if write != "data"])
def test_what_weight_decay_is_taken_of_must_not_be_written_to_while_it_may_be_read(name: str, write: str, executor: str) -> None:
    """An error, whether the sending thread is fast or slow; none after step(), before the backward pass, inside of `at` or without overlap."""
    own = "weight_decay" in name

    def made(**options: Any) -> tuple[Any, Any]:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0 if own or name == "topk_sgd" else 0.9, weight_decay=0.0 if own else 0.1)
        options["executor"] = Late() if executor == "Late" else None
        return model, DistributedOptimizer(sgd, model.named_parameters(), DECAYING[name](), **options)

    def moved(where: str) -> torch.Tensor:
        model, optimizer = made(overlap=where != "without overlap")
        for t in range(5):
            optimizer.zero_grad()
            if t == 4 and where == "frozen":
                model[-1].bias.requires_grad_(False)
            if t == 4 and where == "before":
                MOVES[write](model[-1].bias)
            backward(model, t)
            if t == 4 and where in ("between", "without overlap", "frozen"):
                MOVES[write](model[-1].bias)
            if t == 4 and where == "at":
                with optimizer.compression.at("averaged"):
                    MOVES[write](model[-1].bias)
            if t == 4 and where == "between":
                with pytest.raises(CompressionError, match=r"parameter '2\.bias' was written to .*weight decay.*overlap=False"):
                    optimizer.step()
            else:
                optimizer.step()
            if t == 4 and where == "after":
                MOVES[write](model[-1].bias)
        return weights(model, optimizer.compression)

    moved("between")
    if (name, write) != ("local_momentum", "data"):
        return
    before = moved("nowhere")
    for where in ("before", "at", "without overlap", "frozen", "after"):
        assert not torch.equal(moved(where), before), where


@pytest.mark.parametrize("method", [Compression.local_momentum, Compression.top_k])
def test_without_weight_decay_inside_parameters_may_be_written_to_at_any_time(method: Any) -> None:
    """Nothing reads them, or the optimizer alone."""
    held = []
    for executor in (None, Late()):
        model, optimizer = mlp(), None
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1 if method is Compression.top_k else 0.0)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), method(8, **ALL), executor=executor)
        for t in range(3):
            optimizer.zero_grad()
            backward(model, t)
            for p in model.parameters():
                p.data.mul_(0.9)
            optimizer.step()
        held.append(weights(model))
    assert torch.equal(*held)


# -- evaluating in the middle of a step ------------------------------------------------------------------------------------------


def test_parameters_move_only_when_nothing_reads_them_any_more() -> None:
    """`at` between backward() and step(), where a slow thread reads parameters (weight decay, the check of who wrote to them) inside of it and
    afterwards: the same bits as without evaluation."""

    def run(evaluate: bool) -> torch.Tensor:
        model, late = mlp(), Late()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), Compression.detached(8, **ALL), executor=late)
        for t in range(4):
            optimizer.zero_grad()
            backward(model, t)
            if evaluate:
                with optimizer.compression.at("averaged"):
                    late.drain()  # the thread goes on here
            optimizer.step()
        return weights(model, optimizer.compression)

    assert torch.equal(run(True), run(False))
