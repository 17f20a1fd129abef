"""What `compression.state_dict()` returns, and what is looked at before any of it is taken over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .errors import CompressionError

__all__ = ["NUMBERS", "check_all_there", "check_entry", "check_head", "check_tensor"]

NUMBERS = ("previous_lr",)
"""What is saved with a parameter's slots and is no tensor: positive numbers of its bucket, or None before they are known."""

_REMEDY = "Load what compression.state_dict() returned, of a step that stood, or start without this state."


def check_head(state: Any, method: str) -> None:
    """Raise `CompressionError` unless `state` has the form of a state of `method` (its repr)."""
    if not isinstance(state, Mapping) or state.get("format") != 1 or not {"method", "rank", "size", "step", "undone", "parameters"} <= set(state):
        raise CompressionError(f"this is not a state of format 1 that compression.state_dict() returned: {state!r:.80}")
    for key in ("rank", "size", "step", "undone"):
        if isinstance(state[key], bool) or not isinstance(state[key], int) or state[key] < 0:
            raise CompressionError(f"'{key}' of the state: expected an integer ≥ 0, the state holds {state[key]!r:.80}. {_REMEDY}")
    entries = state["parameters"]
    if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
        raise CompressionError(f"'parameters' of the state: expected a dictionary by parameter name, the state holds {entries!r:.80}. {_REMEDY}")
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise CompressionError(f"parameter '{name}' of the state: expected a dictionary of its slots, the state holds {entry!r:.80}. {_REMEDY}")
    if state["method"] != method:
        raise CompressionError(
            f"the state was saved by another method.\n  saved: {state['method']}\n  now:   {method}\nBind with the saved "
            "settings, or start without this state."
        )


def check_all_there(state: Mapping[str, Any]) -> None:
    """Raise `CompressionError` when a parameter is missing that was saved. A parameter without state is one of which nothing was sent yet, or one
    bound since; so what was saved says of whom there is state (versions before this one did not)."""
    lost = [name for name in state.get("with_state", ()) if name not in state["parameters"]]
    if lost:
        raise CompressionError(f"parameter '{lost[0]}' is missing: it had state when this state was saved, and its residual would be lost. {_REMEDY}")


def check_entry(name: str, entry: Mapping[str, Any], slots: Iterable[str]) -> None:
    """`entry` of the parameter `name` has numbers that are numbers, and nothing but those and `slots`."""
    for number in NUMBERS:
        value = entry.get(number)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise CompressionError(f"'{number}' of parameter '{name}': expected a positive number or None, the state holds {value!r:.80}. {_REMEDY}")
    unknown = [slot for slot in entry if slot not in NUMBERS and slot not in {*slots}]
    if unknown:
        raise CompressionError(f"'{unknown[0]}' of parameter '{name}' is no slot of this method, which has {sorted(slots)}. {_REMEDY}")


def check_tensor(name: str, slot: str, value: Any, place: torch.Tensor) -> None:
    """`value` fits in `place`: number of elements, type, and finite."""
    if not isinstance(value, torch.Tensor) or value.numel() != place.numel():
        held = value.numel() if isinstance(value, torch.Tensor) else f"{value!r:.80}"
        raise CompressionError(f"'{slot}' of parameter '{name}': expected {place.numel()} elements, the state holds {held}. {_REMEDY}")
    if value.dtype != place.dtype or value.layout != torch.strided or value.is_meta:
        raise CompressionError(
            f"'{slot}' of parameter '{name}': expected a dense tensor of {place.dtype} with values, the state holds {value.dtype} of layout "
            f"{value.layout} on {value.device}. {_REMEDY}"
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise CompressionError(f"'{slot}' of parameter '{name}' holds an inf or NaN, which would stay in it for good. {_REMEDY}")
