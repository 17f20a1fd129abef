"""Writes a trace of two training steps, in which each layer's backward takes 0.3 seconds, and of a named all-reduce. Argument: the file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mpi_backend as hvd

layers_done: list[bool] = []


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        layers_done.append(True)
        if len(layers_done) == 6 and os.environ.get("MPI_BACKEND_OVERLAP") != "0":  # the last ones of the second step: there is time enough
            trace, until = Path(sys.argv[1] if hvd.rank() == 0 else f"{sys.argv[1]}.rank{hvd.rank()}"), time.monotonic() + 60
            while (text := trace.read_text()).count('"COMPRESS"') < 3 or text.count('"COMMUNICATE"') < 2:
                assert time.monotonic() < until, text
                time.sleep(0.01)
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
