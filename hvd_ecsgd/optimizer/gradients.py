"""Gradients of parameters, as they go into an exchange and as its means come back."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from ..core.bucket import Bucket
from ..core.step import BucketStep
from ..errors import SequenceError

__all__ = ["Leftover", "gradient_type", "gradients_of", "multiply_gradients_", "poison_gradients", "write_means"]


def gradients_of(bucket: Bucket) -> list[torch.Tensor]:
    """Those of its parameters, dense."""
    return [_gradient(p) for p in bucket.parameters]


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:  # not used in this step on this rank; others may have used it
        return torch.zeros_like(parameter)
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()  # as a GradScaler would do later, for half precision
    return parameter.grad.to_dense()


def gradient_type(parameter: torch.nn.Parameter) -> torch.dtype:
    """Of what may be assigned to its `.grad`: torch 2.10 and later let scripts choose it."""
    chosen: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if chosen is None else chosen


def write_means(buckets: Sequence[Bucket], reductions: Sequence[BucketStep | None], silent: bool, factor: int, sparse: bool) -> None:
    """What came back for the buckets becomes the gradients of their parameters, times `factor`; None where nothing came, unless all were `silent`.

    Without a reduction, as the learning rate is 0, they are zero. `sparse`: as SparseAdam expects them.
    """
    for bucket, reduction in zip(buckets, reductions, strict=True):
        _write_mean(bucket, reduction, silent, factor, sparse)


def poison_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Of a step that was undone: what a GradScaler on any rank must see."""
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"), dtype=gradient_type(p))


def _write_mean(bucket: Bucket, reduction: BucketStep | None, silent: bool, factor: int, sparse: bool) -> None:
    if reduction is None:
        for p in bucket.parameters:
            zeros = torch.zeros_like(p, dtype=gradient_type(p))
            p.grad = _given(zeros) if sparse else zeros
        return
    assert reduction.out is not None
    if reduction.task.skipped and not silent:
        for p in bucket.parameters:
            p.grad = None  # the optimizer leaves these alone
        return
    if factor != 1:
        reduction.out.mul_(factor)
    for p, mean in zip(bucket.parameters, reduction.hand_out(), strict=True):
        # Frozen since: what is left of it in the residual must not move it.
        if not p.requires_grad:
            p.grad = None
            continue
        dtype = gradient_type(p)
        typed = mean if mean.dtype is dtype else mean.to(dtype)
        p.grad = _given(typed) if sparse else typed


def _given(mean: torch.Tensor) -> torch.Tensor:
    """To SparseAdam: the rows that are not zero. Alike on all workers: dense and sparse steps round differently."""
    if mean.dim() == 0:
        return mean
    rows = mean.unsqueeze(-1).flatten(1).ne(0).any(1).nonzero().view(1, -1)
    return torch.sparse_coo_tensor(rows, mean[rows[0]], mean.shape, device=mean.device, is_coalesced=True, check_invariants=False)


def multiply_gradients_(parameters: Sequence[torch.nn.Parameter], factor: float) -> None:
    """Multiply those that are there, in place."""
    if gradients := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_mul_(gradients, factor)


class Leftover:
    """The gradients that a step has left, which must not be accumulated a second time."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter] = ()) -> None:
        self._left = [(p, weakref.ref(p.grad), p.grad._version) for p in parameters if p.grad is not None]

    def check_fresh(self, names: Mapping[int, str]) -> None:
        """Raise `SequenceError` when one of them is where it was, as it was, and not zero. `names`: of parameters, by id."""
        for p, gradient, version in self._left:
            if p.grad is None or p.grad is not gradient() or p.grad._version != version:
                continue
            if bool((p.grad._values() if p.grad.is_sparse else p.grad).any()):
                raise SequenceError(
                    f"the gradient of parameter '{names[id(p)]}' was exchanged already, and no backward pass has run since. Call zero_grad() "
                    "after step(); then a step without a backward pass takes part with gradients of zero. (After optimizer.synchronize(), call "
                    "optimizer.step() inside `with optimizer.skip_synchronize():`.)"
                )
