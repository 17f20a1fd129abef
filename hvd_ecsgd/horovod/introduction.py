"""Which bound methods take their first step together on an unmodified Horovod.

Horovod matches collectives by name, in any order. So names that are made from what ranks should agree on would leave ranks that differ waiting
for each other, without a word; the first collective of a bound method has a name that depends on nothing but how many came before it.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.talk import STEP, packed_text, raise_on_other_texts
from ..errors import DisagreementError
from ..transport import Handle, Transport
from . import opening

__all__ = ["Introduction", "Register"]


class Register:
    """What this process has bound and which first steps it has taken, in one process set, in the order of the program.

    What has become of an object that was bound is asked nowhere: a garbage collector decides that, at another time on every rank.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.bound: dict[str, list[int]] = {}
        """By table of parameters, for each model of it in the order first bound: how often it was bound."""
        self.met: list[dict[str, tuple[str, int]]] = []
        """By rank, in the order taken: the first steps, as name → table and model."""
        self._models: Any = WeakTensorKeyDictionary()  # by identity, so what a collector takes out of it cannot be asked for any more

    def number(self, table: str, parameter: torch.Tensor) -> int:
        """Note a binding of the model of this table that begins with `parameter`; the model's number."""
        with self.lock:
            models, numbers = self.bound.setdefault(table, []), self._models.setdefault(parameter, {})
            if table not in numbers:
                numbers[table] = len(models)
                models.append(0)
            models[numbers[table]] += 1
            return int(numbers[table])

    def names(self, said: list[tuple[str, int, dict[str, list[int]]]]) -> list[str] | None:
        """`said`: by rank the table and number of the model that has come there, and `bound`. By rank its name; None where no name can be given.

        The models of a table are counted alike on all ranks, or some rank has bound one that others have not, to look at it. Then it is the order in
        which they come that counts; so two of them cannot come in different orders.
        """
        names = []
        for (table, model, _), met in zip(said, self.met, strict=True):
            bound = [others.get(table, []) for *_, others in said]
            if len({len(b) for b in bound}) == 1:
                use = sum(before == (table, model) for before in met.values())
                names.append(f"{table}.{model}.{use}")
                expected = all(b[model] > use for b in bound)
            else:
                order = sum(t == table for t, _ in met.values())
                names.append(f"{table}.{order}")
                expected = all(sum(b) > order for b in bound)
            if not expected:
                return None
        if any(name in met for name, met in zip(names, self.met, strict=True)):
            return None
        numbers = [{**{n: m for n, (_, m) in met.items()}, name: model} for met, name, (_, model, _) in zip(self.met, names, said, strict=True)]
        pairs = [(a, b) for a in set(names) for b in {*names, *self.met[0]} if a.split(".")[0] == b.split(".")[0]]
        orders = [{(n[a] > n[b]) - (n[a] < n[b]) for n in numbers if a in n and b in n} for a, b in pairs]
        return names if all(len(order) <= 1 for order in orders) else None


_registers: dict[Any, Register] = {}
"""By process set."""


class Introduction:
    """A bound method's name towards the other ranks of its process set, which they have for it too.

    Two models may have equal tables of parameters, and in one backward pass ranks may come to them in different orders. So a name is the table, a
    number by the order in which models of this table were first bound, and how many first steps were taken with this model before. A rank may bind
    a method and never use it; and it may bind a model that others do not, if it comes to the others of that table in their order.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        frozen: Iterable[tuple[str, torch.Tensor]],
        process_set: Any = None,
        register: Register | None = None,
    ) -> None:
        named = list(named)
        self._text = {f"parameter '{n}'": f"{tuple(p.shape)} {p.dtype}" for n, p in named}
        self._table = blake2b(json.dumps(list(self._text.items())).encode(), digest_size=4).hexdigest()
        self._frozen = {f"parameter '{n}'": f"{tuple(p.shape)} {p.dtype}, frozen" for n, p in frozen}
        self._register = _registers.setdefault(process_set, Register()) if register is None else register
        self._model = self._register.number(self._table, named[0][1])

    def meet(self, transport: Transport, doing: str = STEP) -> tuple[str, bool]:
        """Collective, before the first step: find the other ranks' counterparts. Returns a prefix for the names of all further collectives, and
        whether all ranks have come with this one, and none with another that it has its first step for. `doing`: what this rank begins.

        Raises `DisagreementError` on every rank when there is a rank that has bound no such parameters.
        """
        register = self._register
        with register.lock:  # one after the other: the rounds are counted
            register.met = register.met or [{} for _ in range(transport.size)]
            name = f"first.{len(register.met[transport.rank])}"
            mine = json.dumps([self._table, self._model, register.bound])
            handle = transport.allgather(torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8), name)
            if doing == STEP:
                self._wait(handle, transport.rank)
            else:
                opening.await_others(handle, doing, transport.rank)
            said = [json.loads(bytes(part.tolist())) for part in handle.wait()]
            names = register.names(said)
            if names is None:  # on every rank, as all have heard the same from the beginning
                raise_on_other_texts(transport.allgather(packed_text({**self._text, **self._frozen}), f"{name}.tables").wait())
                raise DisagreementError(
                    f"ranks have bound different numbers of compressions to the model with parameter {next(iter(self._text))[10:]}, or come to two "
                    "such models in different orders; bind one for each optimizer, on every rank alike."
                )
            for met, found, (table, model, _) in zip(register.met, names, said, strict=True):
                met[found] = table, model
            return f"hvd_ecsgd.{names[transport.rank]}", len(set(names)) == 1

    def _wait(self, handle: Handle[list[torch.Tensor]], rank: int) -> None:
        explain_at = time.monotonic() + opening.SILENCE
        while not handle.done():
            time.sleep(0.001)
            if time.monotonic() > explain_at:
                explain_at = float("inf")
                warnings.warn(
                    f"rank {rank} has waited {opening.SILENCE:g} s for other ranks to compress their first gradient. If they are not merely late, "
                    "they were given another kind of compression= (Compression.none and .fp16 as they stand compress without asking).",
                    UserWarning,
                    stacklevel=2,
                )
