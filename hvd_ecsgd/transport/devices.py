"""GPUs and threads. Which GPU a thread uses is a property of each thread, 0 at first, and so is the stream: whoever hands work to another thread says
which ones it uses itself, and what its stream has been given so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

__all__ = ["Marks", "current_device", "marks_of", "use_device", "wait_for"]

Marks: TypeAlias = list[tuple[torch.device, Any]]
"""Places in the streams of GPUs: an event for each."""


def current_device() -> int | None:
    """The CUDA device of this thread; None where CUDA is not in use, and asking would open a context."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def use_device(device: int | None) -> None:
    """Make it that of this thread; nothing for None. Pinned memory and streams would else open a context on GPU 0, on every rank."""
    if device is not None:
        torch.cuda.set_device(device)


def marks_of(tensors: Iterable[torch.Tensor]) -> Marks:
    """Where this thread's streams are on the GPUs of the tensors; nothing of those on the CPU."""
    marks = []
    for device in {t.device for t in tensors if t.is_cuda}:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        marks.append((device, event))
    return marks


def wait_for(marks: Marks) -> None:
    """Whatever this thread's streams are given from now on waits for what was given before the marks. The host does not wait."""
    for device, event in marks:
        torch.cuda.current_stream(device).wait_event(event)
