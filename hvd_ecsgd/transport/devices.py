"""Which GPU a thread uses. It is a property of each thread, 0 at first: whoever hands work to another thread says which one it uses itself."""

from __future__ import annotations

import torch

__all__ = ["current_device", "use_device"]


def current_device() -> int | None:
    """The CUDA device of this thread; None where CUDA is not in use, and asking would open a context."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def use_device(device: int | None) -> None:
    """Make it that of this thread; nothing for None. Pinned memory and streams would else open a context on GPU 0, on every rank."""
    if device is not None:
        torch.cuda.set_device(device)
