"""What `compression.state_dict()` returns, and what is looked at before any of it is taken over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import is_integer, is_number
from ..errors import CompressionError
from ..protocols import Role, State
from ..segments import Segments
from .bucket import Bucket, part_of
from .state import MethodState

__all__ = ["check_head", "prepare_load", "state_dict"]

_NUMBERS = ("previous_lr",)
"""What is saved with a parameter's slots and is no tensor: positive numbers of its bucket, or None before they are known."""

_REMEDY = "Load what compression.state_dict() returned, of a step that stood, or start without this state."


def state_dict(state: MethodState) -> dict[str, Any]:
    """Copies of all state, by parameter name; plain dictionaries, numbers and tensors. Differs between ranks: save one per rank."""
    rank, size = state.rank, state.size
    parameters: dict[str, dict[str, Any]] = {}
    for bucket in state.buckets:
        if bucket.state is None:
            continue
        for segment in bucket.segments:
            entry: dict[str, Any] = {slot: t[segment.start : segment.stop].view(segment.shape).clone() for slot, t in bucket.state.items()}
            entry["previous_lr"] = bucket.unit  # its name since residuals have units
            parameters[segment.name] = entry
        if bucket.exchange_state:
            for i, segment in enumerate(bucket.method.exchange.state_segments(bucket.segments, rank, size)):
                for slot, t in bucket.exchange_state.items():
                    parameters[segment.name][slot] = part_of(t, i, segment).clone()
    return {
        "format": 1,
        "method": repr(state.method),
        "rank": rank,
        "size": size,
        "step": state.step,
        "undone": state.undone,
        "parameters": parameters,
        "with_state": list(parameters),  # so that it shows when one is lost
        **({"layout": [list(buffer) for buffer in state.layout]} if state.layout else {}),  # where it says in which order a network adds
    }


def prepare_load(state: MethodState, saved: Mapping[str, Any]) -> Callable[[], None]:
    """Check `saved`, of the same rank of a group of the same size, and build everything aside; calling the result takes it over and cannot fail.

    Raises `CompressionError` when it does not fit. It is called between steps, and outside of `at`.
    """
    check_head(saved, repr(state.method))
    _check_all_there(saved)
    rank, size = state.rank, state.size
    if (saved["rank"], saved["size"]) != (rank, size) and saved["parameters"]:
        raise CompressionError(
            f"the state was saved by rank {saved['rank']} of {saved['size']}, and this is rank {rank} of {size}. Residuals belong to "
            "their rank: save one file per rank and load one's own."
        )
    layout = saved.get("layout", [])
    if not isinstance(layout, list) or not all(isinstance(b, list) and all(isinstance(name, str) for name in b) for b in layout):
        raise CompressionError(f"'layout' of the state: expected lists of parameters' names, the state holds {layout!r:.80}. {_REMEDY}")
    entries = saved["parameters"]
    unknown = sorted(set(entries) - {name for name, _ in state.named})
    if unknown:
        raise CompressionError(f"the state holds parameter '{unknown[0]}', which is not bound here.")
    # Of a bucket that has no entry nothing was sent yet.
    staged = [_staged(bucket, entries, rank, size) for bucket in state.buckets if not entries.keys().isdisjoint(bucket.segments.names)]

    def take_over() -> None:
        points = {one.bucket.name: _at_x(one.bucket) for one in staged}
        for bucket in state.buckets:  # what the saved training had not allocated yet begins anew
            bucket.state = bucket.exchange_state = bucket.unit = None
            bucket.residual_is_zero, bucket.written = True, None
        for one in staged:
            one.take_over(entries, points[one.bucket.name])
        state.step, state.undone = saved["step"], saved["undone"]
        state.layout = [list(buffer) for buffer in saved.get("layout", ())]

    return take_over


@dataclass
class _Staged:
    """What a bucket is to take over."""

    bucket: Bucket
    state: State
    exchange_state: State
    unit: float | None

    def take_over(self, entries: Mapping[str, Any], points: Sequence[torch.Tensor]) -> None:
        """`points`: where its parameters are, or would be if they were not shifted."""
        bucket = self.bucket
        bucket.state, bucket.exchange_state, bucket.unit = self.state, self.exchange_state, self.unit
        if bucket.point is not None:
            for name, x, point in zip(bucket.segments.names, bucket.segments.shaped_views(bucket.point), points, strict=True):
                if name not in entries:  # it stays where it is
                    x.copy_(point)
        bucket.residual_is_zero = bucket.residual is None or not bool(bucket.residual.any())
        with torch.no_grad():
            bucket.shift_()


