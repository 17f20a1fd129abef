"""What every transport does, written once. Raises AssertionError on the rank that sees something else.

Values are small integers wherever sums must be exact in every type; sums of arbitrary floats are checked to be the same bits on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvd_ecsgd import TransportError
from hvd_ecsgd.transport import Transport

__all__ = ["FLOATS", "INTEGERS", "SMALL", "check_all"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.uint8)
THOROUGH = (torch.float32, torch.uint8)
"""What payloads are made of: tried in every shape and layout. The other types in one or two."""
SMALL, LARGE = 999, 50_000
"""Elements: transports may send what is small in another way."""


def numbers(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers that depend on rank and position."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + 3 * rank) % 11).to(dtype).view(shape)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(actual, expected), f"{what}: {actual.flatten()[:8]}, expected {expected.flatten()[:8]}"


def same_everywhere(t: Transport, tensor: torch.Tensor, name: str) -> None:
    mine = tensor.contiguous().view(-1).view(torch.uint8)
    for r, other in enumerate(t.allgather(mine, f"{name}.bits", [mine.numel()] * t.size).wait()):
        assert torch.equal(other, mine), f"{name}: rank {t.rank} and rank {r} hold different bits"


def check_allreduce(t: Transport, dtypes: Sequence[torch.dtype], wide_halves: bool, by_rank: Sequence[int]) -> None:
    """The sum, in place, of any shape; sums of 16-bit floats are formed in float32 and rounded once (`wide_halves`). Of so many elements as `by_rank`
    says they are formed in the order of ranks."""
    for dtype in dtypes:
        for shape in ((), (1,), (7,), (1000,), (2 * LARGE,), (3, 5), (0,), (2, 0)) if dtype in THOROUGH else ((7,), (3, 5)):
            name = f"sum.{dtype}.{shape}"
            mine = numbers(t.rank, *shape, dtype=dtype)
            handle = t.allreduce_(mine, name)
            result = handle.wait()
            same(result, sum(numbers(r, *shape, dtype=dtype) for r in range(t.size)).to(dtype), name)  # type: ignore[union-attr]
            assert result is mine or result.data_ptr() == mine.data_ptr(), f"{name}: in place"
            assert handle.wait() is result, f"{name}: waiting again gives the same result"
            assert handle.done()
    for dtype, length in [(dtype, length) for dtype in dtypes if dtype.is_floating_point for length in (SMALL, LARGE)]:
        name = f"random.{dtype}.{length}"
        parts = [torch.randn(length, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(t.size)]
        total = t.allreduce_(parts[t.rank].clone(), name).wait()
        same_everywhere(t, total, name)
        exact = torch.stack([p.double() for p in parts]).sum(0)
        half = dtype in (torch.float16, torch.bfloat16)
        epsilon = torch.finfo(dtype).eps * (1 if wide_halves and half else t.size)
        assert ((total.double() - exact).abs() <= epsilon * torch.stack(parts).abs().double().sum(0)).all(), f"sum of {dtype}"
        if wide_halves and half:
            same(total, torch.stack([p.float() for p in parts]).sum(0).to(dtype), f"sum of {dtype}, rounded once")
        if length in by_rank:
            in_order = parts[0].float() if half else parts[0].clone()
            for part in parts[1:]:
                in_order += part
            same(total, in_order.to(dtype), f"{name}, added in the order of ranks")


def check_allgather(t: Transport, dtypes: Sequence[torch.dtype]) -> None:
    """Everybody's rows by rank: equal and different numbers of them, none at all, announced and not."""
    layouts: list[tuple[str, Callable[[int], tuple[int, ...]]]] = [
        ("equal", lambda r: (5,)),
        ("matrix", lambda r: (3, 4)),
        ("different", lambda r: (2 * r + 1,)),
        ("none on rank 0", lambda r: (r, 3)),
        ("none on the last", lambda r: (t.size - 1 - r,)),
        ("none anywhere", lambda r: (0,)),
        ("many", lambda r: (LARGE, 2)),
        ("many, different", lambda r: (LARGE + r, 2)),
    ]
    for dtype in dtypes:
        for layout, shape in layouts if dtype in THOROUGH else layouts[2:3]:
            for announced in (True, False):
                name = f"gather.{dtype}.{layout}.{announced}"
                mine = numbers(t.rank, *shape(t.rank), dtype=dtype)
                kept = mine.clone()
                sizes = [shape(r)[0] for r in range(t.size)] if announced else None
                parts = t.allgather(mine, name, sizes).wait()
                assert len(parts) == t.size, name
                for r, part in enumerate(parts):
                    same(part, numbers(r, *shape(r), dtype=dtype), name)
                same(mine, kept, f"{name}: what was sent")


