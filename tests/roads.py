"""The roads that gradients take, and the table of docs/roads.md: on which of them a method's weights are the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import torch

from hvd_ecsgd import DistributedOptimizer
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import CASES, Case
from tests.problems import mlp, train, weights
from tests.reliability import rows

__all__ = ["HORIZON", "HVD", "ROADS", "SHORT", "digest", "letters", "letters_of", "named", "options", "rate", "render", "rows"]
__all__ += ["simulated", "why"]

START, END = "<!-- table of the roads: made by the tests -->", "<!-- end of the table of the roads -->"
HORIZON, SHORT = 30, 6
"""Steps: of the table, and where it is only compared, which needs no more than that sums of three numbers come apart and that models of every fifth
step are exchanged."""
SIZES = (2, 3)
HVD = {"mpi_backend": "mpi_backend", "Horovod": "horovod.torch", "torch_backend": "hvd_ecsgd.torch_backend"}
"""Roads with Horovod's API, and where it is."""
HOOK = "DDP's hook"
ROADS = ("simulation", *HVD, HOOK)


def options(case: Case) -> dict[str, Any]:
    """Of the SGD."""
    return {"lr": 0.1, "momentum": case.momentum, "weight_decay": 1e-4}


def rate(optimizer: Any, step: int, horizon: int) -> None:
    """The schedule has one drop."""
    optimizer.param_groups[0]["lr"] = 0.1 if step < horizon // 2 else 0.03


def named(model: torch.nn.Module, case: Case) -> list[tuple[str, torch.nn.Parameter]]:
    """With names that differ between methods, as Horovod wants them; random blocks depend on them."""
    return [(f"{case.name}/{n}", p) for n, p in model.named_parameters()]


def digest(w: torch.Tensor) -> str:
    return blake2b(w.detach().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


class _Counting:
    """A transport that notes whether numbers were added on their way."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.summed = False

    def allreduce_(self, *given: Any) -> Any:
        self.summed = True  # called, and not only asked for, as who looks for the members of a protocol does
        return self._transport.allreduce_(*given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@dataclass(frozen=True)
class Simulated:
    weights: str
    summed: bool
    """Some all-reduce added payloads: the order of the sum is the network's. Everything else is added by rank, in our code."""


@cache
def simulated(case: Case, n: int, horizon: int) -> Simulated:
    def worker(transport: Transport) -> Simulated:
        counting: Any = _Counting(transport)
        model = mlp()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), **options(case)), named(model, case), case.make(), transport=counting)
        train(model, optimizer, transport.rank, range(horizon), lambda step: rate(optimizer, step, horizon))
        return Simulated(digest(weights(model, optimizer.compression)), counting.summed)

    return run_simulated(n, worker)[0]


def letters(hashes: Sequence[str]) -> str:
    """One for each: where letters are equal, bits are."""
    seen = list(dict.fromkeys(hashes))
    return "".join("abcde"[seen.index(h)] for h in hashes)


def letters_of(row: list[str]) -> dict[int, str]:
    """By number of ranks, as `render` wrote them."""
    return {n: "".join(cell[i] for cell in row[: len(ROADS)]) for i, n in enumerate(SIZES)}


def why(case: Case, found: dict[int, str]) -> str:
    """Of the letters by number of ranks."""
    reasons = []
    if set(found[2]) != {"a"}:
        reasons.append("Horovod adds float16 in float16, the others in float32" if not case.exact else "?")
    if set(found[3]) != {"a"}:
        reasons.append("an all-reduce adds three numbers" if simulated(case, 3, SHORT).summed else "?")
    return "; ".join(reasons)


def render(found: dict[str, dict[int, str]], held: dict[str, list[str]]) -> str:
    """In Markdown, a row for each method of tests/cases.py; that of a method or a number of ranks that is not in `found` is as in `held`."""
    lines = [f"| method | {' | '.join(ROADS)} | why |", "|---" * (len(ROADS) + 2) + "|"]
    for case in CASES:
        if case.name in found:
            by_size = (letters_of(held[case.name]) if case.name in held else {}) | found[case.name]
            cells = [*("".join(by_size[n][i] for n in SIZES) for i in range(len(ROADS))), why(case, by_size)]
        else:
            cells = held.get(case.name, ["not run"])
        lines.append(f"| `{case.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)
