"""Every call of MPITransport, for every dtype; plain, staged as CUDA tensors are, and with messages cut as those of 2^30 elements are."""

from __future__ import annotations

import torch
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.base import Handle, Transport
from mpi_backend.transport import MPITransport, collectives, memory, messages, reduction
from mpi_backend.transport.lanes import Lanes, Stages, Task
from tests.mpi.verdict import DTYPES, Verdict, sample

verdict = Verdict()


class Late(memory.Copy):
    """A copy as out of a GPU: its target holds garbage until it was waited for, or asked for three times."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._pair, self._asked = (source, target), 0
        target.view(-1).view(torch.uint8).fill_(77)

    @property
    def over(self) -> bool:
        self._asked += 1
        if self._asked == 3:
            self.wait()
        return self._asked >= 3

    def wait(self) -> None:
        source, target = self._pair
        target.copy_(source)
        self._asked = 3


class Staged(MPITransport):
    """Copies CPU tensors as it would CUDA tensors."""

    def _stages(self, t: torch.Tensor) -> bool:
        return True


def check_between_stages() -> None:
    """A thread that looks while the next stage is made, and no task is open, must not find that all is over: it would take what is not there yet."""
    seen: list[bool] = []

    def task() -> Task:
        yield []

    def stages() -> Stages:
        for _ in range(3):
            yield [task()]
            seen.append(lanes.ended)

    lanes = Lanes(stages(), MPI.Request.Testsome)
    while lanes.advance(4):
        pass
    verdict.equal(torch.tensor(seen), torch.tensor([False] * 3), "a collective between two stages is not over")
    verdict.expect(lanes.ended, "after the last one it is")


def finished(handle: Handle[torch.Tensor]) -> torch.Tensor:
    result = handle.wait()
    verdict.expect(handle.done() and handle.wait() is result, "a finished handle stays finished")
    return result


def check_allreduce(t: MPITransport, label: str) -> None:
    for dtype in (*DTYPES, torch.int8, torch.int16, torch.int32):
        for shape in ((), (1,), (0,), (7,), (5, 3), (1001,)):
            mine = [sample(shape, dtype, 10 * r) for r in range(t.size)]
            what = f"{label} allreduce_ {dtype} {shape}"
            x = mine[t.rank].clone()
            out = finished(t.allreduce_(x, "x"))
            verdict.expect(out is x, f"{what}: the result is the argument")
            verdict.same_bits(out, what)
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
            total = mine[0].to(wide, copy=True)
            for other in mine[1:]:
                total += other  # small integers wrap
            verdict.equal(out, total.to(dtype), f"{what}, in the order of ranks")
            lowest, highest = torch.stack(mine).amin(0), torch.stack(mine).amax(0)
            verdict.equal(finished(t.allreduce_(mine[t.rank].clone(), "x", "min")), lowest, f"{what} min")
            verdict.equal(finished(t.allreduce_(mine[t.rank].clone(), "x", "max")), highest, f"{what} max")
            ones = torch.full(shape, 2).to(dtype)
            verdict.equal(finished(t.allreduce_(ones, "x", "product")), torch.full(shape, 2**t.size).to(dtype), f"{what} product")
    # One rounding: 2048 + 1 + 1 is 2050 in fp16, but 2048 when rounded after each addition.
    x = torch.tensor([2048.0 if t.rank == 0 else 1.0] * 5, dtype=torch.float16)
    verdict.equal(finished(t.allreduce_(x, "x")), torch.tensor([2048.0 + t.size - 1] * 5, dtype=torch.float16), f"{label} halves are rounded once")


def check_algorithms(forced: dict[str, MPITransport], sizes: tuple[int, ...]) -> None:
    """They give the same bits, and together with the MPI library's all-reduce the same integers."""
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for n in sizes:
            mine = sample((n,), dtype, forced["direct"].rank)
            for op in ("sum", "max"):
                out = {name: t.allreduce_(mine.clone(), "x", op).wait() for name, t in forced.items() if name != "mpi" or not dtype.is_floating_point}
                for name, other in out.items():
                    verdict.equal(other, out["direct"], f"{op} of {n} {dtype} by {name}")


