"""What a step of each method would take: compute, kernels and network put together."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compression import Compression
from ..evidence import STEPS, fastest
from ..gradient_exchange import GradientExchange
from ..optimizer.distributed import BUCKET_BYTES
from ..transport.base import Transport
from ..transport.echo import EchoTransport, Sent
from .network import Network, meet, slowest

__all__ = ["CANDIDATES", "Candidate", "Cost", "cost_of", "recommended", "step_seconds"]


@dataclass(frozen=True)
class Candidate:
    """A method that is weighed. `steps`: that it takes to the accuracy of dense training, as multiples (`hvd_ecsgd.evidence`); None where it is not
    known to come there, and it is shown and not recommended."""

    make: Callable[[], Any]
    steps: float | None = None


_MADE: Mapping[str, Callable[[], Any]] = {
    "none": lambda: Compression.none,
    "fp16": lambda: Compression.fp16,
    "random_block(64)": lambda: Compression.random_block(64),
    "detached(64)": lambda: Compression.detached(64),
    "double_squeeze()": lambda: Compression.double_squeeze(),
    "random_k(100)": lambda: Compression.random_k(100),
    "top_k(100)": lambda: Compression.top_k(100),
    "one_bit()": lambda: Compression.one_bit(),
    "power_sgd(2)": lambda: Compression.power_sgd(2),
    "qsgd()": lambda: Compression.qsgd(),
}
CANDIDATES: Mapping[str, Candidate] = {name: Candidate(make, STEPS.get(name)) for name, make in _MADE.items()}


@dataclass(frozen=True)
class Cost:
    """Of one method and model: seconds in its kernels, what it sends in a step, bytes that it keeps from step to step (beside gradients)."""

    kernels: float
    sent: Sequence[Sent]
    memory: int


def cost_of(make: Callable[[], Any], named: Sequence[tuple[str, torch.nn.Parameter]], transport: Transport, repeats: int = 3) -> Cost:
    """Measured on this machine without its network, on all ranks at once, as they share its cores and memory; the slowest rank's. Collective.

    The gradients are random. Parameters move where the method applies the update.
    """
    echo = EchoTransport(transport.rank, transport.size)
    generator = torch.Generator().manual_seed(transport.rank)
    gradients = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu") for name, p in named}
    exchange = GradientExchange(named, make(), echo, lr=1e-6)
    seconds = []
    for i in range(1 + repeats):
        meet(transport)
        echo.sent.clear()
        begin = time.perf_counter()
        exchange.reduce(gradients)
        if i:
            seconds.append(slowest(transport, time.perf_counter() - begin))
    state = exchange.compression.aggregator.state
    kept = [t for bucket in state.buckets for slots in (bucket.state, bucket.exchange_state) if slots for t in slots.values()]
    return Cost(statistics.median(seconds), tuple(echo.sent), sum(t.nbytes for t in kept))


def step_seconds(compute: float, cost: Cost, network: Network, gradient_bytes: int) -> float:
    """Of an own optimizer's step, which sends buckets while the backward pass goes on.

    A third of `compute` is the forward pass. The first bucket leaves when its gradients are there and compressed; from then on the network and the
    processor work side by side, and the last bucket travels alone.
    """
    buckets = max(1, math.ceil(gradient_bytes / BUCKET_BYTES))
    work, wire = 2 / 3 * compute + cost.kernels, network.total(cost.sent)
    return compute / 3 + work / buckets + max(wire, work * (1 - 1 / buckets) + wire / buckets)


def recommended(seconds: Mapping[str, float]) -> str:
    """What comes to the accuracy of dense training first, by what a step takes; `none` where that saves too little to be worth it."""
    return fastest(seconds, STEPS, "none")
