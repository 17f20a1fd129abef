"""What users do with Horovod's optimizer, against the same on simulated workers; and that a resumed run is the run."""

from __future__ import annotations

import copy
import gc
import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hvd_ecsgd import Compression, DisagreementError, DistributedOptimizer, telemetry
from hvd_ecsgd.exchange import Bernoulli, Every, NormBased, Rounds
from hvd_ecsgd.transport import run_simulated
from tests.cases import SWITCHES, by_name
from tests.horovod.programs import hvd, prefixed, run_checks, same_on_all, stock, train_stock
from tests.problems import batch, flat, mlp, train

METHODS = ("random_block-everything", "top_k-k", "double_squeeze-everything")
"""In Horovod's own all-reduce; beside it; in two passes beside it."""

Loss = Callable[[Any, int, int], torch.Tensor]


def close(a: torch.Tensor, b: torch.Tensor, what: str, tolerance: float | None = None) -> None:
    limit = (0.0 if hvd.size() == 2 else 2e-5) if tolerance is None else tolerance
    difference = (a - b).abs().max().item()
    assert difference <= limit, f"{what}: {difference} from the simulation, allowed {limit}"


def compare(
    name: str,
    model_of: Callable[[], torch.nn.Module],
    loss_of: Loss,
    steps: int = 5,
    stock_options: dict[str, Any] | None = None,
    own_options: dict[str, Any] | None = None,
    keep_gradients: bool = False,
    tolerance: float | None = None,
) -> None:
    """Train with every kind of exchange on the stock optimizer and simulated: same bits on all ranks, same weights."""
    passes = (stock_options or {}).get("backward_passes_per_step", 1)

    def train(model: Any, optimizer: Any, rank: int) -> torch.Tensor:
        for step in range(steps):
            if keep_gradients:
                model.zero_grad(set_to_none=False)
            else:
                optimizer.zero_grad()
            for i in range(passes):
                loss_of(model, rank, passes * step + i).backward()
            optimizer.step()
        return flat(p.float() for p in model.parameters())

    def simulated(transport: Any, method: str) -> torch.Tensor:
        model = model_of()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        own = DistributedOptimizer(sgd, prefixed(model, f"{name}.{method}"), by_name(method).make(), transport=transport, **(own_options or {}))
        return train(model, own, transport.rank)

    found = {}
    for method in METHODS:
        prefix = f"{name}.{method}"
        model = model_of()
        bound = by_name(method).make().bind(prefixed(model, prefix))
        found[method] = train(model, stock(model, bound, prefix, lr=0.05, **(stock_options or {})), hvd.rank())
        assert same_on_all(found[method], prefix), f"{prefix}: ranks hold different bits"
        assert not torch.equal(found[method], flat(p.float() for p in model_of().parameters())), f"{prefix}: nothing was trained"
    for i, (method, w) in enumerate(found.items()):
        if i % hvd.size() == hvd.rank():  # all hold the same bits: each rank simulates a share
            close(w, run_simulated(hvd.size(), partial(simulated, method=method))[0], f"{name}.{method}", tolerance)


def mlp_loss(model: Any, rank: int, step: int) -> torch.Tensor:
    x, y = batch(rank, step)
    return torch.nn.functional.cross_entropy(model(x), y)


class Towers(torch.nn.Module):
    """Independent towers, so that the order of forward passes is the order of gradients."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        shapes = [(20, 24), (24, 20), (20, 24), (20, 24)]
        self.towers = torch.nn.ParameterList([torch.randn(s, generator=generator) / 5 for s in shapes])


def dynamic_loss(model: Any, rank: int, step: int) -> torch.Tensor:
    """Rank by rank another order of towers; tower 2 is used by one rank only, tower 3 by rank 0 in odd steps."""
    order = [0, 1] if (rank + step) % 2 else [1, 0]
    order += [2] if step % hvd.size() == rank else []
    order += [3] if rank == 0 and step % 2 else []
    x = batch(rank, step)[0]
    total = torch.zeros(())
    for i in order:
        w = model.towers[i]
        total = total + torch.tanh((x if w.shape[0] == 20 else torch.nn.functional.pad(x, (0, 4))) @ w).square().mean()
    return total


def dynamic() -> None:
    compare("dynamic", Towers, dynamic_loss)


def groups() -> None:
    compare("groups", mlp, mlp_loss, stock_options={"groups": 2})


def groups_with_unused() -> None:
    """Groups that are complete only at synchronize(), with gradients that are zeroed in place."""
    compare("unused group", Towers, dynamic_loss, stock_options={"groups": 1}, keep_gradients=True)


def passes() -> None:
    options = {"backward_passes_per_step": 2}
    compare("passes", mlp, mlp_loss, stock_options=options, own_options=options)


def sums() -> None:
    compare("sum", mlp, mlp_loss, stock_options={"op": hvd.Sum}, own_options={"sum_gradients": True}, tolerance=1e-5)


class Images(torch.nn.Module):
    """Convolutions whose weights and gradients are channels_last: not contiguous in the usual sense."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x.contiguous(memory_format=torch.channels_last)))).mean((2, 3))


