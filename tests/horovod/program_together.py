"""One rank alone calls a function that all call together. Arguments: what the other does meanwhile, and a folder. Each stands for several checks,
whose errors the script catches: one after the other, but for `end`, as a script has one."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

import hvd_ecsgd.horovod.opening
from hvd_ecsgd import Compression, load_checkpoint, save_checkpoint

hvd.init()
rank = hvd.rank()
what, folder = sys.argv[1:]
warnings.simplefilter("always")


def make(prefix: str, compression: Any) -> tuple[Any, Any, Any]:
    model = torch.nn.Linear(4, 4)
    torch.nn.init.ones_(model.weight)
    bound = compression.bind(model)
    named = [(f"{prefix}.{n}", p) for n, p in model.named_parameters()]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named, compression=bound)
    return model, optimizer, bound.attach(optimizer)


def step(model: Any, optimizer: Any, bound: Any) -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def step_by_hand(model: Any, optimizer: Any, bound: Any) -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()


def save(model: Any, optimizer: Any, bound: Any) -> None:
    save_checkpoint(f"{folder}/{optimizer._parameter_names[model.weight]}", model, optimizer, bound)


def load(model: Any, optimizer: Any, bound: Any) -> None:
    load_checkpoint(folder, model, optimizer, bound)


def switch(model: Any, optimizer: Any, bound: Any) -> None:
    bound.switch(Compression.random_block(2, dense_below=0, dense_1d=False))


def virtual(model: Any, optimizer: Any, bound: Any) -> None:
    with bound.at("virtual"):
        pass


def tell(case: str, run: Callable[[], Any]) -> None:
    try:
        run()
    except Exception as error:
        print(f"{case}: rank {rank}: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"{case}: rank {rank}: nothing was raised", flush=True)


def top_k() -> Any:
    return Compression.top_k(2, dense_below=0, dense_1d=False)


def random_block() -> Any:
    return Compression.random_block(2, dense_below=0, dense_1d=False)


def detached() -> Any:
    return Compression.detached(2, dense_below=0, dense_1d=False)


if what == "step":
    # A model that is still there, and in no step: the wait is in step() then, not in the backward pass.
    cases: dict[str, tuple[Any, int, Callable[..., None], Callable[..., None]]] = {
        "first": (top_k, 0, save, step),
        "save": (top_k, 2, save, step),
        "by hand": (random_block, 1, save, step_by_hand),
        "load": (random_block, 2, step, load),
        "switch": (random_block, 2, switch, step),
        "virtual": (detached, 2, virtual, step),
        "first virtual": (detached, 0, virtual, load),
        "both": (top_k, 1, save, load),
    }
    for case, (compression, steps, mine, others) in cases.items():
        training = make(case, compression())
        for _ in range(steps):
            step(*training)
        tell(case, lambda: (mine if rank == 0 else others)(*training))  # noqa: B023
    training = make("all", random_block())  # control
    save(*training)
    for _ in range(2):
        step(*training)
    save(*training)
    tell("all", lambda: step(*training))
else:
    hvd_ecsgd.horovod.opening.SILENCE = 0.1
    functions = {"save": (top_k, save), "load": (random_block, load), "switch": (random_block, switch), "virtual": (detached, virtual)}
    trainings = {name: make(name, compression()) for name, (compression, _) in functions.items()}
    for training in trainings.values():
        step(*training)
    all_wait = Path(folder) / "all wait"
    alone = {name: lambda call=call, name=name: call(*trainings[name]) for name, (_, call) in functions.items()}
    if what == "allreduce":
        for name, call in alone.items():
            if rank == 0:
                tell(f"{what}, {name}", call)
            hvd.allreduce(torch.ones(2), name=f"loss.{name}")  # where the other rank is meanwhile
    elif rank == 0:
        shown, show = [], warnings.showwarning

        def showing(message: Any, *others: Any) -> None:
            show(message, *others)
            shown.append(str(message))
            if sum("has waited" in text for text in shown) == len(alone):
                all_wait.touch()

        warnings.showwarning = showing
        threads = [threading.Thread(target=tell, args=(f"{what}, {name}", call)) for name, call in alone.items()]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    else:
        while not all_wait.exists():
            time.sleep(0.01)
