"""One test body (body.py), every transport."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvd_ecsgd import TransportError
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.conformance.body import FLOATS, INTEGERS, check_all
from tests.ranks import horovodrun, mpirun

PROGRAM = "tests/conformance/program_transport.py"
EVERY = (*FLOATS, *INTEGERS)


def test_one_process() -> None:
    check_all(SelfTransport(), EVERY, EVERY)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_simulated(n: int) -> None:
    run_simulated(n, lambda t: check_all(t, EVERY, EVERY))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_mpi(n: int) -> None:
    said = mpirun(n, PROGRAM, "mpi")
    assert all(f"conforms: rank {r} of {n}" in said for r in range(n))


def test_torch_distributed(tmp_path: Path) -> None:
    """Among groups of 1, 2, 3 and all of the five."""
    said = mpirun(5, PROGRAM, "torch", str(tmp_path / "meet"))
    assert all(f"conforms: rank {r} of {n}" in said for n in (1, 2, 3, 5) for r in range(n))


@pytest.mark.parametrize("launcher", [horovodrun, mpirun], ids=["horovodrun", "mpirun"])
def test_horovod(launcher: object) -> None:
    n = 2 if launcher is horovodrun else 3
    said = launcher(n, PROGRAM, "horovod")  # type: ignore[operator]
    assert all(f"conforms: rank {r} of {n}" in said for r in range(n))


class Averaging(SelfTransport):
    """Wrong on purpose."""

    def allreduce_(self, t: torch.Tensor, name: str) -> object:  # type: ignore[override]
        return super().allreduce_(t.mul_(0.5), name)


class Unordered:
    """A simulated transport whose all-gather gives the parts in another order."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def allgather(self, t: torch.Tensor, name: str, sizes: object = None) -> object:
        handle = self._inner.allgather(t, name, None)
        finish = handle._finish  # type: ignore[attr-defined]
        handle._finish = lambda parts: finish(parts)[::-1]  # type: ignore[attr-defined]
        return handle


def test_the_body_notices_a_wrong_transport() -> None:
    """Control: an average instead of a sum, and parts out of order, fail."""
    with pytest.raises(AssertionError, match="sum"):
        check_all(Averaging(), EVERY, EVERY)
    with pytest.raises((AssertionError, TransportError)):
        run_simulated(2, lambda t: check_all(Unordered(t), EVERY, EVERY))  # type: ignore[arg-type]


def test_collectives_in_different_orders_are_an_error() -> None:
    """On the simulated network, where order is what matches them: every rank is told."""

    def worker(t: Transport) -> str:
        names = ["a", "b"] if t.rank else ["b", "a"]
        try:
            for handle in [t.allreduce_(torch.ones(2), name) for name in names]:
                handle.wait()
        except TransportError as error:
            return str(error)
        return "nothing was raised"

    for said in run_simulated(3, worker):
        assert "same order" in said


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TransportError, match=r"'sum'.*\[1\]"):
        run_simulated(2, lambda t: t.rank or t.allreduce_(torch.ones(2), "sum").wait(), timeout=0.5)


def test_a_failing_worker_is_what_is_raised() -> None:
    """The others are told, and do not wait for the limit."""

    def worker(t: Transport) -> None:
        if t.rank == 1:
            raise ZeroDivisionError("on purpose")
        t.allreduce_(torch.ones(2), "sum").wait()

    with pytest.raises((ZeroDivisionError, TransportError), match="on purpose"):
        run_simulated(3, worker)
