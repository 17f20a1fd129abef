"""The record of a bound method: its parameters in buckets, and what is carried from step to step. It is passive, and knows nobody who runs a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import CompressionError
from ..protocols import GroupSettings, Traffic
from ..segments import Segments
from ..transport.base import Transport
from .bucket import Bucket, wire_dtype
from .method import Method

__all__ = ["Layout", "MethodState", "NamedParameters"]

_FIRST_BYTES = 2**20
"""Of the first bucket, at least: the backward pass goes on for long while it travels."""

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]

Layout = Sequence[Sequence[torch.nn.Parameter]]
"""The parameters whose gradients lie in one flat buffer of somebody else's, in the order that they lie there, and by buffer as they become ready."""


class MethodState:
    """Residuals by parameter name (in `buckets`), the step counter, and the counters of traffic, of one bound method on one worker.

    `named`: (name, parameter) pairs that require gradients. `group_of` gives a parameter's group index and `settings` the hyper-parameters of a
    bucket's group now. `bucket_bytes` = 0 makes one bucket of each parameter (Horovod calls us so); results do not depend on it. `transport`: to the
    other workers, if it is known already. `process`: the rank of this process, where several are one worker.
    """

    def __init__(
        self,
        method: Method,
        named: NamedParameters,
        *,
        rank: int = 0,
        size: int = 1,
        process: int | None = None,
        bucket_bytes: int = 0,
        group_of: Callable[[torch.nn.Parameter], int] | None = None,
        settings: Callable[[Bucket], GroupSettings] | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.method = method
        self.named = list(named)
        self.rank, self.size, self.process = rank, size, rank if process is None else process
        self.settings: Callable[[Bucket], GroupSettings] = settings or (lambda bucket: GroupSettings())
        self.buckets: list[Bucket] = []
        self.layout: list[list[str]] = []
        """By which the buckets are formed, or will be, in names; empty where the order of the parameters says it."""
        self.form_buckets(bucket_bytes, group_of or (lambda parameter: 0))
        self.step = 0
        self.undone = 0
        self.traffic = Traffic()
        self._transport = transport

    def form_buckets(self, bucket_bytes: int, group_of: Callable[[torch.nn.Parameter], int], layout: Layout | None = None) -> None:
        """Plan `buckets` anew, without state in them. `bucket_bytes`, `group_of`: as they are given to the object. With a `layout` those that are
        compressed have parameters of one buffer of it each, in that order; where nothing is, so have all. None: by that which there was, or was
        loaded.
        """
        self.layout = self.layout if layout is None else self._names(layout)
        known = dict(self.named)
        buffers = [[known[name] for name in buffer if name in known] for buffer in self.layout]
        self._planned_by = bucket_bytes, group_of, buffers
        self.buckets = _planned(self.method, self.named, *self._planned_by)

    def is_laid_out(self, layout: Layout | None) -> bool:
        """Whether the buckets have been formed by it; None: by that which was loaded, if one was."""
        return self._names(self._planned_by[2]) == (self.layout if layout is None else self._names(layout))

    def _names(self, layout: Layout) -> list[list[str]]:
        names = {id(p): name for name, p in self.named}
        return [[names[id(p)] for p in buffer if id(p) in names] for buffer in layout]

    def form_for_other_method(self) -> None:
        """Where there is a layout, after `method` was replaced: plan `buckets` anew, without state in them, if this one parts small parameters from
        others and the one before did not, or the other way round."""
        if self._planned_by[2]:
            planned = _planned(self.method, self.named, *self._planned_by)
            if [(b.dense, b.segments.names) for b in planned] != [(b.dense, b.segments.names) for b in self.buckets]:
                self.buckets = planned

    @property
    def transport(self) -> Transport:
        """To the workers of the last step; raises `CompressionError` where there was none and none was given."""
        if self._transport is None:
            raise CompressionError("this compression object has not taken part in a step yet, so it has no transport.")
        return self._transport

    @transport.setter
    def transport(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def local(self) -> bool:
        """Nothing is sent in this step."""
        return not self.method.feedback.exchanges(self.step)

    def shared(self) -> list[torch.Tensor]:
        """The slots that hold the same bits on all ranks and depend on the parameters, but for x."""
        return [b.memory for b in self.buckets if b.memory is not None]


def _planned(
    method: Method, named: NamedParameters, bucket_bytes: int, group_of: Callable[[torch.nn.Parameter], int], layout: Layout
) -> list[Bucket]:
    """Buckets of one param group, type and device each, and of one buffer of the layout unless they are dense. They close once they hold
    `bucket_bytes`, or all there is of their kind; the first once it holds `_FIRST_BYTES`, so that the link need not wait for more."""
    buckets: list[Bucket] = []
    open_buckets: dict[Any, list[tuple[str, torch.nn.Parameter]]] = {}
    dense_method = method.dense()
    offsets: dict[str, int] = {}
    model_numel = 0
    for name, parameter in named:  # in the order bound, whatever the buckets
        offsets[name] = model_numel
        if not method.is_dense(parameter):
            model_numel += parameter.numel()

    def close(kind: Any) -> None:
        members = open_buckets.pop(kind)
        group, dense, dtype, *_ = kind
        segments = replace(Segments.of([(n, p.detach()) for n, p in members], offsets, model_numel), dtype=dtype)
        name = members[0][0] if bucket_bytes == 0 else f"bucket{len(buckets)}"
        buckets.append(Bucket(name, dense_method if dense else method, segments, [p for _, p in members], group, dense=dense))

    # Gradients become ready from the last layer to the first, or as the layout says.
    place = {id(p): (i, j) for i, buffer in enumerate(layout) for j, p in enumerate(buffer)}
    apart = [method.is_dense(p) and not (layout and method.sends_all_alike) for _, p in reversed(named)]  # a buffer in one piece travels as it is
    dense = iter([pair for pair, is_dense in zip(reversed(named), apart) if is_dense])
    others = [pair for pair, is_dense in zip(reversed(named), apart) if not is_dense]
    laid = iter(sorted(others, key=lambda pair: place.get(id(pair[1]), (0, 0))))
    ready = [(is_dense, next(dense if is_dense else laid)) for is_dense in apart]
    kinds = [(group_of(p), is_dense, wire_dtype(p), p.device, None if is_dense else place.get(id(p), (0,))[0]) for is_dense, (_, p) in ready]
    left = Counter(kinds)
    for kind, (_, pair) in zip(kinds, ready):
        members = open_buckets.setdefault(kind, [])
        members.append(pair)
        left[kind] -= 1
        enough = bucket_bytes if buckets else min(bucket_bytes, _FIRST_BYTES)
        if not left[kind] or sum(p.numel() for _, p in members) * kind[2].itemsize >= enough:
            close(kind)
    return buckets
