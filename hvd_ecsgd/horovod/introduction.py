"""Which bound methods take their first step together on an unmodified Horovod.

Horovod matches collectives by name, in any order. So names that are made from what ranks should agree on would leave ranks that differ waiting
for each other, without a word; the first collective of a bound method has a name that depends on nothing but how many came before it.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import warnings
import weakref
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch

from ..errors import DisagreementError
from ..talk import packed_text, raise_on_other_texts
from ..transport import Handle, Transport

__all__ = ["Introduction"]

_SILENCE = 20.0
"""Seconds of waiting for the other ranks' first gradients after which the waiting is explained."""


class Introduction:
    """A bound method's name towards the other ranks of its process set, which they have for it too.

    Two models may have equal tables of parameters, and in one backward pass ranks may come to them in different orders. So a name is the table, and
    a number by the order in which methods of this table were bound; those that were let go before they took a step do not count.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]], frozen: Iterable[tuple[str, torch.Tensor]], process_set: Any = None) -> None:
        self._table = {f"parameter '{n}'": f"{tuple(p.shape)} {p.dtype}" for n, p in named}
        kind = blake2b(json.dumps(list(self._table.items())).encode(), digest_size=4).hexdigest()
        self._frozen = {f"parameter '{n}'": f"{tuple(p.shape)} {p.dtype}, frozen" for n, p in frozen}
        self._kind = process_set, kind
        with _lock:
            _waiting.append(weakref.ref(self))

    def meet(self, transport: Transport) -> str:
        """Collective, before the first step: find the other ranks' counterparts. Returns a prefix for the names of all further collectives.

        Raises `DisagreementError` on every rank when there is a rank that has bound no such parameters.
        """
        with _lock:  # one after the other: the rounds are counted
            met = _met.setdefault(self._kind[0], [set() for _ in range(transport.size)])
            if self not in (r() for r in _waiting):  # it has failed here before
                _waiting.append(weakref.ref(self))
            name, coming = f"first.{len(met[transport.rank])}", self._coming(met[transport.rank])
            mine = next(key for key, other in coming.items() if other is self)
            handle = transport.allgather(torch.frombuffer(bytearray(json.dumps([mine, *coming]).encode()), dtype=torch.uint8), name)
            self._wait(handle, transport.rank)
            _waiting[:] = [r for r in _waiting if r() is not self]
            said = [json.loads(bytes(part.tolist())) for part in handle.wait()]
            if not all(key in met[r] or key in others for r, others in enumerate(said) for key, *_ in said):  # seen by every rank
                raise_on_other_texts(transport.allgather(packed_text({**self._table, **self._frozen}), f"{name}.tables").wait())
                raise DisagreementError(
                    f"ranks have bound different numbers of compressions to the model with parameter {next(iter(self._table))[10:]} that they still "
                    "hold; bind one for each optimizer, on every rank alike."
                )
            for r, (key, *_) in enumerate(said):
                met[r].add(key)
            return f"hvd_ecsgd.{mine}"

    def _coming(self, taken: set[str]) -> dict[str, Introduction]:
        """The methods of this process set that have met nobody yet, by the names that they will have."""
        _waiting[:] = [r for r in _waiting if r() is not None]
        found: dict[str, Introduction] = {}
        for other in (r() for r in _waiting):
            if other is not None and other._kind[0] is self._kind[0]:
                free = (f"{other._kind[1]}.{i}" for i in itertools.count())
                found[next(key for key in free if key not in taken and key not in found)] = other
        return found

    def _wait(self, handle: Handle[list[torch.Tensor]], rank: int) -> None:
        explain_at = time.monotonic() + _SILENCE
        while not handle.done():
            time.sleep(0.001)
            if time.monotonic() > explain_at:
                explain_at = float("inf")
                warnings.warn(
                    f"rank {rank} has waited {_SILENCE:g} s for other ranks to compress their first gradient. If they are not merely late, they were "
                    "given another kind of compression= (Compression.none and .fp16 as they stand compress without asking).",
                    UserWarning,
                    stacklevel=2,
                )


_lock = threading.RLock()
_waiting: list[weakref.ref[Introduction]] = []
"""Those that have met nobody yet, in the order bound."""
_met: dict[Any, list[set[str]]] = {}
"""By process set: the names that each rank has come with."""
