"""Checks of program_lifecycle.py: memory formats, mixed precision, bits."""

from __future__ import annotations

from typing import Any

import torch

from hvd_ecsgd import CompressionError, DisagreementError
from tests.conformance.lifecycle import BACKEND, METHODS, backward, check_run, everywhere, hvd, real
from tests.problems import batch, mlp, told, weights

# -- memory formats ----------------------------------------------------------------------------------------------------------------


class Images(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.first, self.second = torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 8, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x.contiguous(memory_format=torch.channels_last)))).mean((2, 3))


def channels_last() -> None:
    def run(model: Any, optimizer: Any, rank: int) -> None:
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * rank + step))
            torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
            optimizer.step()
        assert not model.second.weight.is_contiguous()

    check_run("channels_last", run, Images)


# -- mixed precision -------------------------------------------------------------------------------------------------------------


def scaled_run(prefix: str, method: str, scale: float, plain: bool, bad: bool = False, changes: Any = None) -> tuple[torch.Tensor, Any, list[float]]:
    """With a GradScaler (scale 1: without); `plain`: scaler.step alone; `bad`: rank 0's third loss is inf."""
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, enabled=scale != 1)
    optimizer = real(model, method, prefix, scaler, changes)
    scales = []
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(hvd.rank(), step)
        loss = torch.nn.functional.cross_entropy(model(x), y) * (float("inf") if bad and step == 2 and hvd.rank() == 0 else 1.0)
        scaler.scale(loss).backward()
        if plain:
            scaler.step(optimizer)
        else:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return weights(model, optimizer.bound), optimizer.bound, scales


def scaler() -> None:
    for method in METHODS:
        reference, *_ = scaled_run(f"scale 1.{method}", method, 1.0, plain=False)
        prefix = f"scale 1.{method}"  # names seed the draws
        for plain in (False, True) if BACKEND == "mpi" else (False,):
            w, _, scales = scaled_run(prefix, method, 64.0, plain)
            assert scales[-1] > scales[0]
            assert torch.equal(w, reference), f"{method}: the scale has an effect"
            w, bound, scales = scaled_run(prefix, method, 64.0, plain, bad=True)
            assert all(torch.equal(w, other) for other in everywhere(w, f"scaled.{method}"))
            assert w.isfinite().all()
            assert bound.undone_steps == 1
            assert scales[2] == scales[1] / 2, scales
        if BACKEND == "horovod":
            told(CompressionError, lambda m=method: scaled_run(f"plain.{m}", m, 64.0, plain=True), "skip_synchronize")  # type: ignore[misc]


def unattached_scaler() -> None:
    model = mlp()
    optimizer = real(model, "top_k-k", "unattached")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer.zero_grad()
    x, y = batch(hvd.rank(), 0)
    scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
    told(CompressionError, lambda: scaler.step(optimizer), "scaler.step(optimizer)")


def autocast() -> None:
    def run(model: torch.nn.Module, optimizer: Any, rank: int) -> None:
        for step in range(4):
            optimizer.zero_grad()
            x, y = batch(rank, step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        for entry in optimizer.bound.state_dict()["parameters"].values():
            assert all(t.dtype == torch.float32 for t in entry.values() if isinstance(t, torch.Tensor))

    check_run("autocast", run)


def exact() -> None:
    """An undone step with exact=True is bit for bit none; without, finite gradients stay in the residual on an unmodified Horovod (control)."""
    for method in METHODS:
        for is_exact in (True, False):
            model = mlp()
            optimizer = real(model, method, f"exact.{method}.{is_exact}", changes={"exact": is_exact})
            states = []
            for step in range(4):
                optimizer.zero_grad()
                x, y = batch(hvd.rank(), step)
                states.append(optimizer.bound.state_dict()["parameters"] if step else {})
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
                loss = torch.nn.functional.cross_entropy(model(x), y)
                (loss * float("nan") if step == 3 and hvd.rank() == 1 else loss).backward()
                optimizer.step()
            after, before = optimizer.bound.state_dict()["parameters"], states[-1]
            same = all(torch.equal(t, after[n][s]) for n, entry in before.items() for s, t in entry.items() if isinstance(t, torch.Tensor))
            assert optimizer.bound.undone_steps == 1
            assert same or not is_exact, f"{method}: not restored"
            assert is_exact or BACKEND == "mpi" or hvd.rank() == 1 or not same or method == "detached", f"{method}: the control"


def drift() -> None:
    """verify_every: one bit of one weight on one rank; told to all, by name."""
    for method in METHODS:
        model = mlp()
        optimizer = real(model, method, f"drift.{method}", changes={"verify_every": 1})
        for step in range(3):
            optimizer.zero_grad()
            backward(model, hvd.rank(), step)
            optimizer.step()
        if hvd.rank() == 1:
            with optimizer.bound.at("averaged"), torch.no_grad():
                model[2].weight[1, 2] += 1e-3  # type: ignore[index, operator]
        optimizer.zero_grad()

        def one_more(model: Any = model, optimizer: Any = optimizer) -> None:
            backward(model, hvd.rank(), 3)
            optimizer.step()

        told(DisagreementError, one_more, f"drift.{method}/2.weight", "rank 1")