def check_allgather(t: MPITransport, label: str) -> None:
    for dtype in (*DTYPES, torch.bool, torch.complex64, torch.complex128, torch.int16):
        for trailing in ((), (3,), (2, 2), (0,)):
            for rows in ([4] * t.size, [2 * r for r in range(t.size)], [0] * t.size, [(r == t.size - 1) * 5 for r in range(t.size)]):
                mine = [sample((n, *trailing), dtype, 7 + r) for r, n in enumerate(rows)]
                for sizes in (None, rows):
                    out = t.allgather(mine[t.rank], "x", sizes).wait()
                    for r in range(t.size):
                        verdict.equal(out[r], mine[r], f"{label} allgather {dtype} {rows} {trailing} of rank {r}")
                    verdict.equal(t.allgather_concatenated(mine[t.rank], "x", sizes).wait(), torch.cat(mine), f"{label} concatenated {dtype} {rows}")


def check_alltoall(t: MPITransport, label: str) -> None:
    for dtype in DTYPES:
        for trailing in ((), (3,)):
            for rows_to in (lambda a, b: 2, lambda a, b: a + 2 * b, lambda a, b: 0, lambda a, b: 3 * (b == 0)):
                splits = [[rows_to(a, b) for b in range(t.size)] for a in range(t.size)]
                sent = [sample((sum(splits[a]), *trailing), dtype, a) for a in range(t.size)]
                for received in (None, [splits[a][t.rank] for a in range(t.size)]):
                    out = t.alltoall(sent[t.rank], splits[t.rank], "x", received).wait()
                    for a in range(t.size):
                        verdict.equal(out[a], sent[a].split(splits[a])[t.rank], f"{label} alltoall {dtype} {splits} from {a}")


def check_reduce_scatter(t: MPITransport, label: str) -> None:
    for dtype in (*DTYPES, torch.int16):
        for counts in ([3] * t.size, [5 * r for r in range(t.size)], [1 + 30 * (r == 0) for r in range(t.size)]):
            everyones = torch.stack([sample((sum(counts),), dtype, r) for r in range(t.size)])
            total = everyones[0].to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype, copy=True)
            for other in everyones[1:]:
                total += other
            out = finished(t.reduce_scatter(everyones[t.rank], counts, "x"))
            verdict.equal(out, total.to(dtype).split(counts)[t.rank], f"{label} reduce_scatter {dtype} {counts}")


def check_broadcast(t: MPITransport, label: str) -> None:
    for dtype in (*DTYPES, torch.bool):
        for shape in ((), (0,), (1,), (6, 3)):
            for root in range(t.size):
                x = sample(shape, dtype, t.rank)
                verdict.expect(finished(t.broadcast_(x, root, "x")) is x, f"{label} broadcast_: the result is the argument")
                verdict.equal(x, sample(shape, dtype, root), f"{label} broadcast_ {dtype} {shape} from {root}")


def check_errors(t: MPITransport) -> None:
    """Calls that are refused before anything is sent, and what is found out while sizes are exchanged; the transport works on afterwards."""
    n, refuse = t.size, lambda call, what, *fragments: verdict.raises(TransportError, call, what, *fragments)
    refuse(lambda: t.allreduce_(torch.ones(3, 4).t(), "weight"), "not contiguous", "allreduce_ 'weight'", "contiguous()")
    refuse(lambda: t.allreduce_(torch.eye(3).to_sparse(), "weight"), "sparse", "to_dense()")
    refuse(lambda: t.allreduce_(torch.ones(3, dtype=torch.bool), "mask"), "bool", "allreduce_ 'mask'", "torch.bool", "Convert")
    refuse(lambda: t.allgather(torch.tensor(1.0), "scalar"), "0-D", "reshape(1)")
    refuse(lambda: t.allgather(torch.ones(2), "x", [3] * n), "sizes", "2 rows", "pass None")
    refuse(lambda: t.alltoall(torch.ones(n), [1] * (n + 1), "x"), "too many splits", f"{n} ranks")
    refuse(lambda: t.alltoall(torch.ones(n + 1), [1] * n, "x"), "splits that do not add up", "adding up")
    refuse(lambda: t.alltoall(torch.ones(n), [1] * n, "x", [2] * n), "received", "pass None")
    refuse(lambda: t.broadcast_(torch.ones(1), -1, "x"), "no such root", f"expected a root from 0 to {n - 1}")
    if n > 1:
        last = t.rank == n - 1
        refuse(lambda: t.allgather(torch.ones(2, 4 if last else 3), "x").wait(), "trailing shapes", "allgather 'x'", "another shape")
        refuse(lambda: t.allgather(torch.ones(2, dtype=torch.int32 if last else torch.float32), "x").wait(), "dtypes", "another dtype")
        refuse(lambda: t.allgather(torch.ones(2), "b" if last else "a").wait(), "names", "equal names")
        refuse(lambda: t.alltoall(torch.ones(n, 4 if last else 3), [1] * n, "x").wait(), "trailing shapes", "alltoall 'x'", "another shape")
    verdict.equal(t.allreduce_(torch.ones(3), "x").wait(), torch.full((3,), float(n)), "after errors")


