"""What each rank of a self-test runs: `python -m hvd_ecsgd.doctor.trial BACKEND`, started by a launcher.

One compressed step of a small model on ranks that have other data; then all must hold the same weights, and those that were expected.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch

from hvd_ecsgd.compression import Compression

__all__ = ["PASSED", "main"]

PASSED = "hvd-ecsgd doctor: passed on"


def main(backend: str) -> int:
    """Returns the exit status: 1 where this rank saw what is wrong."""
    hvd = importlib.import_module(backend)
    torch.set_num_threads(1)
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    if size != 2:
        print(f"rank {rank} of {size}: the launcher started two ranks, and this one sees {size}", flush=True)
        return 1
    line = torch.nn.Linear(64, 32, bias=False, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        line.weight.fill_(float(rank))
    hvd.broadcast_parameters(line.state_dict(), root_rank=0)
    # Signs and a scale: of gradients whose entries are all equal nothing is lost, so the mean is known.
    compression = Compression.double_squeeze(dense_below=0).bind(line)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(line.parameters(), lr=1.0), named_parameters=line.named_parameters(), compression=compression
    )
    compression.attach(optimizer)
    line(torch.full((1, 64), float(2 + 4 * rank), dtype=torch.float32, device="cpu")).sum().backward()
    optimizer.step()
    wrong = [f"{v:g}" for v in set(line.weight.detach().flatten().tolist()) if abs(v + 4) > 1e-5]  # 0 − the mean of 2 and 6
    if wrong:
        print(f"rank {rank} of {size}: after a step weights are {', '.join(wrong[:4])}; expected -4", flush=True)
        return 1
    print(f"{PASSED} {rank}", flush=True)
    hvd.shutdown()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    if status:
        sys.stdout.flush()
        os._exit(status)  # other ranks may wait for this one, which the launcher ends
