"""Writes a trace of two training steps, in which each layer's backward takes 0.3 seconds, and of a named all-reduce. Argument: the file."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import mpi_backend as hvd


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return g


hvd.init()
torch.manual_seed(0)
layers = [torch.nn.Linear(40, 40) for _ in range(4)]
named = [(f"layer{i}.{name}", p) for i, layer in enumerate(layers) for name, p in layer.named_parameters()]
# A param group of its own for every layer, and so a bucket.
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD([{"params": layer.parameters()} for layer in layers], lr=0.1), named, hvd.Compression.top_k(4, dense_below=0, dense_1d=False)
)
for step in range(2):
    if step == 1:
        hvd.start_timeline(sys.argv[1])  # the first step, where ranks wait for each other, is not in it
    optimizer.zero_grad()
    x = torch.ones(2, 40)
    for layer in layers:
        x = layer(Slow.apply(x))  # type: ignore[no-untyped-call]
    x.square().mean().backward()
    optimizer.step()
hvd.allreduce(torch.ones(3), name="a name")
hvd.allgather(torch.ones(3), name="a name")
hvd.broadcast(torch.ones(3), 0, name="a name")
hvd.alltoall(torch.ones(2), name="a name")
hvd.reducescatter(torch.ones(3), name="a name")
hvd.grouped_allreduce([torch.ones(3), torch.ones(1)], name="a name")
hvd.stop_timeline()
hvd.allreduce(torch.ones(3), name="after the end")
hvd.shutdown()
