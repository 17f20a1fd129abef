"""broadcast_parameters and broadcast_optimizer_state: whatever ranks held before, they hold root's afterwards, bit for bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch

import mpi_backend as hvd
from tests.mpi.verdict import Verdict, content

verdict = Verdict()
hvd.init()
rank, size = hvd.rank(), hvd.size()


def model(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3, 2)).to(dtype)


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        loss = network(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(i)).to(next(network.parameters()).dtype)).square().mean()
        loss.backward()
        optimizer.step(lambda loss=loss: loss)  # type: ignore[arg-type]


# Parameters, in every form; channels_last is not contiguous.
for form in range(4):
    network, root = model(rank).to(memory_format=torch.channels_last), form % size
    expected = model(root).state_dict()
    if form == 0:
        hvd.broadcast_parameters(network.state_dict(), root_rank=root)
    elif form == 1:
        hvd.broadcast_parameters(network.named_parameters(), root)
    elif form == 2:
        hvd.broadcast_parameters(list(network.named_parameters()), root)
    else:
        hvd.broadcast_parameters(list(network.parameters()), root)
    for name, p in network.state_dict().items():
        verdict.equal(p, expected[name], f"parameter {name}, form {form}")
verdict.expect(network[0].weight.is_contiguous(memory_format=torch.channels_last), "strides stay")
verdict.raises(ValueError, lambda: hvd.broadcast_parameters(3, 0), "no parameters", "expected a dict")  # type: ignore[arg-type]
verdict.raises(ValueError, lambda: hvd.broadcast_parameters({"step": 3}, 0), "no tensor", "'step'", "broadcast_object")  # type: ignore[dict-item]
one, two = torch.ones(1), torch.ones(2)
for wrong, message in (
    ([("a", one, two)], "expected pairs of a name (a string) and a tensor, got ('a',"),
    ([("a",)], "expected pairs"),
    ([(0, one)], "expected pairs"),
    ([(None, one)], "expected pairs"),
    ({0: one, "a": two}, "expected pairs"),
    ([("a", one), ("a", two)], "two tensors are named 'a'"),
    (model(0), "is of type Sequential; expected a dict, (name, tensor) pairs or tensors; pass model.state_dict()"),
    (torch.nn.Linear(1, 1), "pass model.state_dict()"),
    ("weights", "is of type str"),
    (one, "is of type Tensor"),
    (None, "is of type NoneType"),
    ({"a": None}, "'a' is of type NoneType"),
    ({"a": torch.ones(2, device="meta")}, "meta device has no values"),
    ({"a": torch.ones(1).expand(2)}, "share memory"),
):
    verdict.raises(ValueError, lambda wrong=wrong: hvd.broadcast_parameters(wrong, 0), f"{type(wrong)}", message)
for root_rank in (size, -1, None, "0", 0.0):
    verdict.raises(ValueError, lambda r=root_rank: hvd.broadcast_parameters([("a", one)], r), "root", f"root_rank is {root_rank!r}")
    optimizer_of_one = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    verdict.raises(ValueError, lambda r=root_rank, o=optimizer_of_one: hvd.broadcast_optimizer_state(o, r), "root", f"root_rank is {root_rank!r}")
for wrong in (None, [one], model(0)):
    verdict.raises(ValueError, lambda wrong=wrong: hvd.broadcast_optimizer_state(wrong, 0), f"{type(wrong)}", "expected a torch.optim optimizer, got")
hvd.broadcast_parameters({}, 0)
hvd.broadcast_parameters([], 0)
odd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
odd.state[odd.param_groups[0]["params"][0]]["lock"] = threading.Lock()
verdict.raises(ValueError, lambda: hvd.broadcast_optimizer_state(odd, 0), "a lock", "'optimizer_state': rank 0, the root, cannot pickle", "lock")

Make = Callable[[Any, float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(lr, 0.99)),
    "AdamW, amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=torch.tensor(lr), amsgrad=True),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "LBFGS": lambda p, lr: torch.optim.LBFGS([q for g in p for q in (g["params"] if isinstance(g, dict) else [g])], lr=lr, max_iter=2),
}


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(state, list):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{prefix}.{i}").items()}
    return {prefix: state}


def compare(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer, what: str) -> None:
    a, b = flat(actual.state_dict()), flat(expected.state_dict())
    verdict.expect(a.keys() == b.keys(), f"{what}: keys {sorted(a.keys() ^ b.keys())} differ")
    for key in a.keys() & b.keys():
        if isinstance(b[key], torch.Tensor):
            verdict.equal(a[key], b[key], f"{what} {key}")
        else:
            verdict.expect(a[key] == b[key] and type(a[key]) is type(b[key]), f"{what} {key}: {a[key]!r}, expected {b[key]!r}")


for label, make in OPTIMIZERS.items():
    for dtype in (torch.float32, torch.bfloat16):
        for steps_on_root, steps_elsewhere in ((2, 0), (2, 3), (0, 2), (0, 0)):
            root = steps_on_root % size

            def build(seed: int, lr: float, make: Make = make, dtype: torch.dtype = dtype) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
                network = model(seed, dtype)
                pairs = list(network.parameters())
                return network, make([{"params": pairs[:2]}, {"params": pairs[2:]}], lr)

            reference, expected = build(0, 0.5)
            train(reference, expected, steps_on_root)
            network, optimizer = build(0 if rank == root else 9, 0.5 if rank == root else 0.25)
            train(network, optimizer, steps_on_root if rank == root else steps_elsewhere)
            weights = copy.deepcopy(network.state_dict())
            groups = list(map(id, optimizer.param_groups))
            what = f"{label} {dtype}, {steps_on_root} steps on root and {steps_elsewhere} elsewhere"
            hvd.broadcast_optimizer_state(optimizer, root)
            compare(optimizer, expected, what)
            verdict.expect(list(map(id, optimizer.param_groups)) == groups, f"{what}: the groups are the same objects, for those that refer to them")
            unmoved = all(content(v) == content(weights[k]) for k, v in network.state_dict().items())
            untrained = (steps_on_root if rank == root else steps_elsewhere) == 0
            no_gradients = all(p.grad is None for p in network.parameters())
            verdict.expect(unmoved and no_gradients == untrained, f"{what}: no step was run")
            # From equal states and parameters training stays equal.
            hvd.broadcast_parameters(network.state_dict(), root)
            train(network, optimizer, 2)
            train(reference, expected, 2)
            compare(optimizer, expected, f"{what}, 2 steps later")
verdict.conclude()
