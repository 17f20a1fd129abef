"""What the programs under mpirun share: expectations that are gathered, so that all ranks fail together and rank 0 says why."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import torch
from mpi4py import MPI

DTYPES = (torch.float32, torch.float64, torch.int64, torch.float16, torch.bfloat16, torch.uint8)


class Verdict:
    """Collects what went wrong on this rank. It communicates over MPI.COMM_WORLD, which the code under test never does."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.count = 0

    def expect(self, condition: bool, what: str) -> None:
        self.count += 1
        if not condition:
            self.failures.append(what)

    def equal(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Same dtype, shape and bits."""
        same = actual.dtype == expected.dtype and actual.shape == expected.shape and content(actual) == content(expected)
        self.expect(same, f"{what}: {summary(actual)}, expected {summary(expected)}")

    def same_bits(self, t: torch.Tensor, what: str) -> None:
        """Every rank's tensor has the same bits; collective."""
        digests = MPI.COMM_WORLD.allgather(hashlib.sha256(content(t)).hexdigest()[:16])
        self.expect(len(set(digests)) == 1, f"{what}: ranks hold different bits, {digests}")

    def raises(self, kind: type[Exception], call: Callable[[], object], what: str, *fragments: str) -> None:
        """`call` raises `kind`, with all fragments in the message."""
        try:
            result = call()
        except kind as error:
            missing = [f for f in fragments if f not in str(error)]
            self.expect(not missing, f"{what}: the message lacks {missing}: {error}")
        except Exception as error:
            self.expect(False, f"{what}: expected {kind.__name__}, came {error!r}")
        else:
            self.expect(False, f"{what}: expected {kind.__name__}, came the result {result!r}")

    def conclude(self) -> None:
        """End the program: with one line from rank 0, or with status 1 and everybody's failures."""
        everyone = MPI.COMM_WORLD.allgather(self.failures)
        if MPI.COMM_WORLD.Get_rank() == 0:
            for rank, failures in enumerate(everyone):
                for failure in failures[:10]:
                    print(f"rank {rank}: {failure}", file=sys.stderr)
            if not any(everyone):
                print(f"ok {self.count}", flush=True)
        MPI.COMM_WORLD.Barrier()
        if any(everyone):
            sys.exit(1)


def content(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def summary(t: torch.Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} {t.detach().reshape(-1)[:6].tolist()}"


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers every rank can make for every rank."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).mul_(3).to(dtype)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)
