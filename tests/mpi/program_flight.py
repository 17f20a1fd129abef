"""Many collectives in flight, of one and more stages, waited for and polled in another order on every rank.

With the argument `same-tags` messages of different collectives are not told apart: the control, which must not pass.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hvd_ecsgd.transport.base import Handle
from mpi_backend.transport import MPITransport
from tests.mpi.verdict import Verdict, sample

verdict = Verdict()


transport = MPITransport()
if "same-tags" in sys.argv:
    transport.link.operations._distinct = 1
rank, size = transport.rank, transport.size
Check = Callable[[Any, str], None]


def halves(seed: int, n: int) -> tuple[Handle[Any], Check]:
    dtype = (torch.float16, torch.bfloat16)[seed % 2]
    total = torch.zeros(n)
    for r in range(size):
        total += sample((n,), dtype, seed + r)
    return transport.allreduce_(sample((n,), dtype, seed + rank), str(seed)), lambda out, what: verdict.equal(out, total.to(dtype), what)


def integers(seed: int, n: int) -> tuple[Handle[Any], Check]:
    total = sum(sample((n,), torch.int64, seed + r) for r in range(size))
    return transport.allreduce_(sample((n,), torch.int64, seed + rank), str(seed)), lambda out, what: verdict.equal(out, total, what)


def gather(seed: int, n: int) -> tuple[Handle[Any], Check]:
    everyone = [sample(((seed + 3 * r) % n, 2), torch.uint8, seed + r) for r in range(size)]
    sizes = None if seed % 3 else [e.shape[0] for e in everyone]
    return transport.allgather(everyone[rank], str(seed), sizes), lambda out, what: verdict.equal(torch.cat(out), torch.cat(everyone), what)


def scatter(seed: int, n: int) -> tuple[Handle[Any], Check]:
    def rows(a: int) -> list[int]:
        return [(seed + a * b) % n for b in range(size)]

    def sent(a: int) -> torch.Tensor:
        return sample((sum(rows(a)),), torch.float32, seed + a)

    expected = torch.cat([sent(a).split(rows(a))[rank] for a in range(size)])
    return transport.alltoall(sent(rank), rows(rank), str(seed)), lambda out, what: verdict.equal(torch.cat(out), expected, what)


def broadcast(seed: int, n: int) -> tuple[Handle[Any], Check]:
    root = seed % size
    return transport.broadcast_(sample((n,), torch.bfloat16, seed + rank), root, str(seed)), lambda out, what: verdict.equal(
        out, sample((n,), torch.bfloat16, seed + root), what
    )


shared, own = random.Random(1), random.Random(100 + rank)
for round_ in range(8):
    started: list[tuple[str, Handle[Any], Check]] = []
    for i in range(60):
        kind = shared.choice([halves, halves, gather, gather, scatter, integers, broadcast])
        n = shared.choice([1, 3, 50, 1000, 40000])
        handle, check = kind(1000 * round_ + 10 * i, n)
        if shared.random() < 0.15:
            del handle  # nobody will ask: it has to run all the same, and its memory has to live until then
        else:
            started.append((f"{kind.__name__} {i} of round {round_}, {n}", handle, check))
        if own.random() < 0.1:
            time.sleep(own.random() * 0.005)
    gc.collect()
    own.shuffle(started)
    if round_ % 4 == 3:
        transport.allreduce_(torch.zeros(1), "all are here").wait()  # while everything is still in flight
    if round_ % 2:  # by polling alone
        while started:
            finished = [entry for entry in started if entry[1].done()]
            started = [entry for entry in started if entry not in finished]
            for what, handle, check in finished:
                check(handle.wait(), what)
    else:
        for what, handle, check in started:
            check(handle.wait(), what)

# On two transports, waited for in opposite orders: what one rank waits for, the other carries on while it waits for the other one.
second = MPITransport()
handles = [(t.allreduce_(torch.ones(8 * 10**6), "large"), t) for t in (transport, second)]
for handle, t in handles if rank % 2 else reversed(handles):
    verdict.expect(bool((handle.wait() == size).all()), f"{'first' if t is transport else 'second'} of two transports")
second.close()

# What was started first goes first, so that it ends first; what is small waits for nobody.
lanes = transport.link.messages.pace.lanes
for room in (lanes, 10 * lanes):  # the control: with room for all they share the link, and end together
    transport.link.operations._room = room
    first, second = (transport.allreduce_(torch.ones(8 * 10**6), "large") for _ in range(2))
    begun = first.lanes.active + second.lanes.active
    verdict.expect(begun <= lanes if room == lanes else begun > lanes, f"{begun} lanes at once, with room for {room}")
    small = transport.allreduce_(torch.ones(3), "small")
    verdict.expect(small.lanes.active == 1 or not small.travels, "a small one waits for larger ones")
    verdict.expect(all(bool((handle.wait() == size).all()) for handle in (small, second, first)), f"with room for {room}")

transport.close()
verdict.conclude()
