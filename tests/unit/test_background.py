"""The thread of an optimizer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from hvd_ecsgd import Compression, GradientExchange
from hvd_ecsgd.compressors import TopK
from hvd_ecsgd.exchange import TwoPass
from hvd_ecsgd.optimizer.background import Background
from hvd_ecsgd.optimizer.executor import wait_patiently
from hvd_ecsgd.protocols import Steps, Task
from hvd_ecsgd.transport import SelfTransport, Transport
from hvd_ecsgd.transport.base import Handle, Ready


@pytest.mark.parametrize("initialized", [True, False])
def test_work_is_done_on_the_device_of_whoever_hands_it_over(monkeypatch: pytest.MonkeyPatch, initialized: bool) -> None:
    """A new thread is on GPU 0, on every rank. The control: where CUDA is not in use, nothing is asked and nothing set."""
    devices = {threading.get_ident(): 5}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.update({threading.get_ident(): device}))
    background, seen = Background("test"), []
    for device in (5, 2):
        devices[threading.get_ident()] = device
        background.submit(lambda: seen.append(torch.cuda.current_device()))
    background.drain()
    background.close()
    assert seen == ([5, 2] if initialized else [0, 0])


def test_while_there_is_no_work_it_carries_on_what_is_on_its_way() -> None:
    """Else a bucket would stand still while the backward pass makes the gradients of the next one. New work comes first, and none wakes it up."""
    looks, travels, done = [0], [True], threading.Event()

    def carry_on() -> bool:
        looks[0] += 1
        if looks[0] == 20:
            done.set()
        return travels[0]

    background, order = Background("test", carry_on), []
    background.submit(lambda: order.append("first"))
    assert done.wait(120), "nobody looks"
    background.submit(lambda: order.append("second"))
    background.drain()
    travels[0] = False
    background.submit(lambda: order.append("third"))
    background.drain()
    before = looks[0]
    time.sleep(0.1)
    assert order == ["first", "second", "third"] and looks[0] <= before + 1, "it looks once more, and goes to sleep"
    background.close()


def test_a_collector_may_close_it_in_its_own_thread() -> None:
    background = Background("test")
    background.submit(background.close)
    background.drain()
    background.close()


class _Late(Ready[list[torch.Tensor]]):
    """Has not arrived before `arrives`; nobody waits longer than a minute."""

    def __init__(self, value: list[torch.Tensor], arrives: Callable[[], bool]) -> None:
        super().__init__(value)
        self._arrives, self._until = arrives, time.monotonic() + 60

    def done(self) -> bool:
        assert time.monotonic() < self._until, "it was waited for"
        return self._arrives()


class _SlowSecondPass(SelfTransport):
    """The second pass of a bucket arrives when that of the last one has begun. `begun`: names."""

    def __init__(self, buckets: int) -> None:
        self.begun: list[str] = []
        self._buckets = buckets

    def alltoall(self, t: torch.Tensor, splits: Sequence[int], name: str, received: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        self.begun.append(name)
        return super().alltoall(t, splits, name, received)

    def allgather(self, t: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> Handle[list[torch.Tensor]]:
        self.begun.append(name)
        return _Late([t], lambda: not name.endswith(".pull") or f"bucket{self._buckets - 1}.pull" in self.begun)


def test_second_passes_travel_while_the_next_buckets_are_compressed() -> None:
    """Collectives start in one order whatever arrives when; and nobody waits for a second pass, which nothing follows, before all have started."""
    n = 5
    parameters = [(f"p{k}", torch.nn.Parameter(torch.zeros(300, 2))) for k in range(n)]
    background, transport = Background("test"), _SlowSecondPass(n)
    exchange = GradientExchange(parameters, Compression.double_squeeze(dense_below=0), transport, bucket_bytes=1, executor=background)
    means = exchange.reduce([torch.full((300, 2), float(k + 1)) for k in range(n)])
    background.close()
    assert [float(means[f"p{k}"][0, 0]) for k in range(n)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    passes = [name.removeprefix("bucket") for name in transport.begun if name.startswith("bucket")]
    assert passes == ["0.push", "1.push", "0.pull", "2.push", "1.pull", "3.push", "2.pull", "4.push", "3.pull", "4.pull"]


@dataclass(frozen=True)
class _Mistaken(TwoPass):
    """Says of its first pass that it is the last."""

    def run(self, task: Task, transport: Transport) -> Steps:
        task.last = True
        return (yield from super().run(task, transport))


def test_an_exchange_that_goes_on_after_its_last_wait_is_an_error() -> None:
    """The order of collectives would be a matter of timing. Control: one that tells the truth."""
    parameter = torch.nn.Parameter(torch.zeros(300, 2))
    for kind in (_Mistaken, TwoPass):
        exchange = GradientExchange([("p", parameter)], Compression(TopK(2), exchange=kind(), dense_below=0), SelfTransport())
        if kind is TwoPass:
            exchange.reduce([torch.ones(300, 2)])
            continue
        with pytest.raises(AssertionError, match="waits again"):
            exchange.reduce([torch.ones(300, 2)])


@pytest.mark.parametrize("sleeps", [True, False])
def test_who_sleeps_while_it_waits_is_not_looked_at(sleeps: bool) -> None:
    """A look takes the interpreter lock from the backward pass. Where one may give up, or waiting takes a core, it is needed (the controls)."""

    class Sleeper:
        def __init__(self) -> None:
            self.sleeps, self.looks, self.waits = sleeps, 0, 0

        def done(self) -> bool:
            self.looks += 1
            return self.looks > 2

        def wait(self) -> None:
            self.waits += 1

    handle, other = Sleeper(), Sleeper()
    assert wait_patiently(handle) and wait_patiently(other, lambda: False)
    assert (handle.looks, handle.waits) == ((0, 1) if sleeps else (3, 0)) and (other.looks, other.waits) == (3, 0)
    assert not wait_patiently(Sleeper(), lambda: True)