collectives.Copy = Late  # type: ignore[misc]
plain, staged = MPITransport(), Staged()
verdict.expect(isinstance(plain, Transport), "MPITransport is a Transport")
for transport, label in ((plain, "plain"), (staged, "staged")):
    for check in (check_allreduce, check_allgather, check_alltoall, check_reduce_scatter, check_broadcast):
        check(transport, label)
check_errors(plain)
forced = {name: MPITransport(algorithm=name) for name in ("", "exchange", "direct", "mpi")}
check_algorithms(forced, (1, 100, 15361, 200001))
verdict.raises(ValueError, lambda: MPITransport(link=plain.link, algorithm="ring"), "no such algorithm", "MPI_BACKEND_ALLREDUCE", "direct")
if plain.size > 1:
    refused = lambda: forced["mpi"].allreduce_(torch.ones(3, dtype=torch.float16), "w")  # noqa: E731
    verdict.raises(TransportError, refused, "halves by the MPI library", "allreduce_ 'w'", "MPI_BACKEND_ALLREDUCE", "float16", "set it to direct")

# Cut into pieces of 4: what MPI cannot count travels so, whatever the sizes of the parts. Not all ranks have long ones.
n = plain.size
too_long: list[int] = []


def noted(t: torch.Tensor) -> MPI.buffer:
    if t.numel() > memory.LARGEST:
        too_long.append(t.numel())
    return memory.memory_of(t)


for module in (collectives, messages, reduction):
    module.memory_of = noted  # type: ignore[attr-defined]
for largest in (4, 16):
    memory.LARGEST = largest
    for check in (check_allreduce, check_allgather, check_alltoall, check_reduce_scatter, check_broadcast):
        check(plain, f"cut into {largest}")
    check_algorithms(forced, (1, 4, 5, 333))
for rows in ([17] * n, [1 + 40 * (r == 0) for r in range(n)], [3, 0, 50][:n], [13 * r for r in range(n)]):
    mine = [sample((r, 2), torch.float16, r) for r in rows]
    verdict.equal(plain.allgather_concatenated(mine[plain.rank], "x").wait(), torch.cat(mine), f"cut allgather {rows}")
    handles = [plain.alltoall(torch.arange(sum(rows)) + 100 * plain.rank, rows, "x"), plain.allgather(mine[plain.rank], "y")]
    handles.append(plain.alltoall(torch.arange(sum(rows)) - 100 * plain.rank, rows, "z", [rows[plain.rank]] * n))
    first = sum(rows[: plain.rank])
    for r, (out, back) in enumerate(zip(handles[0].wait(), handles[2].wait(), strict=True)):
        verdict.equal(out, torch.arange(first, first + rows[plain.rank]) + 100 * r, f"cut alltoall {rows} from {r}")
        verdict.equal(back, torch.arange(first, first + rows[plain.rank]) - 100 * r, f"cut alltoall {rows} from {r}, in flight with others")
    for r, out in enumerate(handles[1].wait()):
        verdict.equal(out, mine[r], f"cut allgather {rows}, in flight with others")
verdict.expect(not too_long, f"MPI was handed messages of {too_long[:3]} elements")
memory.LARGEST = 2**30
for module in (collectives, messages, reduction):  # other programs may follow in this process
    module.memory_of = memory.memory_of  # type: ignore[attr-defined]

check_between_stages()
plain.allgather(torch.ones(plain.rank), "left for close")
for transport in (plain, staged, *forced.values()):
    transport.close()
verdict.conclude()
