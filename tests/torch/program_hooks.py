"""Two processes of torch.distributed over gloo: hooks of DDP, torch's own and ours, beside DDP without one.  program_hooks.py everything|some

For every row (a hook) and situation (how DDP is used) gradients are those of plain DDP, where gradients are such that the compressor loses nothing:
what torch's tests of its hooks ask for (`test_ddp_hooks.py`, `_test_ddp_hook_parity`). Prints {whose: [(row, situation, outcome)]} as JSON. Torch's
hooks may end their process or wait for ever, so each of their pairs has processes of its own; ours go through everything in one pair. `some`: of
torch's, those that end soon, with one bucket.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from hvd_ecsgd import Compression, ddp
from tests.cases import ALL

LIMIT = 20.0
"""Seconds for a pair of processes, of which a pair that goes on takes one."""
FATAL = "aborts or hangs"
"""Which of the two is a matter of timing."""
TOLERANCE = 1e-4
"""Relative, as in torch's tests."""
STEPS = 6


def _power(batched: bool) -> Callable[[DistributedDataParallel], None]:
    def register(model: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1)
        model.register_comm_hook(state, powerSGD_hook.batched_powerSGD_hook if batched else powerSGD_hook.powerSGD_hook)

    return register


TORCHS: dict[str, Callable[[DistributedDataParallel], None]] = {
    "all-reduce": lambda model: model.register_comm_hook(None, default_hooks.allreduce_hook),
    "float16": lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "bfloat16": lambda model: model.register_comm_hook(None, default_hooks.bf16_compress_hook),
    "8 bits, by tensor": lambda model: model.register_comm_hook(None, quantization_hooks.quantization_pertensor_hook),
    "8 bits, by block": lambda model: model.register_comm_hook(None, quantization_hooks.quantization_perchannel_hook),
    "PowerSGD": _power(False),
    "PowerSGD, batched": _power(True),
}
OURS: dict[str, Any] = {
    "all-reduce": lambda: Compression.none,
    "float16": lambda: Compression.fp16,
    "bfloat16": lambda: Compression.bf16,
    "8 bits, by tensor": lambda: Compression.qsgd(127, 1 << 20, "max", **ALL),
    "8 bits, by block": lambda: Compression.qsgd(127, 512, "max", **ALL),
    "PowerSGD": lambda: Compression.power_sgd(1, **ALL),
    "PowerSGD, batched": lambda: Compression.power_sgd(1, residual="own", **ALL),
}
SITUATIONS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "several buckets": {"bucket_cap_mb": 0.001},
    "static_graph": {"bucket_cap_mb": 0.001, "static_graph": True},
    "unused parameters": {"bucket_cap_mb": 0.001, "find_unused_parameters": True},
    "no_sync": {"bucket_cap_mb": 0.001},
    "join": {"bucket_cap_mb": 0.001},
    "gradients as views": {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
}


class Model(torch.nn.Module):
    """Every element of a gradient is the batch: of rank one, and equal to its mean, its largest and its norm by block."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.ones(40, 20, dtype=torch.float32, device="cpu") for _ in range(4)])
        self.bias = torch.nn.Parameter(torch.ones(8, dtype=torch.float32, device="cpu"))

    def forward(self, x: torch.Tensor, leave_out: bool = False) -> torch.Tensor:
        used = [p for i, p in enumerate(self.weights) if not (leave_out and i == 2)]
        total: torch.Tensor = sum(p.sum() for p in [*used, self.bias])  # type: ignore[assignment]
        return total * x.sum()


def gradients(situation: str, register: Callable[[DistributedDataParallel], object] | None) -> list[torch.Tensor]:
    """Of all steps."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Model(), **SITUATIONS[situation])
    kept = register(model) if register is not None else None
    found = []
    with model.join() if situation == "join" else nullcontext():
        for step in range(STEPS + 2 * (situation == "join" and rank == 0)):
            model.zero_grad()
            x = torch.tensor([2.0 ** (step % 3) * (1 + 2 * rank)], dtype=torch.float32, device="cpu")
            if situation == "no_sync":
                with model.no_sync():
                    model(x).backward()
            model(x, situation == "unused parameters" and step % 2 == 1 and rank == 1).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
    del kept
    return found


@cache
def plain(situation: str) -> list[torch.Tensor]:
    """Without a hook. Both ranks ask for it at the same place, the first time and after it."""
    return gradients(situation, None)


def compare(situation: str, register: Callable[[DistributedDataParallel], object]) -> str:
    """Register the hook, and return `yes` or what is other than without."""
    expected, found = plain(situation), gradients(situation, register)
    off = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))
    return "yes" if off <= TOLERANCE else f"off by {off:.0%}"


def _rank(rank: int, folder: str, what: list[tuple[str, str, bool]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for i, (row, situation, ours) in enumerate(what):
        try:
            said = compare(situation, (lambda model, row=row: ddp.register(model, OURS[row]())) if ours else TORCHS[row])
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        Path(folder, f"{i}-{rank}").write_text(said)
        if said != "yes":  # nothing of the other rank's is known now
            os._exit(1)
    dist.barrier()
    os._exit(0)


def outcomes(what: list[tuple[str, str, bool]], limit: float) -> list[str]:
    """Of these in turn, in one pair of processes."""
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        pair = [fork.Process(target=_rank, args=(rank, folder, what)) for rank in range(2)]
        for process in pair:
            process.start()
        deadline = time.monotonic() + limit
        for process in pair:
            process.join(max(0.0, deadline - time.monotonic()))
        ended = [process.exitcode for process in pair]
        for process in pair:
            process.kill()
            process.join()
        return [_outcome([Path(folder, f"{i}-{rank}") for rank in range(2)], ended) for i in range(len(what))]


def _outcome(said: list[Path], ended: list[int | None]) -> str:
    texts = [file.read_text() for file in said if file.exists()]
    if texts == ["yes", "yes"]:
        return "yes"
    if any(code is not None and code < 0 for code in ended):
        return FATAL
    others = [text for text in texts if text != "yes"]
    # Of a rank that ends, the other one tells nothing but that.
    own = [text for text in others if "closed by peer" not in text and "reset by peer" not in text]
    return _named((own or others or [FATAL])[0])


def _named(text: str) -> str:
    """The innermost exception, by its name alone."""
    return (re.findall(r"(\w+Error):", text) or [text.split("\n")[0]])[-1]


def main(which: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pairs = [(row, situation) for row in TORCHS for situation in SITUATIONS]
    some = pairs if which == "everything" else [pair for pair in pairs if pair[1] == "one bucket" and not pair[0].startswith("PowerSGD")]
    said = {
        "torch's": {pair: outcomes([(*pair, False)], LIMIT)[0] for pair in some},
        "ours": dict(zip(pairs, outcomes([(*pair, True) for pair in pairs], 5 * LIMIT), strict=True)),
    }
    print(json.dumps({whose: [(*pair, text) for pair, text in found.items()] for whose, found in said.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
