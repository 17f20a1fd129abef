"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .basics import size
from .collectives import Sum, allgather, allreduce
from .tracing import untraced

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d/2d/3d`, with the mean and variance of the examples of all ranks, which may have different numbers of them, even none.

    Input (N, C, …), on any device (Horovod's needs a GPU); arguments as torch's. Statistics are formed in float32 (float64 for float64), from each
    rank's own mean and sum of squared deviations (Chan, Golub, LeVeque 1983), so they do not cancel. Differentiable once: a second time is
    an error. The gradients of weight and bias are those of
    this rank's examples: the distributed optimizer averages them. In evaluation, and on one rank, it is torch's. Raises ValueError for input of
    fewer than two dimensions, of integers, and of other than `num_features` channels where something is kept by channel.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] != self.num_features and (self.affine or self.track_running_stats):
            raise ValueError(f"SyncBatchNorm: expected input with {self.num_features} channels, got shape {tuple(input.shape)}.")
        if not input.is_floating_point():
            raise ValueError(f"SyncBatchNorm: expected floating-point input, got {input.dtype}; the normalised values would be truncated.")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        training = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        keep = not self.training or self.track_running_stats
        mean, variance = (self.running_mean, self.running_var) if keep else (None, None)
        if not training or size() == 1:
            return torch.nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, training, momentum, self.eps)
        return _normalise(input, self.weight, self.bias, mean, variance, self.eps, momentum)


@untraced
def _normalise(*arguments: Any) -> torch.Tensor:
    return cast(torch.Tensor, _Normalise.apply(*arguments))  # type: ignore[no-untyped-call]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        eps: float,
        momentum: float,
    ) -> torch.Tensor:
        ctx.shape, ctx.dims = [1, input.shape[1], *[1] * (input.dim() - 2)], [0, *range(2, input.dim())]
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        x = input.to(wide)
        n = input.numel() // input.shape[1]
        local_mean = x.mean(ctx.dims) if n else x.new_zeros(x.shape[1])
        squares = (x - local_mean.view(ctx.shape)).square().sum(ctx.dims)
        everyone = allgather(torch.stack([torch.full_like(local_mean, n), local_mean, squares])[None])
        counts, means = everyone[:, 0], everyone[:, 1]
        total = counts.sum(0)
        if float(total[0]) <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)} and none on other ranks")
        mean = (counts * means).sum(0) / total
        squares = (everyone[:, 2] + counts * (means - mean).square()).sum(0)
        deviation = (squares / total + eps).rsqrt()
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((squares / (total - 1)).to(running_var.dtype), momentum)
        normal = (x - mean.view(ctx.shape)) * deviation.view(ctx.shape)
        ctx.save_for_backward(normal, deviation, weight, total)
        if weight is None:
            return normal.to(input.dtype)
        out = normal * weight.to(wide).view(ctx.shape)
        return (out if bias is None else out + bias.to(wide).view(ctx.shape)).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        normal, deviation, weight, total = ctx.saved_tensors
        g = gradients[0].to(normal.dtype)
        bias_gradient, weight_gradient = g.sum(ctx.dims), (g * normal).sum(ctx.dims)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            both = allreduce(torch.stack([bias_gradient, weight_gradient]), op=Sum) / total
            factor = deviation if weight is None else deviation * weight.to(normal.dtype)
            input_gradient = (g - both[0].view(ctx.shape) - normal * both[1].view(ctx.shape)) * factor.view(ctx.shape)
            input_gradient = input_gradient.to(gradients[0].dtype)
        if weight is None:
            return input_gradient, None, None, None, None, None, None
        return input_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype), None, None, None, None
