"""The GradScaler of an optimizer's steps: which one it is, what it says to the other workers, and what it must hear of a step."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

from ..core.bound import BoundCompression
from ..errors import CompressionError

__all__ = ["ScalerLink"]


class ScalerLink:
    """Between `compression`, which holds the GradScaler that was attached, and the steps of `optimizer`."""

    def __init__(self, optimizer: torch.optim.Optimizer, compression: BoundCompression) -> None:
        self._optimizer, self._compression = optimizer, compression

    def state(self) -> dict[str, float]:
        """What the scaler says of itself; less, of something else that was attached for one; nothing without one, or when it is disabled."""
        scaler = self._compression.scaler
        if scaler is None:
            return {}
        tell = getattr(scaler, "state_dict", None)
        return tell() if tell is not None else {"scale": self._compression.attached.loss_scale}

    def adopt(self, scale: float, growth_tracker: float) -> None:
        """Take over what another worker's `state` said. `scale` 0: it has no scaler."""
        mine = self.state()
        if scale and "_growth_tracker" in mine:
            self._compression.scaler.load_state_dict({**mine, "scale": scale, "_growth_tracker": int(growth_tracker)})

    def meet(self, scale: torch.Tensor | None) -> None:
        """In GradScaler.step, which gives its `scale` where gradients are scaled still. Without state the scale of a step is that step's matter
        alone, so a scaler that is not attached may be now; with state it is too late."""
        compression = self._compression
        attached, caller = compression.scaler, _calling_scaler()
        known = attached is not None and (caller is None or caller is attached or not hasattr(attached, "_check_inf_per_device"))
        if not known or (scale is not None and float(scale) != compression.attached.loss_scale):
            if caller is None or compression.method.stateful or compression.method.clips:
                raise CompressionError(
                    "scaler.step(optimizer): this GradScaler is not attached, so what the method keeps would be in units of its scale; call "
                    "optimizer.compression.attach(optimizer, scaler) before the first backward pass."
                )
            compression.scaler = caller
        if caller is not None and not (looked := caller._per_optimizer_states[id(self._optimizer)]["found_inf_per_device"]):
            device = compression.named[0][1].device
            looked[device] = torch.zeros((), dtype=torch.float32, device=device)  # a worker without gradients: update() asks that somebody looked

    def stepping(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """GradScaler's scale, unless gradients are unscaled already, and what it found; both are there during `GradScaler.step` only."""
        return getattr(self._optimizer, "grad_scale", None), getattr(self._optimizer, "found_inf", None)

    def tell_of_overflow(self) -> None:
        """The step was undone: the scaler finds the NaN in the gradients, so that all workers lower the scale."""
        self._compression.scaler._check_inf_per_device(self._optimizer)  # as GradScaler asks of optimizers that handle its scale


def _calling_scaler() -> Any:
    """The GradScaler whose `step` has called; None if there is none. It hands an optimizer its scale, and not itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if callable(getattr(found, "_check_inf_per_device", None)):
            return found
        frame = frame.f_back
    return None
