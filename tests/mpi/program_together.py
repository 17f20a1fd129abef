"""Rank 0 alone calls a function that all call together. Arguments: which, what rank 1 does meanwhile, after how many steps, and a folder."""

from __future__ import annotations

import sys

import torch

import mpi_backend as hvd
from hvd_ecsgd import Compression, load_checkpoint, save_checkpoint

hvd.init()
alone, what, steps, folder = sys.argv[1:]
model = torch.nn.Linear(4, 4)
compression = Compression.local_momentum(2, dense_below=0) if alone == "virtual" else Compression.top_k(2, dense_below=0)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compression)


def step() -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def virtual() -> None:
    with optimizer.compression.at("virtual"):
        pass


functions = {
    "save": lambda: save_checkpoint(folder, model, optimizer, optimizer.compression),
    "load": lambda: load_checkpoint(folder, model, optimizer, optimizer.compression),
    "switch": lambda: optimizer.compression.switch(Compression.random_block(2, dense_below=0)),
    "virtual": virtual,
}
for _ in range(int(steps)):
    step()
try:
    if hvd.rank() == 0:
        functions[alone]()
    elif what == "step":
        step()
    elif what == "allreduce":
        hvd.allreduce(torch.ones(2), name="loss")
except Exception as error:
    print(f"rank {hvd.rank()}: {type(error).__name__}: {error}", flush=True)
