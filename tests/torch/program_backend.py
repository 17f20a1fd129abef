"""One rank of torch_backend: Horovod's functions on torch.distributed.  program_backend.py FILE"""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hvd_ecsgd.torch_backend as hvd
from hvd_ecsgd import CompressionError, TransportError
from hvd_ecsgd.optimizer import driver_of
from tests.problems import mlp, train
from tests.torch.meeting import meet


def collectives() -> None:
    rank, size = hvd.rank(), hvd.size()
    ranks = torch.arange(float(size))
    assert torch.equal(hvd.allreduce(torch.tensor([rank, 1.0])), torch.tensor([ranks.mean(), 1.0]))
    assert torch.equal(hvd.allreduce(torch.tensor([rank]), op=hvd.Sum), torch.tensor([int(ranks.sum())]))
    mine = torch.full((3, 2), float(rank)).t()  # not contiguous
    assert hvd.allreduce_(mine, average=False) is mine and torch.equal(mine, torch.full((2, 3), float(ranks.sum())))
    assert torch.equal(hvd.allgather(torch.full((rank, 2), rank)), torch.cat([torch.full((r, 2), r) for r in range(size)]))
    assert torch.equal(hvd.broadcast(torch.tensor([rank]), size - 1), torch.tensor([size - 1]))
    assert hvd.broadcast_object({"rank": rank}, 1) == {"rank": 1}
    assert hvd.allgather_object(f"rank {rank}") == [f"rank {r}" for r in range(size)]
    with pytest.raises(ValueError, match="op must be Average or Sum"):
        hvd.allreduce(mine, op="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="root_rank must be one of"):
        hvd.broadcast(mine, size)


def models_and_optimizers() -> None:
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(3, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + hvd.rank()), momentum=0.9)
    if hvd.rank() == 0:
        model(torch.ones(1, 3)).sum().backward()
        sgd.step()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(sgd, root_rank=0)
    assert sgd.param_groups[0]["lr"] == 0.1 and len(sgd.state) == 2
    everybodys = hvd.allgather(model.weight.detach().view(1, -1))
    assert all(torch.equal(w, everybodys[0]) for w in everybodys)
    with pytest.raises(CompressionError, match="ranks hold different tensors"):
        hvd.broadcast_parameters({"w": torch.zeros(1 + hvd.rank())})


class FromHorovod:
    """A class of Horovod's kind."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return tensor.to(torch.bfloat16), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, context: Any) -> torch.Tensor:
        return tensor.to(context)


def halves_travel_as_halves() -> None:
    """No float32 of that size is added by the network, and the mean is that of a sum by rank, rounded once. `none` has float32 added (control)."""
    numel, added, all_reduce = 30_011, list[torch.dtype](), dist.all_reduce

    def watched(t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        added.extend([t.dtype] if t.numel() == numel else [])
        return all_reduce(t, *args, **kwargs)

    gradients = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(hvd.size())]
    dist.all_reduce = watched
    try:
        for compression, half in (
            (hvd.Compression.fp16, torch.float16),
            (hvd.Compression.bf16(), torch.bfloat16),
            (FromHorovod, torch.bfloat16),
            (hvd.Compression.none, torch.float32),
        ):
            parameter = torch.nn.Parameter(torch.zeros(1, numel))
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], 1.0), [("w", parameter)], compression)
            (parameter @ gradients[hvd.rank()]).sum().backward()
            optimizer.step()
            total = gradients[0].to(half).float()
            for g in gradients[1:]:
                total += g.to(half).float()
            mean, rtol = total.to(half).float() / hvd.size(), 1e-6 if half is torch.float32 else 0.0
            assert torch.allclose(-parameter.detach()[0], mean, rtol=rtol, atol=0), half
    finally:
        dist.all_reduce = all_reduce
    assert added == [torch.float32], added


def made() -> tuple[torch.nn.Module, Any]:
    model = mlp()
    return model, hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), hvd.Compression.top_k(10))


def groups_are_used_again() -> None:
    """Of optimizers that are gone on every rank, and of no other: here a collector runs on rank 0 only."""
    keep = [made(), made()]
    transports = [driver_of(optimizer).step.transport for _, optimizer in keep]
    assert transports[0] is not transports[1]
    keep.pop(0)
    gc.disable()
    if hvd.rank() == 0:
        gc.collect()
    model, third = made()
    assert driver_of(third).step.transport not in transports, "rank 1 still has the first optimizer"
    train(model, third, hvd.rank(), range(2))
    gc.enable()
    gc.collect()
    _, fourth = made()
    assert driver_of(fourth).step.transport is transports[0]
    assert driver_of(keep[0][1]).step.transport is transports[1]


def main(file: str) -> None:
    with pytest.raises(TransportError, match=r"call hvd\.init\(\) first"):
        hvd.rank()
    rank, size = meet(file)
    hvd.init()
    hvd.init()
    assert (hvd.rank(), hvd.size()) == (rank, size)
    collectives()
    models_and_optimizers()
    groups_are_used_again()
    halves_travel_as_halves()
    hvd.barrier()
    hvd.shutdown()
    assert not hvd.is_initialized() and dist.is_initialized(), "the script has initialised torch.distributed, and ends it"
    print(f"rank {rank} of {size}: all right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
