"""What the network at hand takes: measured by the collectives that an exchange would start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..transport.base import Handle, Transport
from ..transport.echo import Sent

__all__ = ["Network", "measure"]

SIZES = (4_000, 64_000, 1_000_000, 4_000_000, 16_000_000)
"""Bytes of the tensors that are tried, until one takes longer than `LONG`."""
LONG, REPEATS = 0.3, 5


@dataclass(frozen=True)
class Network:
    """Seconds of collectives among `size` workers, by operation: (bytes of a worker's tensor, seconds), from small to large."""

    size: int
    points: Mapping[str, Sequence[tuple[int, float]]]
    spread: float
    """The largest quotient of the slowest and the median time of one size: how far the network can be relied on."""

    def seconds(self, sent: Sent) -> float:
        """Between what was measured along a line; beyond it, by the slope at the end. A broadcast counts as an all-gather."""
        points = self.points.get(sent.operation, self.points["allgather"])
        if len(points) == 1 or sent.bytes <= points[0][0]:
            return points[0][1]
        right = next((i for i in range(1, len(points)) if sent.bytes <= points[i][0]), len(points) - 1)
        (few, t), (many, u) = points[right - 1], points[right]
        return max(t + (u - t) / (many - few) * (sent.bytes - few), 0.0)

    def total(self, sent: Iterable[Sent]) -> float:
        return sum(self.seconds(s) for s in sent)

    @property
    def latency(self) -> float:
        """Seconds of a small all-reduce."""
        return self.points["allreduce"][0][1]

    @property
    def rate(self) -> float:
        """Bits per second of each worker's link, as a large all-reduce uses it: 2(n−1)/n of its bytes go over it."""
        points = self.points["allreduce"]
        (few, t), (many, u) = points[max(0, len(points) - 2)], points[-1]
        seconds, moved = (u - t, many - few) if len(points) > 1 and u > t else (u, many)
        return 16 * (self.size - 1) / self.size * moved / seconds

    def at_rate(self, rate: float) -> Network:
        """The same latencies, and links of `rate` bits per second: what is beyond a small message's time is scaled."""
        factor = self.rate / rate
        scaled = {op: [(b, points[0][1] + factor * (t - points[0][1])) for b, t in points] for op, points in self.points.items()}
        return Network(self.size, scaled, self.spread)


def measure(transport: Transport, sizes: Sequence[int] = SIZES) -> Network:
    """Collective; every rank gets the same numbers, those of the slowest rank in each try."""
    n, spread = transport.size, 1.0
    points: dict[str, list[tuple[int, float]]] = {}
    for operation, start in _operations(transport).items():
        points[operation] = []
        for size in sizes:
            tensor = torch.zeros(size // 4 // n * n, dtype=torch.float32, device="cpu")
            start(tensor, "warm").wait()
            seconds = []
            for i in range(REPEATS):
                meet(transport)
                begin = time.perf_counter()
                start(tensor, f"try.{i}").wait()
                seconds.append(slowest(transport, time.perf_counter() - begin))
            median = statistics.median(seconds)
            spread = max(spread, max(seconds) / median)
            points[operation].append((tensor.nbytes, median))
            if median > LONG:
                break
    return Network(n, points, spread)


def _operations(transport: Transport) -> dict[str, Callable[[torch.Tensor, str], Handle[object]]]:
    n = transport.size
    return {
        "allreduce": lambda t, name: transport.allreduce_(t, f"network.{name}"),
        "allgather": lambda t, name: transport.allgather(t, f"network.{name}", [t.numel()] * n),
        "alltoall": lambda t, name: transport.alltoall(t, [t.numel() // n] * n, f"network.{name}", [t.numel() // n] * n),
    }


def meet(transport: Transport) -> None:
    """Return when every rank has come here."""
    transport.allreduce_(torch.zeros(1, dtype=torch.float32, device="cpu"), "meet").wait()


def slowest(transport: Transport, seconds: float) -> float:
    """The largest of all ranks."""
    mine = torch.tensor([seconds], dtype=torch.float64, device="cpu")
    return max(float(t) for t in transport.allgather(mine, "slowest", [1] * transport.size).wait())
