"""One rank of: every method over MPI against its simulation (`methods [NAME…]`), or the counterexample (`counterexample STEPS NAME…`)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from hvd_ecsgd import Compression, DisagreementError, DistributedOptimizer
from hvd_ecsgd.optimizer.background import Background
from hvd_ecsgd.protocols import Traffic
from hvd_ecsgd.transport import run_simulated
from mpi_backend.transport import MPITransport
from tests.cases import ALL, CASES, SWITCHES, Case
from tests.problems import flat, mlp, simulate, slot, train, weights

STEPS = 8
"""Of periods of 3 and 5 steps one and the beginning of another, and all of the schedules."""
WORLD = MPI.COMM_WORLD

Trained = tuple[torch.Tensor, torch.Tensor, Traffic]
"""Weights, residual, and bytes."""


def same_on_all(w: torch.Tensor) -> bool:
    return len(set(WORLD.allgather(w.contiguous().numpy().tobytes()))) == 1


def after(model: Any, optimizer: Any, _: Any) -> Trained:
    return weights(model, optimizer.compression), slot(optimizer.compression, "residual"), optimizer.compression.traffic


def trained(transport: MPITransport, case: Case) -> Trained:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum, weight_decay=1e-4)
    # On two ranks as mpi_backend's optimizer does it, by a thread; on more in the gradient hooks.
    executor = Background("exchange") if transport.size == 2 else None
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=transport, executor=executor)
    train(model, optimizer, transport.rank, range(STEPS))
    found = after(model, optimizer, None)
    if executor is not None:
        executor.close()
    return found


def simulated(cases: Sequence[Case], rank: int, size: int) -> dict[str, Trained]:
    """What each is to be on this rank. Ranks share the work of simulating."""
    mine = {case.name: simulate(size, case.make, range(STEPS), momentum=case.momentum, after=after) for case in cases[rank::size]}
    told = WORLD.alltoall([{name: by_rank[r] for name, by_rank in mine.items()} for r in range(size)])
    return {name: expected for part in told for name, expected in part.items()}


def wrong(size: int, case: Case, found: Trained, expected: Trained) -> str:
    """What is, or nothing. Two ranks give the simulation's bits; on more, MPI sums in another order."""
    w, residual, traffic = found
    if not same_on_all(w):
        return "ranks hold different bits"
    if traffic != expected[2]:
        return f"{traffic}, {expected[2]} in the simulation"
    if (traffic.skipped == 0) == case.name.startswith("comp_skip"):
        return f"{traffic.skipped} bytes were skipped"
    tolerance = 0.0 if size == 2 else 2e-5 if case.exact else 5e-3
    for what, a, b in (("weights", w, expected[0]), ("residual", residual, expected[1])):
        difference = (a - b).abs().max().item()
        if not difference <= tolerance:
            return f"{what}: {difference} from the simulation, allowed {tolerance}"
    return ""


def switching(transport: MPITransport) -> str:
    """One training through all of `SWITCHES`, and ranks that want different ones; what is wrong, or nothing."""

    def run(transport: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), SWITCHES[0](), transport=transport)
        for step in range(STEPS + 1):
            if step in SWITCHES:
                optimizer.compression.switch(SWITCHES[step]())
            train(model, optimizer, transport.rank, [step])
        try:
            optimizer.compression.switch(Compression.top_k(10 + transport.rank))
        except DisagreementError:
            return flat(model.parameters()), slot(optimizer.compression, "residual")
        raise AssertionError("ranks switched to different methods")

    real, simulated = run(transport), run_simulated(transport.size, run)[transport.rank]
    tolerance = 0.0 if transport.size == 2 else 2e-5
    difference = max((a - b).abs().max().item() for a, b in zip(real, simulated, strict=True))
    return "" if same_on_all(real[0]) and difference <= tolerance else f"{difference} from the simulation, or ranks hold different bits"


def methods(transport: MPITransport, names: list[str]) -> bool:
    problems = WORLD.allgather(switching(transport))
    good = not any(problems)
    if transport.rank == 0:
        print("passed switching" if good else f"FAILED switching: {problems}", flush=True)
    cases = [case for case in CASES if not names or case.name in names]
    found = {case.name: trained(transport, case) for case in cases}
    expected = simulated(cases, transport.rank, transport.size)
    for case in cases:
        problems = WORLD.allgather(wrong(transport.size, case, found[case.name], expected[case.name]))
        if transport.rank == 0:
            print(f"passed {case.name}" if not any(problems) else f"FAILED {case.name}: {problems}", flush=True)
        good = good and not any(problems)
    return good


# docs/algorithms.md §10: f_i(x) = ⟨a_i, x⟩² + ¼‖x‖²
A = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]], dtype=torch.float64)


def descend(transport: MPITransport, make: Callable[[], Any], steps: int) -> tuple[float, int]:
    """‖x‖ after `steps` steps of η = .005 from (1, 1, 1), and -1; or, once it passes 1e6, what it is then, and the step."""
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=0.005), [("x", x)], make(), transport=transport)
    passed = -1
    for step in range(steps):
        optimizer.zero_grad()
        ((A[transport.rank] @ x) ** 2 + 0.25 * (x @ x)).backward()
        optimizer.step()
        if x.detach().norm() > 1e6:  # on every rank, since all hold the same bits
            passed = step
            break
    assert same_on_all(x.detach()), "ranks hold different bits"
    return x.detach().norm().item(), passed


def counterexample(transport: MPITransport, steps: int, names: list[str]) -> bool:
    for name, make in {
        "identity": lambda: Compression.none,
        "top-1 with feedback": lambda: Compression.top_k(k=1, **ALL),
        "sign with feedback": lambda: Compression.one_bit(**ALL),
        "random-1 with feedback": lambda: Compression.random_block(3, **ALL),
        "top-1 without feedback": lambda: Compression.top_k(k=1, error_feedback=False, **ALL),
    }.items():
        if name not in names:
            continue
        norm, passed = descend(transport, make, steps)
        if transport.rank == 0:
            print(f"{name}: {norm:.3e} {passed}", flush=True)
    return True


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    task, names = sys.argv[1], sys.argv[2:]
    transport = MPITransport()
    sys.exit(0 if (methods(transport, names) if task == "methods" else counterexample(transport, int(names[0]), names[1:])) else 1)
