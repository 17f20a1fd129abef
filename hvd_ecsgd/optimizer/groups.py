"""The param groups of a wrapped optimizer, as a method reads them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.attached import check_plain_sgd
from ..core.bound import BoundCompression
from ..core.bucket import Bucket
from ..errors import CompressionError
from ..protocols import GroupSettings

__all__ = ["ParamGroups"]


class ParamGroups:
    """Of `optimizer`, whose class is that of `inner`. `summed`: gradients are summed over the workers, not averaged."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, inner: torch.optim.Optimizer, compression: BoundCompression, size: int, summed: bool
    ) -> None:
        self._optimizer, self._inner, self._compression, self._summed = optimizer, inner, compression, summed
        self.factor = size if summed else 1
        """What means are multiplied by before the optimizer has them."""

    def check(self) -> None:
        """Raise `CompressionError` for what the optimizer would do beyond the method, or a second time: it must not be silently different."""
        method = self._compression.method
        if method.feedback.takes.update:
            check_plain_sgd(method, type(self._inner).step, type(self._inner).__name__)
            if self._summed:
                raise CompressionError(f"{method.feedback} averages updates; summing gradients (op=Sum) is not defined for it.")
        for g, group in enumerate(self._optimizer.param_groups):
            method.feedback.check_group(group, f"param group {g} of {type(self._inner).__name__}")

    def settings(self, bucket: Bucket) -> GroupSettings:
        """Those of the bucket's param group now, with the learning rate by which its mean is multiplied."""
        settings = self._compression.attached.settings_of(self._compression.method, self._optimizer, bucket.group)
        return settings if self.factor == 1 else replace(settings, lr=settings.lr * self.factor)
