"""One rank of: steps of methods by every road that real ranks take, and what the weights are then.  program_roads.py FOLDER STEPS METHOD…

Each rank writes {road: {method: hash}} to FOLDER, as JSON. One start serves all roads: mpirun's ranks are processes of Horovod's and of
torch.distributed's job, too.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from hvd_ecsgd import ddp
from tests.cases import Case, by_name
from tests.problems import mlp, train, weights
from tests.roads import HOOK, HVD, digest, named, options, rate
from tests.torch.meeting import meet


def by_optimizer(hvd: Any, case: Case, steps: int) -> str:
    model = mlp()
    compression = case.make().bind(named(model, case))
    sgd = torch.optim.SGD(model.parameters(), **options(case))
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=named(model, case), compression=compression)
    compression.attach(optimizer)
    train(model, optimizer, hvd.rank(), range(steps), lambda step: rate(optimizer, step, steps))
    return digest(weights(model, compression))


def by_hook(rank: int, case: Case, steps: int) -> str:
    model = mlp()
    compression = case.make().bind(named(model, case))
    optimizer = torch.optim.SGD(model.parameters(), **options(case))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.002)
    ddp.register(wrapped, compression)
    compression.attach(optimizer)
    train(wrapped, optimizer, rank, range(steps), lambda step: rate(optimizer, step, steps))
    return digest(weights(model, compression))


def main(folder: str, told_steps: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    rank, size = meet(f"{folder}/meet-{len(names)}")
    cases, steps = [by_name(name) for name in names], int(told_steps)
    found: dict[str, dict[str, str]] = {HOOK: {case.name: by_hook(rank, case, steps) for case in cases}}
    for road, module in HVD.items():
        hvd = importlib.import_module(module)
        hvd.init()
        assert (hvd.rank(), hvd.size()) == (rank, size), road
        found[road] = {case.name: by_optimizer(hvd, case, steps) for case in cases}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    print(f"rank {rank} of {size}: done", flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