def image_loss(model: Any, rank: int, step: int) -> torch.Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * rank + step % 3))
    return torch.nn.functional.cross_entropy(model(x), torch.arange(4))


def channels_last() -> None:
    model = Images()
    image_loss(model, 0, 0).backward()
    assert not model.second.weight.grad.is_contiguous(), "the example is what it should be"  # type: ignore[union-attr]
    compare("channels_last", Images, image_loss)


def bfloat16() -> None:
    def loss(model: Any, rank: int, step: int) -> torch.Tensor:
        x, y = batch(rank, step, torch.bfloat16)
        return torch.nn.functional.cross_entropy(model(x).float(), y)

    compare("bfloat16", lambda: mlp(torch.bfloat16), loss, tolerance=0.0 if hvd.size() == 2 else 2e-2)


class Words(torch.nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 12, sparse=sparse)
        self.out = torch.nn.Linear(12, 5)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(x).mean(1))


def sparse_embedding() -> None:
    """sparse=True with sparse_as_dense gives the run of sparse=False (which needs no simulation of sparse gradients)."""
    for method in METHODS:
        finals = []
        for sparse in (True, False):
            model, prefix = Words(sparse), f"sparse.{method}"
            bound = by_name(method).make().bind(prefixed(model, prefix))
            optimizer = stock(model, bound, prefix, momentum=0.0, sparse_as_dense=True)
            for step in range(5):
                optimizer.zero_grad()
                words = torch.randint(0, 50, (8, 4), generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
                torch.nn.functional.cross_entropy(model(words), torch.arange(8) % 5).backward()
                optimizer.step()
            finals.append(flat(model.parameters()))
            assert same_on_all(finals[-1], prefix)
        close(finals[0], finals[1], f"sparse.{method}", 1e-6)


RISE = 1.3
"""What a learning rate is multiplied by now and then. It rises, since units stay when it falls in front of momentum, attached or not."""


def schedule_run(prefix: str, method: str, attach: bool) -> torch.Tensor:
    """StepLR on Horovod's optimizer, its state loaded in the middle (which replaces its groups), and a group added."""
    model = mlp()
    bound = by_name(method).make().bind(prefixed(model, prefix))
    optimizer = stock(model, bound, prefix)
    if attach:
        assert bound.attach(optimizer) is bound
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, RISE)
    for step in range(9):
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 5:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3), requires_grad=False)], "lr": 7.0})
            schedule.base_lrs = [group["lr"] for group in optimizer.param_groups]
            if attach:
                bound.attach(optimizer)
        train_stock(model, optimizer, [step])
        schedule.step()
    return flat(model.parameters())


def schedules() -> None:
    """The residual follows the learning rate as in the simulation, and does not without attach() (control)."""
    for method in METHODS:
        prefix = f"schedule.{method}"

        def worker(transport: Any, method: str = method, prefix: str = prefix) -> torch.Tensor:
            model = mlp()
            own = DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), prefixed(model, prefix), by_name(method).make(), transport=transport
            )
            schedule = torch.optim.lr_scheduler.StepLR(own, 2, RISE)
            for step in range(9):
                own.zero_grad()
                mlp_loss(model, transport.rank, step).backward()
                own.step()
                schedule.step()
            return flat(model.parameters())

        expected = run_simulated(hvd.size(), worker)[0]
        w = schedule_run(prefix, method, attach=True)
        assert same_on_all(w, prefix)
        close(w, expected, prefix)
        constant = schedule_run(prefix, method, attach=False)
        assert (constant - expected).abs().max() > 1e-4, "control: without attach() the residual keeps its old units"


def resume() -> None:
    """State saved on every rank after 4 steps and loaded into new objects: bit for bit the run of 8 steps."""
    for method in (*METHODS, "random_block-no_feedback", "fp16-feedback"):
        prefix = f"resume.{method}"

        def make(method: str = method, prefix: str = prefix) -> tuple[Any, Any, Any]:
            model = mlp()
            bound = by_name(method).make().bind(prefixed(model, prefix))
            optimizer = stock(model, bound, prefix)
            return model, bound.attach(optimizer), optimizer

        model, bound, optimizer = make()
        through = train_stock(model, optimizer, range(8))
        model, bound, optimizer = make()
        train_stock(model, optimizer, range(4))
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), bound.state_dict()], file)
        file.seek(0)
        weights, optimizer_state, state = torch.load(file, weights_only=True)
        model, bound, optimizer = make()
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)
        bound.load_state_dict(state)
        assert torch.equal(train_stock(model, optimizer, range(4, 8)), through), prefix
        if "no_feedback" not in method:
            model, bound, optimizer = make()
            model.load_state_dict(weights)
            optimizer.load_state_dict(optimizer_state)
            assert not torch.equal(train_stock(model, optimizer, range(4, 8)), through), f"{prefix}: control without the residuals"