def check_alltoall(t: Transport, dtypes: Sequence[torch.dtype]) -> None:
    """Row block s of rank r goes to rank s: equal blocks, different ones, empty ones."""
    layouts: list[tuple[str, Callable[[int, int], int]]] = [
        ("equal", lambda source, target: 3),
        ("different", lambda source, target: 1 + source + 2 * target),
        ("to one only", lambda source, target: 4 if target == (source + 1) % t.size else 0),
        ("nothing", lambda source, target: 0),
    ]
    for dtype in dtypes:
        for layout, rows in layouts if dtype in THOROUGH else layouts[1:2]:
            for tail in ((), (2,)) if dtype in THOROUGH else ((2,),):
                for announced in (True, False):
                    name = f"exchange.{dtype}.{layout}.{tail}.{announced}"
                    blocks = [numbers(10 * t.rank + s, rows(t.rank, s), *tail, dtype=dtype) for s in range(t.size)]
                    received = [rows(s, t.rank) for s in range(t.size)] if announced else None
                    parts = t.alltoall(torch.cat(blocks), [b.shape[0] for b in blocks], name, received).wait()
                    assert len(parts) == t.size, name
                    for s, part in enumerate(parts):
                        same(part, numbers(10 * s + t.rank, rows(s, t.rank), *tail, dtype=dtype), name)


def check_broadcast(t: Transport, dtypes: Sequence[torch.dtype]) -> None:
    for dtype in dtypes:
        for root in range(t.size) if dtype in THOROUGH else (t.size - 1,):
            mine = numbers(t.rank, 4, 2, dtype=dtype)
            result = t.broadcast_(mine, root, f"cast.{dtype}.{root}").wait()
            same(result, numbers(root, 4, 2, dtype=dtype), f"broadcast of {dtype} from {root}")
            assert result.data_ptr() == mine.data_ptr(), "in place"


def check_several_at_once(t: Transport) -> None:
    """Started together, waited for in the opposite order; `done` becomes true without waiting."""
    handles: list[tuple[Any, Callable[[Any], None]]] = []
    for i in range(4):
        total = sum(numbers(r + i, 100) for r in range(t.size))
        handles.append((t.allreduce_(numbers(t.rank + i, 100), f"at once.{i}.sum"), lambda got, total=total: same(got, total, "sum")))
        expected = [numbers(r + i, 2 + r) for r in range(t.size)]

        def gathered(got: list[torch.Tensor], expected: list[torch.Tensor] = expected) -> None:
            for a, b in zip(got, expected, strict=True):
                same(a, b, "gathered")

        handles.append((t.allgather(numbers(t.rank + i, 2 + t.rank), f"at once.{i}.gather", [2 + r for r in range(t.size)]), gathered))
    for handle, check in reversed(handles):
        check(handle.wait())
    assert all(handle.done() for handle, _ in handles)


def check_errors(t: Transport) -> None:
    """Splits that do not fit are refused on the spot, on every rank, and nothing is left behind."""
    for splits in ([1] * (t.size + 1), [2] * t.size):
        try:
            t.alltoall(torch.zeros(t.size), splits, "wrong splits").wait()
        except TransportError as error:
            assert "wrong splits" in str(error)
        else:
            raise AssertionError(f"all-to-all of {t.size} rows with splits {splits} was accepted")
    same(t.allreduce_(numbers(0, 3), "after errors").wait(), t.size * numbers(0, 3), "after errors")


def check_all(
    t: Transport,
    sums: Sequence[torch.dtype],
    moves: Sequence[torch.dtype],
    *,
    wide_halves: bool = True,
    by_rank: Sequence[int] = (SMALL, LARGE),
) -> None:
    """`sums`: types that all-reduce supports; `moves`: those of the other calls. `wide_halves`, `by_rank`: see `check_allreduce`."""
    assert 0 <= t.rank < t.size
    assert isinstance(t, Transport)
    check_allreduce(t, sums, wide_halves, by_rank)
    check_allgather(t, moves)
    check_alltoall(t, moves)
    check_broadcast(t, moves)
    check_several_at_once(t)
    check_errors(t)
