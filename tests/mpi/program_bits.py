"""All ranks receive the same bits from an all-reduce, whenever they look and however tensors are cut: sizes 1 to 10^6, values of all magnitudes,
infinities and NaNs with different bits."""

from __future__ import annotations

import random
import time

import torch

from mpi_backend.transport import MPITransport
from tests.mpi.verdict import Verdict, content

verdict = Verdict()
transport = MPITransport()
rank, size = transport.rank, transport.size
SIZES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 500, 1000, 1023, 1025, 2047, 4095, 4096, 4097, 8191, 10000,
         16384, 16385, 32769, 65535, 65536, 65537, 100000, 131071, 131073, 250000, 262144, 262145, 500000, 524287, 1000000)  # fmt: skip


def values(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Sums of these depend on the order of the additions in almost every element."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-4, 4, (n,), generator=generator)).to(dtype)


for n in SIZES:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        verdict.same_bits(transport.allreduce_(values(n, dtype, rank + 31 * n), "x").wait(), f"{dtype}, {n} elements")
    special = values(n, torch.float32, rank)
    special.view(torch.int32)[rank % n :: 3] = 0x7FC00000 + rank  # a NaN that says where it comes from
    special[(rank + 1) % n :: 5] = float("inf") if rank % 2 else float("-inf")
    verdict.same_bits(transport.allreduce_(special, "x").wait(), f"NaNs and infinities, {n} elements")

# Started together, so that they overlap.
together = [transport.allreduce_(values(n, torch.float32, rank + n), "x") for n in SIZES]
for n, handle in zip(SIZES, together, strict=True):
    verdict.same_bits(handle.wait(), f"in flight together, {n} elements")

# Cut in other places, and carried on at times of each rank's own.
delays = random.Random(rank)
for dtype in (torch.float32, torch.float16):
    n = 300001
    whole = transport.allreduce_(values(n, dtype, rank), "x").wait()
    for first in (1, 4099, 150000):
        again = values(n, dtype, rank)
        handles = [transport.allreduce_(part, "x") for part in torch.split(again, [first, n - first - 70, 70])]
        while not all(handle.done() for handle in handles):
            time.sleep(0.004 * delays.random())
        verdict.expect(content(again) == content(whole), f"{dtype}, cut after {first} elements")

# The check can fail: each rank adds in an order of its own (with two ranks that is the same), and one rank flips one bit of 10^6 elements.
if size > 1:
    control = Verdict()
    parts = transport.allgather(values(1000, torch.float32, rank), "x").wait()
    total = parts[rank].clone()
    for k in range(1, size):
        total += parts[(rank + k) % size]
    control.same_bits(total, "additions in different orders")
    verdict.expect(bool(control.failures) == (size > 2), "the control for the order of additions")
    control = Verdict()
    flipped = transport.allreduce_(values(10**6, torch.float32, rank), "x").wait()
    before = content(flipped)
    flipped.view(torch.int32)[654321] ^= int(rank == size - 1)
    verdict.expect((content(flipped) != before) == (rank == size - 1), "the control flips a bit")
    control.same_bits(flipped, "one bit on one rank")
    verdict.expect(bool(control.failures), "the control for one bit")

transport.close()
verdict.conclude()