def clipping() -> None:
    """synchronize, clip, step inside skip_synchronize: the mean is clipped, once."""
    for method in METHODS:
        prefix = f"clip.{method}"
        model = mlp()
        optimizer = stock(model, by_name(method).make().bind(prefixed(model, prefix)), prefix, lr=1.0, momentum=0.0)
        for step in range(3):
            optimizer.zero_grad()
            mlp_loss(model, hvd.rank(), step).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            before = flat(model.parameters())
            with optimizer.skip_synchronize():
                optimizer.step()
            moved = (flat(model.parameters()) - before).norm().item()
            assert abs(moved - 0.01) < 1e-5, moved
        assert same_on_all(flat(model.parameters()), prefix)


def bad_gradients() -> None:
    """A NaN on one rank: every rank's mean is NaN, the step is counted as undone, residuals stay finite, and training goes on."""
    for method in METHODS:
        prefix = f"nan.{method}"
        model = mlp()
        bound = by_name(method).make().bind(prefixed(model, prefix))
        optimizer = stock(model, bound, prefix)
        for step in range(6):
            optimizer.zero_grad()
            (mlp_loss(model, hvd.rank(), step) * (float("nan") if step == 2 and hvd.rank() == 1 else 1.0)).backward()
            if step == 2:
                optimizer.synchronize()
                assert all(p.grad is not None and p.grad.isnan().any() for p in model.parameters())
                continue
            optimizer.step()
        assert bound.undone_steps == 1
        w = flat(model.parameters())
        assert w.isfinite().all()
        assert same_on_all(w, prefix)
        for entry in bound.state_dict()["parameters"].values():
            assert all(t.isfinite().all() for t in entry.values() if isinstance(t, torch.Tensor))


def switching() -> None:
    """One training through every kind of exchange, in and beside Horovod's own all-reduce; ranks that switch to different methods are told."""

    def run(model: Any, optimizer: Any, compression: Any, rank: int) -> torch.Tensor:
        for step in range(10):
            if step in SWITCHES:
                compression.switch(SWITCHES[step]())
            optimizer.zero_grad()
            mlp_loss(model, rank, step).backward()
            optimizer.step()
        try:
            compression.switch(Compression.top_k(10 + rank))
        except DisagreementError:
            return flat(model.parameters())
        raise AssertionError("ranks switched to different methods")

    def worker(transport: Any) -> torch.Tensor:
        model = mlp()
        own = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), prefixed(model, "switching"), SWITCHES[0](), transport=transport, bucket_bytes=0
        )
        return run(model, own, own.compression, transport.rank)

    model = mlp()
    bound = SWITCHES[0]().bind(prefixed(model, "switching"))
    optimizer = stock(model, bound, "switching", momentum=0)
    w = run(model, optimizer, bound.attach(optimizer), hvd.rank())
    assert same_on_all(w, "switching")
    close(w, run_simulated(hvd.size(), worker)[0], "switching")


def skipped_bytes() -> None:
    """What silent workers and servers did not send is counted, as in the simulation; nobody waits for it."""
    policies = {
        "turns": (Every(2), Every(1)),
        "rounds": (Rounds(4), Rounds(4)),
        "drawn": (Bernoulli(0.5), Bernoulli(0.5, cap=1)),
        "norm": (NormBased(16.0), NormBased(16.0)),
    }
    for what, (workers, servers) in policies.items():
        prefix = f"skipped.{what}"
        options: dict[str, Any] = {"momentum": 0.9, "dense_below": 0, "dense_1d": False}

        def worker(transport: Any, w: Any = workers, s: Any = servers, prefix: str = prefix, options: Any = options) -> Any:
            model = mlp()
            sgd = torch.optim.SGD(model.parameters(), lr=0.05)
            method = Compression.comp_skip(w, s, **options)
            own = DistributedOptimizer(sgd, prefixed(model, prefix), method, transport=transport, bucket_bytes=0)
            train(model, own, transport.rank, range(8))
            return own.compression.traffic

        model = mlp()
        bound = Compression.comp_skip(workers, servers, **options).bind(prefixed(model, prefix))
        optimizer = stock(model, bound, prefix, lr=0.05, momentum=0)
        bound.attach(optimizer)
        train_stock(model, optimizer, range(8))
        assert bound.traffic.skipped > 0, prefix
        assert bound.traffic == run_simulated(hvd.size(), worker)[hvd.rank()], prefix


