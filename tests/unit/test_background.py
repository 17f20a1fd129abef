"""The thread of an optimizer."""

from __future__ import annotations

import threading

import pytest
import torch

from mpi_backend.optimizer.background import Background


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


def test_a_collector_may_close_it_in_its_own_thread() -> None:
    background = Background("test")
    background.submit(background.close)
    background.drain()
    background.close()
