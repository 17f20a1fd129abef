"""The thread of an optimizer."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hvd_ecsgd.optimizer.background import Background


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
    assert done.wait(20), "nobody looks"
    background.submit(lambda: order.append("second"))
    background.drain()
    travels[0] = False
    background.submit(lambda: order.append("third"))
    background.drain()
    time.sleep(0.05)
    before = looks[0]
    time.sleep(0.05)
    assert order == ["first", "second", "third"] and looks[0] == before
    background.close()


def test_a_collector_may_close_it_in_its_own_thread() -> None:
    background = Background("test")
    background.submit(background.close)
    background.drain()
    background.close()