def feedback_matters() -> None:
    """Control of the comparisons: without error feedback the weights are others."""
    finals = []
    for feedback in (True, False):
        model = mlp()
        compression = Compression.top_k(k=20, error_feedback=feedback, dense_below=0, dense_1d=False)
        prefix = f"feedback.{feedback}"
        finals.append(train_stock(model, stock(model, compression.bind(prefixed(model, prefix)), prefix), range(8)))
    assert (finals[0] - finals[1]).abs().max() > 1e-2


class Kept:
    """A sink of telemetry."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def write(self, record: Any) -> None:
        self.lines.append(record)

    def close(self) -> None:
        pass


def telemetry_changes_nothing() -> None:
    """Records of every step, by the attached optimizer's param groups; Horovod's own waiting is not seen; another rate is (control)."""
    for method in METHODS:

        def run(name: str, kept: Kept | None, lr: float = 0.1, method: str = method) -> tuple[torch.Tensor, Any]:
            model = mlp()
            compression = by_name(method).make().bind(prefixed(model, name))
            groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr / 2}]
            optimizer = stock(model, compression, name, optimizer=torch.optim.SGD(groups, lr=lr, momentum=0.9))
            compression.attach(optimizer)
            if kept is not None:
                telemetry.Logger(compression, kept, norms_every=2, ranks="all")
            return train_stock(model, optimizer, range(6)), compression.traffic

        kept = Kept()
        (w, traffic), (plain, _) = run(f"telemetry.{method}", kept), run(f"telemetry.{method}", None)
        assert torch.equal(w, plain) and not torch.equal(w, run(f"telemetry.{method}", None, 0.09)[0])
        about, *records = kept.lines
        assert (about["kind"], about["rank"], about["size"]) == ("run", hvd.rank(), hvd.size())
        assert [r["step"] for r in records] == list(range(6)) and all([g["group"] for g in r["groups"]] == [0, 1] for r in records)
        assert sum(r["sent_bytes"] for r in records) == traffic.sent and all(r["received_bytes"] > 0 < r["wire_seconds"] for r in records)
        assert ["relative_error" in r for r in records] == [True, False] * 3
        assert {"wait_seconds" in r for r in records} == {method != "random_block-everything"}


def waiting_sleeps() -> None:
    """Whoever waits for a late rank takes no core, with parameters that not every rank's backward pass reaches, too: in an attached optimizer's
    `synchronize`, and in what is ours on any. Horovod's own `synchronize` takes one (control). By the time of a waiting rank's processor."""
    assert hvd.gloo_enabled(), "over MPI it waits as Horovod does"

    def late(gradient: torch.Tensor | None = None) -> None:
        if hvd.rank() == 0:
            time.sleep(1.5)

    def waited(name: str, attached: bool, begun: bool) -> float:
        """Rank 0 is late with its last gradient, when others have `begun` the step with it, or with all of them."""
        gc.collect()  # beside other methods of this process the end of a backward pass waits in another way
        model = Towers()
        bound = Compression.random_block(4, dense_below=0, dense_1d=False).bind(prefixed(model, name))
        optimizer = stock(model, bound, name, lr=0.05)
        if attached:
            bound.attach(optimizer)
        for step in range(4):  # after all that the first steps compare
            optimizer.zero_grad()
            dynamic_loss(model, hvd.rank(), step).backward()
            optimizer.step()
        optimizer.zero_grad()
        squares = [tower.square().sum() for tower in model.towers]
        if begun:
            squares[0].register_hook(late)
        hvd.barrier()
        if not begun:
            late()
        before = time.thread_time()
        sum(squares).backward()
        optimizer.step()
        return time.thread_time() - before

    synchronize, ours = waited("waiting.attached", True, True), waited("waiting.ours", False, False)
    looking = waited("waiting.looks", False, True)
    if hvd.rank() == 1:
        times = f"{synchronize:.3f} s attached, {ours:.3f} s in what is ours, {looking:.3f} s in Horovod's"
        assert max(synchronize, ours) < 0.4 and looking > 2 * max(synchronize, ours), times


if __name__ == "__main__":
    hvd.init()
    checks = (dynamic, groups, groups_with_unused, passes, sums, channels_last, bfloat16, sparse_embedding)
    checks += (schedules, resume, clipping, bad_gradients, switching, skipped_bytes, feedback_matters, telemetry_changes_nothing, waiting_sleeps)
    run_checks({check.__name__: check for check in checks})
