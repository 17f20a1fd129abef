"""Nested state as JSON, and its tensors apart: for checkpoints, and between workers. No code is stored, and none is executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

__all__ = ["decode", "encode", "is_unicode"]

_LONGEST = 1000
"""Bits of a whole number that is written in decimal; Python refuses to read back very long ones."""

_ARRAYS = "biufcSUmM"
"""Kinds of NumPy types whose bytes are their values."""


def encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; its tensors, arrays and bytes go to `tensors`, dense and real, by their place below `where`. What JSON has no word for is
    {"$kind": …}.

    Takes None, bool, int, float, complex, str, bytes, bytearray, lists, tuples, dictionaries (whose keys are strings, numbers, None, or tuples of
    them), Counters, dense tensors, and NumPy's numbers, strings, times and arrays of them. All come back as the same type with the same bits, but
    for subclasses of Python's own types, which come back as those. Raises `CheckpointError` with the place of anything else.
    """
    return _Encoder(tensors).encode(value, [where] if where else [])


class _Encoder:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._open: set[int] = set()
        """The lists and dictionaries that we are inside of."""

    def encode(self, value: Any, path: list[str]) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, (np.generic, np.ndarray)):  # before their superclasses: numpy.float64 is a float, numpy.str_ a str
            return self._numpy(value, path)
        if isinstance(value, str):
            return str.__str__(value) if is_unicode(value) else {"$text": value.encode(errors="surrogatepass").hex()}
        if type(value) is int:
            return value if value.bit_length() <= _LONGEST else {"$int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, complex):
            return {"$complex": [self.encode(part, path) for part in (value.real, value.imag)]}
        if isinstance(value, (bytes, bytearray)):
            kind = "$bytes" if isinstance(value, bytes) else "$bytearray"
            return {kind: self._place(torch.from_numpy(np.frombuffer(bytearray(value), np.uint8)), path)}
        if not isinstance(value, (list, tuple, Mapping)):
            raise _refused(value, path)
        if id(value) in self._open:
            raise CheckpointError(f"'{_shown(path)}' is a {type(value).__name__} that holds itself, which cannot be saved.")
        self._open.add(id(value))
        tree = self._mapping(value, path) if isinstance(value, Mapping) else self._sequence(value, path)
        self._open.remove(id(value))
        return tree

    def _place(self, t: torch.Tensor, path: list[str]) -> str:
        name = "/".join(path)
        if name in self._tensors:  # two keys that are both NaN, say
            raise CheckpointError(f"'{name}': there are two values here that cannot be told apart; give their keys different names.")
        self._tensors[name] = t
        return name

    def _tensor(self, t: torch.Tensor, path: list[str]) -> Any:
        if t.layout != torch.strided or t.is_quantized or t.is_meta:
            raise CheckpointError(
                f"'{_shown(path)}': a {t.dtype} tensor of layout {t.layout} on {t.device} cannot be saved; dense tensors with values can."
            )
        t = t.detach().resolve_conj().resolve_neg()
        return {"$complex_tensor": self._place(torch.view_as_real(t), path)} if t.is_complex() else {"$tensor": self._place(t, path)}

    def _numpy(self, value: np.generic | np.ndarray[Any, Any], path: list[str]) -> Any:
        if isinstance(value, np.str_):  # an array would lose zeros at its end
            return {"$numpy_str": [self.encode(str.__str__(value), path)]}
        if isinstance(value, np.bytes_):
            return {"$numpy_bytes": value.hex()}
        if value.dtype.kind not in _ARRAYS or (isinstance(value, np.ndarray) and type(value) is not np.ndarray):
            raise _refused(value, path)
        if isinstance(value, np.generic):
            return {"$numpy_scalar": [value.dtype.str, value.tobytes().hex()]}
        content = np.frombuffer(bytearray(value.tobytes()), np.uint8)
        return {"$array": [value.dtype.str, list(value.shape), self._place(torch.from_numpy(content), path)]}

    def _sequence(self, value: list[Any] | tuple[Any, ...], path: list[str]) -> Any:
        items = [self.encode(v, [*path, str(i)]) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}

    def _mapping(self, value: Mapping[Any, Any], path: list[str]) -> Any:
        pairs = [(k, self.encode(v, [*path, _component(k)])) for k, v in value.items()]
        if not isinstance(value, Counter) and all(type(k) is str and not k.startswith("$") and is_unicode(k) for k, _ in pairs):
            return dict(pairs)
        if wrong := [k for k, _ in pairs if not _is_key(k)]:
            raise CheckpointError(
                f"'{_shown(path)}' has a key of type {type(wrong[0]).__module__}.{type(wrong[0]).__qualname__}, which cannot be saved: strings, "
                "numbers, None and tuples of them can."
            )
        return {"$counter" if isinstance(value, Counter) else "$items": [[self.encode(k, path), v] for k, v in pairs]}


def decode(tree: Any, tensor: Callable[[str], Any], made: Callable[[Callable[[torch.Tensor], Any], Any], Any] = lambda make, t: make(t)) -> Any:
    """The inverse of `encode`, also as versions before this one wrote it. `tensor` gives what is at a place, and `made(make, that)` is what is made
    of it where it stands for something else; by default `make(that)`.

    Raises `CheckpointError` for a kind that this version does not know.
    """
    if isinstance(tree, list):
        return [decode(v, tensor, made) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if len(tree) != 1 or not kind.startswith("$"):
        return {k: decode(v, tensor, made) for k, v in tree.items()}
    value = tree[kind]
    if kind == "$tensor":
        return tensor(value)
    if kind in _FROM_TENSORS:
        return made(_FROM_TENSORS[kind], tensor(value))
    if kind == "$array":
        dtype, shape, place = value
        return made(lambda t: np.frombuffer(bytearray(_bytes(t)), np.dtype(dtype)).reshape(shape), tensor(place))
    if kind in _FROM_TEXT:
        return _FROM_TEXT[kind](value)
    if kind in _FROM_TREES:
        return _FROM_TREES[kind](decode(v, tensor, made) for v in value)
    raise CheckpointError(f"there is a {kind} in what was saved, which this version does not know; load it with the version that saved it.")


def _bytes(t: torch.Tensor) -> bytes:
    return t.numpy().tobytes()


_FROM_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "$complex_tensor": lambda t: torch.view_as_complex(t.clone()),  # a file aligns real numbers only, and torch crashes on other complex ones
    "$bytes": _bytes,
    "$bytearray": lambda t: bytearray(_bytes(t)),
}
_FROM_TEXT: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$int": lambda text: int(text, 16),
    "$text": lambda text: bytes.fromhex(text).decode(errors="surrogatepass"),
    "$numpy_bytes": lambda text: np.bytes_(bytes.fromhex(text)),
    "$numpy_scalar": lambda said: np.frombuffer(bytes.fromhex(said[1]), np.dtype(said[0]))[0],
}
_FROM_TREES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "$tuple": tuple,
    "$counter": lambda pairs: Counter({k: v for k, v in pairs}),
    "$items": lambda pairs: {k: v for k, v in pairs},
    "$complex": lambda parts: complex(*parts),
    "$numpy_str": lambda text: np.str_(*text),
}


def _component(key: Any) -> str:
    """A key's part of a place: no two keys have the same, and none holds a slash."""
    text = key if isinstance(key, str) and is_unicode(key) else ascii(key)
    escaped = text.replace("~", "~~").replace("/", "~|")
    return escaped if text is key else f"~{escaped}"


def _shown(path: list[str]) -> str:
    return "/".join(path)


def _is_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return key is None or type(key) is int or isinstance(key, (str, bool, float, complex, np.number, np.bool_))


def is_unicode(text: str) -> bool:
    """Whether UTF-8 has a form for it: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(value: Any, path: list[str]) -> CheckpointError:
    kind = f" of {value.dtype}" if isinstance(value, np.ndarray | np.generic) else ""
    return CheckpointError(
        f"'{_shown(path)}' is a {type(value).__module__}.{type(value).__qualname__}{kind}, which cannot be saved: numbers, strings, bytes, None, "
        "lists, tuples, dictionaries, dense tensors, and NumPy's numbers, strings, times and arrays of them can."
    )
