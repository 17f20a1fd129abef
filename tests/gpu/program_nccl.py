"""One process: torch.distributed's transport, and DDP's hook, on a GPU over NCCL, which takes no two ranks on one GPU.  program_nccl.py cuda|cpu

Without a GPU the same over gloo. Prints RESULT and {check: whether it held}, or {"not run": why}.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hvd_ecsgd.torch_backend as hvd
from hvd_ecsgd import Compression, ddp
from hvd_ecsgd.transport.torch_dist import TorchTransport, takes_gpus


def collectives(device: torch.device) -> bool:
    """Of one rank, in a stream of the caller's that still writes what is sent: what went in comes out."""
    transport, good = TorchTransport(), True
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        mine = torch.zeros(1 << 16, dtype=dtype, device=device)
        for _ in range(20):
            mine += 1
        expected = torch.full((1 << 16,), 20, dtype=dtype, device=device)
        found = [transport.allreduce_(mine.clone(), "sum").wait(), transport.broadcast_(mine.clone(), 0, "broadcast").wait()]
        found += transport.allgather(mine, "gather").wait() + transport.alltoall(mine, [1 << 16], "swap").wait()
        good = good and all(torch.equal(t, expected) and t.device == expected.device for t in found)
    transport.close()
    return good


def trained(device: torch.device, compression: Compression | None, **settings: bool) -> torch.Tensor:
    """Weights after six steps of DDP, with our hook or, for None, without."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(device)
    wrapped = DistributedDataParallel(model, **settings)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if compression is not None:
        ddp.register(wrapped, compression).compression.attach(optimizer)
    for step in range(6):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def checks(device: torch.device) -> dict[str, bool]:
    found = {"collectives": collectives(device)}
    plain = trained(device, None)
    for settings in ({}, {"gradient_as_bucket_view": True}):
        found[f"none is DDP's own {settings}"] = torch.equal(trained(device, Compression.none, **settings), plain)
    for name, make in {
        "random_block": lambda: Compression.random_block(8),
        "top_k": lambda: Compression.top_k(8),
        "double_squeeze": lambda: Compression.double_squeeze(),
        "power_sgd": lambda: Compression.power_sgd(2),
        "detached": lambda: Compression.detached(8),
    }.items():
        weights = trained(device, make())
        found[name] = bool(weights.isfinite().all()) and not torch.equal(weights, plain)  # what is compressed goes another way
    return found


def main(kind: str) -> None:
    warnings.filterwarnings("ignore", "the learning rate is taken")
    if kind == "cuda" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        print("RESULT", json.dumps({"not run": "this torch has no NCCL, or there is no GPU"}))
        return
    hvd.init()
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    print("RESULT", json.dumps({"GPUs' tensors travel over NCCL": takes_gpus() == (kind == "cuda"), **checks(device)}))
    hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
