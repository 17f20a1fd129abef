"""Nested state as JSON, and its tensors apart: for checkpoints, and between workers. No code is stored, and none is executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import CheckpointError

__all__ = ["decode", "encode"]


def encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors` by their place. What JSON has no word for is {"$kind": …}."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_complex() or value.is_quantized:
            raise CheckpointError(f"'{where}': a {value.dtype} tensor of layout {value.layout} cannot be saved; dense real tensors can.")
        tensors[where] = value
        return {"$tensor": where}
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (list, tuple)):
        items = [encode(v, f"{where}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [(k, encode(v, f"{where}/{k}" if where else str(k), tensors)) for k, v in value.items()]
        if isinstance(value, Counter):
            return {"$counter": [list(p) for p in pairs]}
        if all(isinstance(k, str) and not k.startswith("$") for k, _ in pairs):
            return dict(pairs)
        if all(k is None or isinstance(k, (str, int)) for k, _ in pairs):
            return {"$items": [list(p) for p in pairs]}
    raise CheckpointError(
        f"'{where}' is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved: numbers, strings, None, lists, tuples, "
        "dictionaries and tensors can (torch.from_numpy makes a tensor of an array)."
    )


def decode(tree: Any, tensor: Callable[[str], Any]) -> Any:
    """The inverse of `encode`; `tensor` gives what is at a place."""
    if isinstance(tree, list):
        return [decode(v, tensor) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (kind, value), *_ = tree.items()
        if kind == "$tensor":
            return tensor(value)
        if kind == "$float":
            return float(value)
        if kind == "$tuple":
            return tuple(decode(v, tensor) for v in value)
        if kind == "$counter":
            return Counter({k: v for k, v in value})
        if kind == "$items":
            return {k: decode(v, tensor) for k, v in value}
    return {k: decode(v, tensor) for k, v in tree.items()}
