"""Workers of one process: one computes at a time, whatever their threads wait for, and a failure of one ends all."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport import Transport, run_simulated


def test_one_worker_computes_at_a_time() -> None:
    computing: list[int] = []

    def worker(transport: Transport) -> int:
        most = 0
        for step in range(5):
            computing.append(transport.rank)
            time.sleep(0.002)
            most = max(most, len(computing))
            computing.remove(transport.rank)
            transport.allreduce_(torch.ones(1), f"step.{step}").wait()
        return most

    assert run_simulated(4, worker) == [1] * 4


@pytest.mark.parametrize("ends", ["raises", "returns"])
def test_a_worker_may_end_while_a_thread_of_its_own_waits(ends: str) -> None:
    waited: list[object] = []

    def wait(transport: Transport) -> None:
        try:
            waited.append(float(transport.allreduce_(torch.ones(1), "sum").wait()))
        except TransportError as error:
            waited.append(str(error))

    def worker(transport: Transport) -> int:
        if transport.rank > 0:
            time.sleep(0.1)  # rank 0 has ended by then
            return int(transport.allreduce_(torch.ones(1), "sum").wait())
        threading.Thread(target=wait, args=(transport,), daemon=True).start()
        time.sleep(0.05)
        if ends == "raises":
            raise ValueError("on purpose")
        return 0

    if ends == "raises":
        with pytest.raises(ValueError, match="on purpose"):
            run_simulated(3, worker)
    else:
        assert run_simulated(3, worker) == [0, 3, 3]
    deadline = time.monotonic() + 60
    while not waited and time.monotonic() < deadline:
        time.sleep(0.01)
    assert waited and (waited == [3.0] or "rank 0 failed" in str(waited[0]))


def test_who_looks_whether_something_is_done_lets_others_compute() -> None:
    def worker(transport: Transport) -> bool:
        handle = transport.allreduce_(torch.ones(1), "sum")
        deadline = time.monotonic() + 60
        while not handle.done() and time.monotonic() < deadline:
            pass
        return handle.done()

    assert run_simulated(3, worker) == [True] * 3
