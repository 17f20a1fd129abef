"""One rank of: every method on tensors of one device, through `mpi_backend`, beside the same on the CPU.   program_methods.py DEVICE [NAME…]

All get the same gradients, so results may be compared. Prints RESULT and, as JSON, of each method what is promised, and what came: `bits` (those of
the CPU: what is selected, cast and added), `near` (sums in another order), or `replicas` (the compressor draws on the device; ranks are equal).
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

import mpi_backend as hvd
from hvd_ecsgd.compressors import QSGD, Cast, GlobalRandomBlock, Identity, Natural, RandomBlock, RandomK, TopK
from hvd_ecsgd.exchange import AllGather, AllReduce, TwoPass
from tests.cases import CASES, Case, bound_method, by_name
from tests.problems import flat, mlp, weights

STEPS = 4
NEAR = 0.05
"""Relative to the CPU's result: a few elements near a threshold may fall on its other side."""


def promised(case: Case) -> str:
    method = bound_method(case)
    compressors = [method.compressor, getattr(method.exchange, "server", None) or method.compressor]
    if any(isinstance(c, QSGD | Natural) for c in compressors):
        return "replicas"
    copies = all(isinstance(c, RandomBlock | GlobalRandomBlock | RandomK | TopK | Cast | Identity) for c in compressors)
    added = not method.feedback.takes.update and method.feedback.unit == "gradient" and not method.feedback.takes.momentum
    return "bits" if copies and added and type(method.exchange) in (AllReduce, AllGather, TwoPass) and "hessian" not in case.name else "near"


def gradients(step: int, model: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + hvd.rank())
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def run(case: Case, device: torch.device) -> tuple[torch.Tensor, bool]:
    """What came of all steps: the means that the optimizer got, or x where the method moves it; and whether ranks hold the same bits."""
    model = mlp().to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), case.make())
    results = []
    for step in range(STEPS):
        optimizer.zero_grad()
        given = gradients(step, model)
        sum((p * g.to(device)).sum() for p, g in zip(model.parameters(), given, strict=True)).backward()  # type: ignore[union-attr]
        optimizer.synchronize()
        means = [p.grad for p in model.parameters()]
        if not bound_method(case).feedback.takes.update and all(g is not None for g in means):
            results.append(flat(g for g in means if g is not None))
        with optimizer.skip_synchronize():
            optimizer.step()
    x = weights(model, optimizer.compression)
    everyones = hvd.allgather(x[None])
    return torch.cat(results or [x]).cpu(), all(torch.equal(w, x) for w in everyones)


def verdict(case: Case, device: torch.device) -> dict[str, Any]:
    """What is to be said of one method."""
    (got, equal), (expected, _) = run(case, device), run(case, torch.device("cpu"))
    off = float((got - expected).norm() / expected.norm())
    wanted, bits = promised(case), torch.equal(got, expected)
    good = equal and bool(got.isfinite().all()) and (wanted == "replicas" or bits or (wanted == "near" and off <= NEAR))
    return {"promised": wanted, "bits": bits, "off": off, "replicas": equal, "good": good}


def main() -> None:
    warnings.simplefilter("ignore")
    hvd.init()
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    found: dict[str, Any] = {}
    for case in [by_name(name) for name in sys.argv[2:]] or CASES:
        try:
            found[case.name] = verdict(case, device)
        except Exception as error:
            # The others may wait for this rank: the job ends here, and what was found is told.
            print(f"RESULT {json.dumps({**found, case.name: {'good': False, 'error': repr(error)[:300]}})}", flush=True)
            raise
    found = {name: {**row, "good": all(r[name]["good"] for r in hvd.allgather_object(found))} for name, row in found.items()}
    if hvd.rank() == 0:
        print(f"RESULT {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
