"""The coordinator's decisions, for every order in which ranks may be heard."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_backend.engine.negotiation import (
    Coordinator,
    Decision,
    Fail,
    Join,
    Joined,
    JoinFailed,
    Leave,
    Left,
    Reduce,
    Request,
    Run,
    StallCheck,
    Withdraw,
    automatic_name,
)

NEVER = StallCheck(None, None)


def reduce(name: str, n: int = 1, op: str = "sum", dtype: torch.dtype = torch.float32) -> Request:
    return Request(name, f"allreduce of {n}, named '{name}'", None, Reduce(op, True, 1.0, 1.0, ((dtype, n),)))


def gather(name: str, rows: int = 0) -> Request:
    return Request(name, f"allgather named '{name}'", rows)


def ran(decisions: list[Decision]) -> list[str]:
    return [name for d in decisions if isinstance(d, Run) for name in d.names]


@settings(deadline=None, derandomize=True)
@given(size=st.integers(1, 5), names=st.integers(0, 12), seed=st.integers(0, 1000), fusion=st.sampled_from([0, 8, 1000]))
def test_every_name_runs_once_when_all_have_it_and_not_before(size: int, names: int, seed: int, fusion: int) -> None:
    shuffle = random.Random(seed)
    coordinator = Coordinator(range(size), fusion, NEVER)
    todo = [shuffle.sample([gather(f"g{i}", i) if i % 3 == 0 else reduce(f"r{i}") for i in range(names)], names) for _ in range(size)]
    heard: dict[str, set[int]] = {}
    done: list[str] = []
    while any(todo):
        rank = shuffle.choice([r for r in range(size) if todo[r]])
        count = shuffle.randint(1, len(todo[rank]))
        messages, todo[rank] = todo[rank][:count], todo[rank][count:]
        for m in messages:
            heard.setdefault(m.name, set()).add(rank)
        coordinator.receive(rank, messages, 0.0)
        if shuffle.random() < 0.7:
            decisions = coordinator.take()
            assert all(isinstance(d, Run) for d in decisions)
            done += ran(decisions)
            assert set(done) == {name for name, ranks in heard.items() if len(ranks) == size}
    done += ran(coordinator.take())
    assert sorted(done) == sorted(r.name for r in [gather(f"g{i}") if i % 3 == 0 else reduce(f"r{i}") for i in range(names)])


def test_what_may_run_together() -> None:
    coordinator = Coordinator([0, 1], 40, NEVER)
    requests = [
        reduce("a", 4),
        reduce("b", 4, dtype=torch.float64),
        gather("c"),
        reduce("d", 4),
        reduce("e", 4, op="max"),
        reduce("f", 4),
        reduce("g", 100),
        reduce("h", 1),
    ]
    for rank in (0, 1):
        coordinator.receive(rank, requests, 0.0)
    runs = [d.names for d in coordinator.take() if isinstance(d, Run)]
    # Of one type and operation, up to 40 bytes: a and d; f with h. g is larger than that.
    assert runs == [("a", "d"), ("b",), ("c",), ("e",), ("f", "h"), ("g",)]


def test_without_fusion_all_run_alone() -> None:
    coordinator = Coordinator([0], 0, NEVER)
    coordinator.receive(0, [reduce("a"), reduce("b")], 0.0)
    assert [d.names for d in coordinator.take() if isinstance(d, Run)] == [("a",), ("b",)]


def test_extras_come_by_rank() -> None:
    coordinator = Coordinator([4, 7], 0, NEVER)
    coordinator.receive(1, [gather("g", 11)], 0.0)
    coordinator.receive(0, [gather("g", 10)], 0.0)
    (run,) = coordinator.take()
    assert isinstance(run, Run) and run.extras == ((10, 11),)


def test_a_mismatch_names_who_sent_what() -> None:
    coordinator = Coordinator([0, 5, 9], 0, NEVER)
    for rank, n in enumerate((3, 4, 3)):
        coordinator.receive(rank, [reduce("w", n)], 0.0)
    (fail,) = coordinator.take()
    assert isinstance(fail, Fail) and fail.mismatch and fail.ranks == {0, 1, 2}
    assert "ranks 0, 9: allreduce of 3, named 'w'; rank 5: allreduce of 4, named 'w'" in fail.message
    for rank in range(3):
        coordinator.receive(rank, [reduce("w")], 0.0)
    assert ran(coordinator.take()) == ["w"], "the name is free again"


def test_joining() -> None:
    coordinator = Coordinator([0, 1, 2], 0, NEVER)
    coordinator.receive(1, [Join()], 0.0)
    coordinator.receive(0, [reduce("a"), gather("g"), reduce("m", op="max")], 0.0)
    assert coordinator.take() == []
    coordinator.receive(2, [reduce("a"), gather("g"), reduce("m", op="max")], 0.0)
    decisions = coordinator.take()
    assert ran(decisions) == ["a"]
    fails = [d for d in decisions if isinstance(d, Fail)]
    assert {f.name for f in fails} == {"g", "m"} and all(f.ranks == {0, 2} and "rank 1 joined" in f.message for f in fails)
    coordinator.receive(2, [reduce("b"), Join()], 0.0)
    assert coordinator.take() == []
    coordinator.receive(0, [reduce("b"), Join()], 0.0)
    decisions = coordinator.take()
    assert ran(decisions) == ["b"] and decisions[-1] == Joined(0)
    coordinator.receive(0, [reduce("c")], 0.0)
    assert coordinator.take() == [], "nobody is joined any more"


def test_leaving() -> None:
    coordinator = Coordinator([0, 1], 0, NEVER)
    coordinator.receive(0, [reduce("a"), reduce("b"), Leave()], 0.0)
    coordinator.receive(1, [reduce("b"), reduce("c")], 0.0)
    decisions = coordinator.take()
    assert ran(decisions) == ["b"]
    fails = [d for d in decisions if isinstance(d, Fail)]
    assert [(f.name, set(f.ranks)) for f in fails] == [("c", {1})] and "rank 0 shut down" in fails[0].message
    coordinator.receive(1, [Leave()], 0.0)
    decisions = coordinator.take()
    assert isinstance(decisions[-1], Left)
    assert [d.name for d in decisions if isinstance(d, Fail)] == ["a"]


def test_joining_fails_when_a_rank_has_left() -> None:
    for order in ([(0, Join()), (2, Leave())], [(2, Leave()), (0, Join())]):
        coordinator = Coordinator([0, 1, 2], 0, NEVER)
        for rank, message in order:
            coordinator.receive(rank, [message], 0.0)
        (failed,) = coordinator.take()
        assert isinstance(failed, JoinFailed) and failed.ranks == {0} and "rank 2 shut down without joining" in failed.message
        coordinator.receive(0, [Leave()], 0.0)
        coordinator.receive(1, [Leave()], 0.0)
        assert coordinator.take() == [Left()]


def test_stalls() -> None:
    coordinator = Coordinator([0, 1, 2], 0, StallCheck(10.0, 35.0))
    coordinator.receive(2, [gather("g")], 100.0)
    assert coordinator.check_stalls(109.0) == []
    (warning,) = coordinator.check_stalls(111.0)
    assert "'g'" in warning and "rank 2 11 seconds ago" in warning and "missing on ranks 0, 1" in warning
    assert coordinator.check_stalls(115.0) == [], "again only after as many seconds"
    coordinator.receive(1, [gather("g")], 116.0)
    assert "missing on rank 0" in coordinator.check_stalls(122.0)[0]
    assert coordinator.check_stalls(136.0) == []
    (fail,) = coordinator.take()
    assert isinstance(fail, Fail) and fail.ranks == {1, 2} and "ranks 1, 2, but not by rank 0 within 35 seconds" in fail.message
    for rank in (1, 2):
        coordinator.receive(rank, [gather("g")], 140.0)
    assert coordinator.take() == []
    coordinator.receive(0, [gather("g")], 141.0)
    (late,) = coordinator.take()
    assert isinstance(late, Fail) and late.ranks == {0} and late.message == fail.message
    coordinator.receive(0, [gather("g")], 142.0)
    assert ran(coordinator.take()) == ["g"]


def test_settings_of_the_stall_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "HOROVOD_STALL_CHECK_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    assert StallCheck.from_environment() == StallCheck(60.0, None)
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "90")
    assert StallCheck.from_environment() == StallCheck(60.0, 90.0)
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "soon")
    with pytest.raises(ValueError, match="HOROVOD_STALL_CHECK_TIME_SECONDS is 'soon'"):
        StallCheck.from_environment()
    monkeypatch.setenv("HOROVOD_STALL_CHECK_DISABLE", "1")
    assert StallCheck.from_environment() == NEVER


def test_a_request_that_is_withdrawn_is_waited_for_no_more() -> None:
    """It is reported and fails no more, and the name may come again. One that was decided on has run (control)."""
    coordinator = Coordinator([0, 1, 2], 0, StallCheck(1.0, 2.0))
    coordinator.receive(0, [reduce("a"), reduce("b")], 0.0)
    coordinator.receive(1, [reduce("b")], 0.0)
    coordinator.receive(0, [Withdraw("a"), Withdraw("b"), Withdraw("never heard of")], 0.5)
    assert coordinator.take() == [Fail(name, frozenset({0}), f"{name} was withdrawn.") for name in "ab"]
    assert [line.split(" named ")[1][:3] for line in coordinator.check_stalls(1.5)] == ["'b'"], "rank 1 waits still"
    for rank in range(3):
        coordinator.receive(rank, [reduce("a")], 1.6)
    coordinator.receive(0, [Withdraw("a")], 1.7)
    assert ran(coordinator.take()) == ["a"]
    assert not coordinator.check_stalls(1.8)


def test_a_stalled_collective_without_a_name_says_how_many_each_rank_has_submitted() -> None:
    """Rank 1 caught an error that rank 0 did not have, so that its next call has another number. The control: names have no number."""
    coordinator = Coordinator([0, 1], 0, StallCheck(1.0, 5.0))
    for number in (0, 1):
        for rank in (0, 1):
            coordinator.receive(rank, [gather(automatic_name(0, number))], 0.0)
    coordinator.receive(0, [gather(automatic_name(0, 2)), gather("named")], 0.0)
    coordinator.receive(1, [gather(f"{automatic_name(0, 3)}.sz")], 0.0)  # the first part of an object's
    waiting, named, ahead = coordinator.check_stalls(2.0)
    for text in (waiting, ahead):
        assert "there have been 3 on rank 0, 4 on rank 1: a call that only some ranks make, or an error" in text
    assert "number" not in named and "missing on rank 1" in named
    coordinator.check_stalls(6.0)
    failed = [d.message for d in coordinator.take() if isinstance(d, Fail)]
    assert ["3 on rank 0, 4 on rank 1" in message for message in failed] == [True, False, True]


def test_stalled_steps_of_one_optimizer_say_how_far_ranks_are_apart() -> None:
    """The control: steps of two optimizers, in which ranks may well wait for each other."""
    coordinator = Coordinator([0, 1], 0, StallCheck(1.0, None))
    coordinator.receive(0, [gather("step 5 of DistributedOptimizer 1"), gather("step 8 of DistributedOptimizer 2")], 0.0)
    coordinator.receive(1, [gather("step 6 of DistributedOptimizer 1")], 0.0)
    first, other, second = coordinator.check_stalls(2.0)
    for text in (first, second):
        assert "numbered apart, rank 0 in step 5, rank 1 in step 6: after an error that only some ranks caught" in text
    assert "apart" not in other
