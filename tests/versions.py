"""What only newer versions of torch have, for tests that need it: with an older one they are skipped, and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

__all__ = ["cpu_scaler", "fused_sgd", "half_losses"]

fused_sgd = pytest.mark.skipif(torch.__version__ < "2.4", reason="SGD is fused on CPUs from torch 2.4 on")
half_losses = pytest.mark.skipif(torch.__version__ < "2.3", reason="torch 2.2 has no cross-entropy in half precision on CPUs")


def cpu_scaler(enabled: bool = True, **options: Any) -> Any:
    """`torch.amp.GradScaler("cpu", …)`. Where torch has none, one that is not `enabled` does as well, and a test that needs another is skipped."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cpu", enabled=enabled, **options)
    if enabled:
        pytest.skip("GradScaler runs on CPUs from torch 2.3 on")
    return torch.cuda.amp.GradScaler(enabled=False)