def _staged(bucket: Bucket, entries: Mapping[str, Any], rank: int, size: int) -> _Staged:
    """The bucket's state as its parameters' `entries` have it; zero of those that have none. Raises `CompressionError` where it does not fit."""
    state, exchange_state = bucket.new_state(), bucket.new_exchange_state(rank, size)
    tables = [(state, bucket.segments), (exchange_state, bucket.method.exchange.state_segments(bucket.segments, rank, size))]
    for name in bucket.segments.names:
        if name in entries:
            _check_entry(name, entries[name], {**state, **exchange_state})
    for slots, table in tables:
        for slot, target in slots.items():
            for i, segment in enumerate(table):
                if segment.name in entries:
                    value, part = entries[segment.name].get(slot), part_of(target, i, segment)
                    _check_tensor(segment.name, slot, value, part)
                    part.copy_(value.reshape(-1))
    return _Staged(bucket, state, exchange_state, _in_common_units_(bucket, tables, entries))


def _in_common_units_(bucket: Bucket, tables: Sequence[tuple[State, Segments]], entries: Mapping[str, Any]) -> float | None:
    """One learning rate for the whole bucket, returned, that its residuals are in units of: saved ones may have been of several param groups."""
    rates = {name: entries[name].get("previous_lr") for name in bucket.segments.names if name in entries}
    common: float | None = next((rate for rate in rates.values() if rate is not None), None)
    if bucket.method.feedback.unit == "gradient" and common is not None:
        residuals = (bucket.method.slot_names.get(Role.RESIDUAL), bucket.method.server_slot)
        for slots, table in tables:
            for slot in (s for s in slots if s in residuals):
                for i, segment in enumerate(table):
                    rate = rates.get(segment.name)
                    if rate is not None and rate != common:
                        part_of(slots[slot], i, segment).mul_(rate / common)
    return common


def _at_x(bucket: Bucket) -> list[torch.Tensor]:
    """Where the parameters are, or would be if they were not shifted."""
    if bucket.point is not None and bucket.written is not None and bucket.written_to(contents=True) is None:
        return bucket.segments.shaped_views(bucket.point)
    return [p.detach() for p in bucket.parameters]


def check_head(state: Any, method: str) -> None:
    """Raise `CompressionError` unless `state` has the form of a state of `method` (its repr)."""
    if not isinstance(state, Mapping) or state.get("format") != 1 or not {"method", "rank", "size", "step", "undone", "parameters"} <= set(state):
        raise CompressionError(f"this is not a state of format 1 that compression.state_dict() returned: {state!r:.80}")
    for key in ("rank", "size", "step", "undone"):
        if not is_integer(state[key], 0):
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


def _check_all_there(state: Mapping[str, Any]) -> None:
    """Raise `CompressionError` when a parameter is missing that was saved. A parameter without state is one of which nothing was sent yet, or one
    bound since; so what was saved says of whom there is state (versions before this one did not)."""
    lost = [name for name in state.get("with_state", ()) if name not in state["parameters"]]
    if lost:
        raise CompressionError(f"parameter '{lost[0]}' is missing: it had state when this state was saved, and its residual would be lost. {_REMEDY}")


def _check_entry(name: str, entry: Mapping[str, Any], slots: Iterable[str]) -> None:
    """`entry` of the parameter `name` has numbers that are numbers, and nothing but those and `slots`."""
    for number in _NUMBERS:
        value = entry.get(number)
        if value is not None and not is_number(value, lambda number: number > 0):
            raise CompressionError(f"'{number}' of parameter '{name}': expected a positive number or None, the state holds {value!r:.80}. {_REMEDY}")
    unknown = [slot for slot in entry if slot not in _NUMBERS and slot not in {*slots}]
    if unknown:
        raise CompressionError(f"'{unknown[0]}' of parameter '{name}' is no slot of this method, which has {sorted(slots)}. {_REMEDY}")


def _check_tensor(name: str, slot: str, value: Any, place: torch.Tensor) -> None:
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
