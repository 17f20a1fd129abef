"""The param groups of a wrapped optimizer, as a method reads them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.attached import check_plain_sgd
from ..core.bound import BoundCompression
from ..core.bucket import Bucket
from ..core.refusal import not_applied
from ..errors import CompressionError
from ..protocols import GroupSettings

__all__ = ["ParamGroups"]


class ParamGroups:
    """Of `optimizer`, whose class is that of `inner`. `summed`: gradients are summed over the workers, not averaged."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, inner: torch.optim.Optimizer, compression: BoundCompression, size: int, summed: bool
    ) -> None:
        self._optimizer, self._inner, self._compression, self._summed = optimizer, inner, compression, summed
        self.be_of(size)
        self._held: dict[int, GroupSettings] = {}

    def be_of(self, size: int) -> None:
        """So many workers there are."""
        self.factor = size if self._summed else 1
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

    def hold(self) -> None:
        """A step begins, in the script's thread: until `release` its settings stay those of now. A sending thread reads them, and whether it saw what
        the script sets meanwhile would be a matter of timing, on each rank another one."""
        self._held = self._held or {g: self._now(g) for g in range(len(self._optimizer.param_groups))}

    def release(self) -> None:
        """The exchange is over."""
        self._held = {}

    def check_finite(self) -> None:
        """Raise `CompressionError` where the optimizer would apply the mean by a value that no step can be taken with, set since `hold`."""
        method = self._compression.method
        wrong = next(filter(None, (self._now(g).wrong for g in range(len(self._optimizer.param_groups)))), "")
        if wrong and method.stateful and not method.feedback.takes.update:
            raise CompressionError(not_applied(wrong, "optimizer"))

    def settings(self, bucket: Bucket) -> GroupSettings:
        """Those of the bucket's param group in this step, or now where none is under way, with the learning rate by which its mean is multiplied."""
        return self._held.get(bucket.group) or self._now(bucket.group)

    def _now(self, group: int) -> GroupSettings:
        settings = self._compression.attached.settings_of(self._compression.method, self._optimizer, group)
        return settings if self.factor == 1 else replace(settings, lr=settings.lr * self.factor)
