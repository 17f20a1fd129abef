"""Every rank logs while a thread exchanges: the weights are those of a training that nobody looks at, and each file is whole. Argument: a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import mpi_backend as hvd
from hvd_ecsgd import Compression, telemetry
from hvd_ecsgd.telemetry.runs import Run
from tests.mpi.verdict import Verdict
from tests.problems import mlp, train, weights

STEPS = 12
verdict = Verdict()
hvd.init()
folder, rank = Path(sys.argv[1]), hvd.rank()


def trained(method: str, make: Any, logged: bool, lr: float = 0.1) -> tuple[torch.Tensor, Any]:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr / 2}]
    sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=make())
    verdict.expect(optimizer.compression.aggregator.state.size == hvd.size(), "ranks train together")
    if logged:
        with telemetry.Logger(optimizer.compression, folder / f"{method}.jsonl", norms_every=3, ranks="all"):
            train(model, optimizer, rank, range(STEPS))
    else:
        train(model, optimizer, rank, range(STEPS))
    return weights(model, optimizer.compression), optimizer.compression.traffic


for method, make in {
    "double_squeeze": lambda: Compression.double_squeeze(),
    "detached": lambda: Compression.detached(8),
}.items():
    (a, traffic), (b, _), (c, _) = trained(method, make, True), trained(method, make, False), trained(method, make, False, 0.09)
    verdict.expect(torch.equal(a, b), f"{method}: the weights are the same")
    verdict.expect(not torch.equal(a, c), f"{method}: the control, another learning rate")
    run = Run.read(folder / (f"{method}.rank{rank}.jsonl" if rank else f"{method}.jsonl"))
    verdict.expect(list(run.steps) == list(range(STEPS)) and run.broken == 0 and run.groups == [0, 1], f"{method}: all steps, and both groups")
    verdict.expect(sum(r["sent_bytes"] for r in run.records) == traffic.sent, f"{method}: bytes add up")
    verdict.expect({r["rank"] for r in run.records} == {rank}, f"{method}: it is this rank's file")
    verdict.expect(all(r["wire_seconds"] > 0 and r["wait_seconds"] >= 0 and r["kernel_seconds"] > 0 for r in run.records), f"{method}: times")
    verdict.expect(len(run.series("relative_error", 0)[0]) == 4 and not run.series("relative_error", 1)[0], f"{method}: norms every third step")
verdict.conclude()
