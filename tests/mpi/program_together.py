"""Rank 0 alone calls save_checkpoint. Arguments: what rank 1 does meanwhile, after how many steps, and a folder."""

from __future__ import annotations

import sys

import torch

import mpi_backend as hvd
from hvd_ecsgd import Compression, save_checkpoint

hvd.init()
model = torch.nn.Linear(4, 4)
compression = Compression.top_k(2, dense_below=0)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compression)


def step() -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


what, steps, folder = sys.argv[1:]
for _ in range(int(steps)):
    step()
try:
    if hvd.rank() == 0:
        save_checkpoint(folder, model, optimizer, optimizer.compression)
    elif what == "step":
        step()
    elif what == "allreduce":
        hvd.allreduce(torch.ones(2), name="loss")
except Exception as error:
    print(f"rank {hvd.rank()}: {type(error).__name__}: {error}", flush=True)
