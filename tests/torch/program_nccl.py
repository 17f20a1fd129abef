"""One rank of: tensors of a pretended GPU over a pretended NCCL, which is gloo behind NCCL's manners.  program_nccl.py FILE"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hvd_ecsgd import GradientExchange, TransportError
from hvd_ecsgd.transport import torch_dist
from hvd_ecsgd.transport.torch_dist import TorchTransport
from tests.cases import by_name
from tests.pretend import Pretended, on_gpu
from tests.torch.meeting import meet


class Nccl:
    """A group that takes tensors of the GPU alone, contiguous and of one size, and whose work is over when its stream has come to it: until then the
    targets hold garbage, and waiting for it lets the host go on."""

    def __init__(self, gloo: Any) -> None:
        self.gloo = gloo
        self.carried: list[tuple[str, int]] = []
        """What, and how many bytes of it."""

    def held(self, what: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        for t in tensors:
            if not isinstance(t, Pretended):
                raise RuntimeError(f"NCCL {what}: no backend type associated with device type {t.device.type}")
            assert t.held.is_contiguous(), what
        self.carried.append((what, sum(t.nbytes for t in tensors)))
        return [t.held for t in tensors]


class Work:
    """Over after it was asked for three times, or when the stream waits for it."""

    def __init__(self, start: Callable[[], Any], targets: list[torch.Tensor]) -> None:
        self._asked = 0
        kept = [t.clone() for t in targets]
        for t in targets:
            t.view(torch.uint8).fill_(0x7F)
        self._targets, self._kept = targets, kept
        self._start: Callable[[], Any] | None = start

    def is_completed(self) -> bool:
        self._asked += 1
        if self._asked >= 3:
            self.wait()
        return self._start is None

    def wait(self) -> None:
        if self._start is not None:
            for t, kept in zip(self._targets, self._kept, strict=True):
                t.copy_(kept)
            self._start()
            self._start = None


class Dist:
    """torch.distributed as the transport sees it, on a machine with NCCL."""

    def __init__(self) -> None:
        self.nccl: list[Nccl] = []
        self.config = "cpu:gloo,cuda:nccl"

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_backend_config(self, group: Any) -> str:
        return self.config

    def new_group(self, ranks: list[int], backend: str, **options: Any) -> Any:
        gloo = dist.new_group(ranks, backend="gloo", **options)
        if backend == "gloo":
            return gloo
        self.nccl.append(Nccl(gloo))
        return self.nccl[-1]

    def all_reduce(self, t: torch.Tensor, group: Any, async_op: bool) -> Any:
        if not isinstance(group, Nccl):
            return dist.all_reduce(host(t), group=group, async_op=async_op)
        (mine,) = group.held("all_reduce", t)
        return Work(lambda: dist.all_reduce(mine, group=group.gloo), [mine])

    def all_gather(self, parts: list[torch.Tensor], t: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        if not isinstance(group, Nccl):
            return dist.all_gather([host(p) for p in parts], host(t), group=group, async_op=async_op)
        mine, *targets = group.held("all_gather", t, *parts)
        if any(p.shape != mine.shape for p in targets):
            raise RuntimeError("NCCL all_gather: tensors must have one size on all ranks")
        return Work(lambda: dist.all_gather(targets, mine, group=group.gloo), targets)

    def all_to_all_single(self, came: torch.Tensor, t: torch.Tensor, *sizes: list[int], group: Any, async_op: bool = False) -> Any:
        if not isinstance(group, Nccl):
            return dist.all_to_all_single(host(came), host(t), *sizes, group=group, async_op=async_op)
        target, mine = group.held("all_to_all", came, t)
        return Work(lambda: dist.all_to_all_single(target, mine, *sizes, group=group.gloo), [target])

    def broadcast(self, t: torch.Tensor, src: int, group: Any, async_op: bool) -> Any:
        if not isinstance(group, Nccl):
            return dist.broadcast(host(t), src, group=group, async_op=async_op)
        (mine,) = group.held("broadcast", t)
        return Work(lambda: dist.broadcast(mine, src, group=group.gloo), [mine])

    def destroy_process_group(self, group: Any) -> None:
        dist.destroy_process_group(group.gloo if isinstance(group, Nccl) else group)


def host(t: torch.Tensor) -> torch.Tensor:
    assert not isinstance(t, Pretended), "gloo was given a tensor of the GPU"
    return t


def put(t: torch.Tensor, device: str) -> torch.Tensor:
    return Pretended(t) if device == "cuda" else t


@contextmanager
def with_nccl() -> Iterator[SimpleNamespace]:
    """A GPU and NCCL, both pretended."""
    fake = Dist()
    with mock.patch.object(torch_dist, "dist", fake), on_gpu() as gpu:
        yield SimpleNamespace(dist=fake, gpu=gpu)


def collectives() -> None:
    """The results of gloo, on the device: of every type, of equal and different numbers of rows, of none; the host waits for nothing, and what is
    sent is not brought to it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with with_nccl() as machine:
        transport = TorchTransport()

        def on(device: str) -> list[torch.Tensor]:
            found = []
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8):
                mine = put((torch.arange(12, device="cpu") * 3 + rank).to(dtype).view(6, 2), device)
                found.append(transport.allreduce_(mine.clone(), "sum").wait())
                found.append(transport.broadcast_(mine.clone(), size - 1, "broadcast").wait())
                found += transport.allgather(mine, "gather", [6] * size).wait()
                found += transport.allgather(mine[: 1 + rank], "rows").wait()
                found += transport.allgather(mine[:0], "none", [0] * size).wait()
                splits = [2, *[0] * (size - 2), 4]
                received = [splits[rank]] * size
                found += transport.alltoall(mine, splits, "swap", received).wait()
                found += transport.alltoall(mine, splits, "swap, unannounced").wait()
            assert all(t.device.type == device for t in found)
            return found

        expected = on("cpu")
        machine.gpu.reads.clear()
        found = on("cuda")
        assert not [read for read in machine.gpu.reads if "from cuda" in read or "synchronize" in read], machine.gpu.reads
        assert len(machine.dist.nccl) == 1 and {what for what, _ in machine.dist.nccl[0].carried} == {
            "all_reduce",
            "all_gather",
            "all_to_all",
            "broadcast",
        }
        assert all(torch.equal(f.held, e) and f.dtype == e.dtype and f.shape == e.shape for f, e in zip(found, expected, strict=True))  # type: ignore[attr-defined]
        handle = transport.allreduce_(torch.ones(3, device="cuda"), "asked")
        assert not handle.done() and not handle.done() and handle.done(), "it is asked, and not waited for"
        # Control: gloo has the GPUs, and takes no tensor of one.
        machine.dist.config = "cpu:gloo,cuda:gloo"
        plain = TorchTransport()
        with pytest.raises(TransportError, match=r"'sum': expected a tensor on the CPU, got one on cuda.*NCCL"):
            plain.allreduce_(torch.ones(3, device="cuda"), "sum")


