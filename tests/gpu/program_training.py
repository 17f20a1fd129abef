"""One rank of: training with autocast, a GradScaler and a stream of its own, through `mpi_backend`.   program_training.py DEVICE [NAME…]

Prints RESULT and, as JSON, of each method the losses and whether all ranks hold the same finite weights.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import Any

import torch

import mpi_backend as hvd
from tests.cases import COVERING, Case, by_name
from tests.problems import batch, mlp, weights

STEPS = 8


def train(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = mlp().to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=case.momentum)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), case.make())
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    optimizer.compression.attach(optimizer, scaler)
    stream: Any = contextlib.nullcontext()
    if device.type == "cuda":
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        stream = torch.cuda.stream(own)
    before, losses = weights(model, optimizer.compression), []
    with stream:
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = batch(hvd.rank(), step)
            with torch.autocast(device.type, half):
                loss = torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss))
        x = weights(model, optimizer.compression)
        equal = all(torch.equal(w, x) for w in hvd.allgather(x[None]))
    good = equal and bool(x.isfinite().all()) and not torch.equal(x, before)
    return {"good": good, "replicas": equal, "undone": optimizer.compression.undone_steps, "losses": losses}


def main() -> None:
    warnings.simplefilter("ignore")
    hvd.init()
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    found: dict[str, Any] = {}
    closures = "hessian"  # methods that need one
    for case in [by_name(name) for name in sys.argv[2:]] or [c for c in COVERING if not c.name.startswith(closures)]:
        try:
            found[case.name] = train(case, device)
        except Exception as error:
            print(f"RESULT {json.dumps({**found, case.name: {'good': False, 'error': repr(error)[:300]}})}", flush=True)
            raise
    found = {name: {**row, "good": all(r[name]["good"] for r in hvd.allgather_object(found))} for name, row in found.items()}
    if hvd.rank() == 0:
        print(f"RESULT {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
