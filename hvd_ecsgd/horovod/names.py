"""Whose gradient it is that Horovod hands over without a name."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from ..errors import CompressionError, UnboundParameterError

__all__ = ["GradientNames"]


class GradientNames:
    """Names the parameter of a gradient, by identity of `parameter.grad`. `frozen`: parameters that were so when the method was bound."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], frozen: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        self._frozen = list(frozen)
        self._by_shape: dict[torch.Size, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, parameter in named:
            self._by_shape.setdefault(parameter.shape, []).append((name, parameter))

    def of(self, gradient: torch.Tensor, come: Collection[str]) -> str:
        """The parameter's name. `come`: those whose gradients have come in this step, which tells dense copies of sparse gradients apart.

        Raises `UnboundParameterError` for a gradient of no bound parameter, or of more than one; `CompressionError` for a parameter.
        """
        candidates = self._by_shape.get(gradient.shape, [])
        for name, parameter in candidates:
            if parameter.grad is gradient:
                return name
            if parameter is gradient:
                raise CompressionError(
                    f"parameter '{name}': Adasum combines parameters non-linearly and cannot carry error feedback; use op=hvd.Average."
                )
        dense_copies = [n for n, p in candidates if p.grad is not None and p.grad.is_sparse and n not in come]
        if len(dense_copies) == 1:
            return dense_copies[0]
        if dense_copies:
            raise UnboundParameterError(
                f"sparse_as_dense: parameters {dense_copies} have the same shape {tuple(gradient.shape)} and cannot be told apart; use "
                "sparse=False in the embeddings."
            )
        for name, parameter in self._frozen:
            if parameter.grad is gradient:
                raise UnboundParameterError(
                    f"parameter '{name}' was frozen when the compression was bound; bind again after unfreezing it (and make a new optimizer)."
                )
        raise UnboundParameterError(
            f"a gradient of shape {tuple(gradient.shape)} belongs to no bound parameter. Bind the model that Horovod's optimizer trains: "
            f"compression = Compression.….bind(model). Bound: {[n for n, _ in candidates] or 'no parameter of this shape'}."
        )