def means(method: Any, device: str, machine: SimpleNamespace, transport: TorchTransport) -> list[torch.Tensor]:
    """Of two steps of two parameters, with a bucket each."""
    named = [(n, torch.nn.Parameter(torch.ones(40, 40, device=device))) for n in ("a", "b")]
    options = {"lr": 0.1} if method.method.feedback.takes.learning_rate else {}
    exchange = GradientExchange(named, method, transport, bucket_bytes=1, **options)
    found = []
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        gradients = {n: put(torch.randn(40, 40, generator=generator, device="cpu"), device) for n, _ in named}
        machine.gpu.reads.clear()
        found += exchange.reduce(gradients).values()
    return found


def methods() -> None:
    """Payloads stay on the device until NCCL takes them: the bits of the CPU over gloo."""
    with with_nccl() as machine:
        transport = TorchTransport()
        for name in ("none", "fp16", "random_block", "random_block-all_gather", "top_k", "double_squeeze-top_k-random_block"):
            expected = means(by_name(name).make(), "cpu", machine, transport)
            before = len(machine.dist.nccl[0].carried)
            found = means(by_name(name).make(), "cuda", machine, transport)
            assert len(machine.dist.nccl[0].carried) > before, name
            assert not [read for read in machine.gpu.reads if "from cuda to cpu" in read or "to(cpu)" in read], (name, machine.gpu.reads)
            assert all(f.device.type == "cuda" and torch.equal(f.held, e) for f, e in zip(found, expected, strict=True)), name  # type: ignore[attr-defined]


def main(file: str) -> None:
    rank, size = meet(file)
    warnings.filterwarnings("ignore", "the learning rate is taken")
    collectives()
    methods()
    print(f"rank {rank} of {size}: all right")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
