"""What must be equal on all ranks, and how they find out that it is: the order of parameters, settings at the first step, hyper-parameters at every
step, and the model itself now and then."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeVar

import torch

from ..errors import DisagreementError
from ..kernels import fingerprint
from ..protocols import GroupSettings
from ..transport.base import Handle, Ready, Transport
from .bucket import Bucket
from .method import Method
from .refusal import Refusal
from .state import MethodState
from .talk import STEP, code_of, doing_of, packed_text, raise_if_apart, raise_on_other_texts, unpacked

__all__ = ["Agreement", "Comparison", "in_common_order"]

_DIGEST = 16
"""Bytes of the hash of settings and step that ranks compare."""

_HEAD = f"<{_DIGEST}sqB"
"""What all begin with, before their note: the digest, the param groups whose learning rate is 0 (nothing is sent for them), what the rank does."""

_HEAD_BYTES = struct.calcsize(_HEAD)

_REFUSED = b"\xff" * _DIGEST
"""In its place, of a worker whose hyper-parameters no step can be taken with."""

_JOINED = bytes(_DIGEST)
"""In its place, of a worker that has joined: its settings are those of a step that the others have left behind."""

_PATIENCE = 5.0
"""Seconds that the first step waits for the other ranks' settings while another object here has its first step still to come."""

_first_steps_pending: set[int] = set()
"""Numbers of the optimizers' agreements in this process that have not taken part in a step yet, also of those that were let go since: when such an
object is freed is a matter of memory management, and not the same on all ranks."""
_numbers = itertools.count()

T = TypeVar("T")


def in_common_order(named: Sequence[tuple[str, T]], transport: Transport) -> list[tuple[str, T]]:
    """`named` in the order of rank 0, by which every rank then makes its buckets; as it is where ranks hold other names. Collective."""
    names = [name for name, _ in named]
    digest = torch.frombuffer(bytearray(blake2b(json.dumps(names).encode(), digest_size=16).digest()), dtype=torch.uint8)
    digests = transport.allgather(digest, "order", [16] * transport.size).wait()
    if all(torch.equal(d, digests[0]) for d in digests):
        return list(named)
    first = unpacked(transport.allgather(packed_text(dict.fromkeys(names)), "order.names").wait()[0])
    mine = dict(named)
    return [(name, mine[name]) for name in first] if first.keys() == mine.keys() else list(named)


class Comparison:
    """Of what every rank says at the beginning of a step, or of something else that all do together; nothing in a local step."""

    def __init__(self, agreement: Agreement, transport: Transport, said: Handle[list[torch.Tensor]]) -> None:
        self._agreement, self._transport, self._said = agreement, transport, said

    def done(self) -> bool:
        return self._said.done()

    def notes(self) -> list[bytes]:
        """Everybody's, by rank. Waits for them."""
        return [t[_HEAD_BYTES:].numpy().tobytes() for t in self._said.wait()]

    def _heads(self) -> list[tuple[bytes, int, int]]:
        return [struct.unpack(_HEAD, t[:_HEAD_BYTES].numpy().tobytes()) for t in self._said.wait()]

    def doing(self) -> list[str]:
        """What every rank does, by rank; "" of those that have joined. Waits for them."""
        return [doing_of(code) for *_, code in self._heads()]

    def check_same(self) -> None:
        """Raise `DisagreementError`, on every rank, when they do not do the same. Before anything is waited for that follows only where all do."""
        raise_if_apart(self.doing())

    def raise_if_different(self) -> None:
        """Raise `DisagreementError`, on every rank, where ranks differ. All do this after they have started the same collectives of the step, or
        know that they have not."""
        self._agreement.raise_if_different(self._transport, [(digest, resting) for digest, resting, _ in self._heads()])

    def sends_nothing(self, group: int) -> bool:
        """The learning rate of this param group is 0 on the ranks that take the step. Waits for all."""
        zero_rates = next((zero for digest, zero, _ in self._heads() if digest not in (_JOINED, _REFUSED)), 0)
        return bool(zero_rates >> min(group, 62) & 1)


class Agreement:
    """Compares one record with its counterparts on the other ranks. `also`: further things that must be equal there."""

    def __init__(self, state: MethodState, also: Mapping[str, Any] | None = None) -> None:
        self._state = state
        self._also = dict(also or {})
        self.refusal = Refusal()
        self.first_step_pending = True
        """Nothing has been compared so far."""
        self._number = next(_numbers)
        self._settings: tuple[Method, list[Bucket], bytes] | None = None
        """The method, the buckets, and the digest of what does not change from step to step with them."""
        self._frozen: list[str] = []
        self._texts: Handle[list[torch.Tensor]] | None = None
        self._fingerprints: Handle[list[torch.Tensor]] | None = None

    def expect_first_step(self) -> None:
        """An optimizer has this one, and will come to its first step."""
        _first_steps_pending.add(self._number)

    def start_again(self) -> None:
        """There are fewer workers than before: what was compared with them counts no more, and the next step compares everything anew."""
        self._texts = self._fingerprints = None
        self.first_step_pending = True

    def also_agree_on(self, **settings: Any) -> None:
        """Further things that must be equal on all ranks, from the next step on."""
        self._also.update(settings)
        self._settings = None

    def note_frozen(self) -> None:
        """Before the first bucket of a step, in the script's thread: which parameters do not take part is compared across ranks."""
        self._frozen = [name for name, p in self._state.named if not p.requires_grad]

    # -- at the first step -------------------------------------------------------------------------------------------------------

    def begin_step_together(
        self, transport: Transport, joined: bool = False, together: bool | None = None, check_same: Callable[[], None] = lambda: None
    ) -> None:
        """Called at the start of every step. The first time, compare everything across ranks before anything is sent (collective).
        A rank that has `joined` may hold another x. `together`: all ranks are known to be here, or not to be; None: that is not known.
        `check_same` is called before ranks are waited for that may do something else.

        It waits for the slowest rank, however long that loads its data. Only with two models in one backward pass another rank may be waiting
        in the other one. Then `finish_comparisons` does: at once where ranks are known not to be together, and where that is not known
        when patience ends while another object of this process has its first step to come.
        """
        state = self._state
        state.transport = transport
        every = state.method.verify_every
        if every and state.step and state.step % every == 0:
            mine = torch.zeros(1 + len(state.named), dtype=torch.int64, device="cpu")
            if not joined:
                mine[0], mine[1:] = 1, _fingerprints(state)
            self._fingerprints = transport.allgather(mine, "replicas", [mine.numel()] * transport.size)
        if not self.first_step_pending:
            return
        self.first_step_pending = False
        _first_steps_pending.discard(self._number)
        # The whole text, not its digest: a rank that sees a difference can tell at once, and needs nothing more from the others.
        self._texts = transport.allgather(self._packed_text(), "agreement")
        if together is None:
            together = not _first_steps_pending
            give_up = time.monotonic() + _PATIENCE
            while not together and not self._texts.done() and time.monotonic() < give_up:
                time.sleep(0.001)
        if together or self._texts.done():
            check_same()
            self.finish_comparisons()

    def finish_comparisons(self) -> None:
        """Those that `begin_step_together` started, before anything received is used. Raises `DisagreementError` on every rank."""
        texts, self._texts = self._texts, None
        if texts is not None:
            raise_on_other_texts(texts.wait())
        fingerprints, self._fingerprints = self._fingerprints, None
        if fingerprints is not None:
            _raise_on_drift(self._state, torch.stack(fingerprints.wait()))

    def compare_texts(self, name: str) -> None:
        """Compare everything now; raises `DisagreementError` on every rank. Collective."""
        raise_on_other_texts(self._state.transport.allgather(self._packed_text(), name).wait())

    # -- at every step -----------------------------------------------------------------------------------------------------------

    def compare(self, transport: Transport, note: bytes = b"", joined: bool = False, outside: str = "") -> Comparison:
        """Start to compare settings, hyper-parameters and step across ranks.

        Steps can come apart when state is loaded on some ranks only, learning rates when schedules differ. The comparison travels ahead of
        the payloads, so it costs no waiting. Nothing is compared in a local step but the first. `note` travels along; from the second step on
        it has one length on all ranks. `joined`: this rank's settings are left out of the comparison. `outside`: the function that was called, where
        this begins no step; it is the first that ranks hear of each other then, too.
        """
        state, refusal, zero_rates = self._state, self.refusal, 0
        if state.method.stateful:
            settings = [(bucket.group, state.settings(bucket)) for bucket in state.buckets]
            zero_rates = sum({1 << min(group, 62) for group, s in settings if s.lr == 0})
            if not outside:
                refusal.begin(next((s.wrong for _, s in settings if s.wrong), ""))
        if state.local and not outside and not self.first_step_pending:
            return Comparison(self, transport, Ready([]))
        digest = _JOINED if joined else _REFUSED if refusal.wrong and not outside else self._digest()
        said = struct.pack(_HEAD, digest, zero_rates, code_of("" if joined else outside or STEP)) + note
        sizes = None if self.first_step_pending else [len(said)] * transport.size  # nobody knows the others' settings yet
        handle = transport.allgather(torch.frombuffer(bytearray(said), dtype=torch.uint8), "opening", sizes)
        comparison = Comparison(self, transport, handle)
        if digest == _REFUSED:
            refusal.others = comparison
        return comparison

    def raise_if_different(self, transport: Transport, heads: Sequence[tuple[bytes, int]]) -> None:
        """`heads`: by rank, digest and the param groups whose learning rate is 0 as bits. Where those of ranks that have not joined differ, all ranks
        raise. One that refuses the step is heard of."""
        digests, silent = [digest for digest, _ in heads], (_JOINED, _REFUSED)
        if _REFUSED in digests:
            self.refusal.hear()
        if len({d for d in digests if d not in silent}) < 2:
            return
        zero_rates = {r: zero for r, (digest, zero) in enumerate(heads) if digest not in silent}
        first = next(iter(zero_rates))
        if other := next((r for r in zero_rates if zero_rates[r] != zero_rates[first]), 0):
            differ = zero_rates[first] ^ zero_rates[other]
            group = (differ & -differ).bit_length() - 1
            zero, moving = (first, other) if zero_rates[first] >> group & 1 else (other, first)
            raise DisagreementError(  # without a further collective: what they have started for this group differs
                f"ranks do not agree on hyper-parameters: the learning rate of param group {group} is 0 on rank {zero}, and not on rank {moving}. "
                "Every rank must follow the same schedule."
            )
        # Seen by every rank, so all of them send their texts now.
        text = torch.empty(0, dtype=torch.uint8, device="cpu") if digests[transport.rank] in silent else self._packed_text()
        raise_on_other_texts(transport.allgather(text, "disagreement").wait())
        raise DisagreementError("ranks do not agree on their settings or step; use the same Compression arguments and state on every rank.")

    def settings_hash(self, bucket: Bucket) -> int:
        """4 bits that change with settings, hyper-parameters and step; compared across ranks in every payload."""
        text = f"{self._state.method.text}|{self._state.step}|{compared(self._state, bucket)}|{bucket.frozen()}"
        return blake2b(text.encode(), digest_size=1).digest()[0] % 16

    # -- what is compared --------------------------------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        """Everything but the step that must be equal on all ranks."""
        state, method = self._state, self._state.method
        groups = {name: bucket.group for bucket in state.buckets for name in bucket.segments.names}
        return {
            "compressor": repr(method.compressor),
            "feedback": repr(method.feedback),
            "exchange": repr(method.exchange),
            "dense_below": method.dense_below,
            "dense_1d": method.dense_1d,
            "seed": method.seed,
            "verify_every": method.verify_every,
            "warmup_steps": method.warmup_steps,
            "ratio_schedule": repr(method.ratio_schedule),
            "clip_norm": method.clip_norm,
            "clip_value": method.clip_value,
            **self._also,
            **{f"parameter '{name}'": f"{tuple(p.shape)} {p.dtype} in param group {groups[name]}" for name, p in state.named},
            "parameters per bucket (bucket_bytes)": [len(bucket.parameters) for bucket in state.buckets],
        }

    def _now(self) -> dict[str, Any]:
        """What changes from step to step and must be equal on all ranks."""
        state = self._state
        now = {"step": state.step, "hyper-parameters": sorted({repr(compared(state, bucket)) for bucket in state.buckets})}
        return {**now, "frozen since the compression was bound (requires_grad=False)": self._frozen}

    def _digest(self) -> bytes:
        method, buckets = self._state.method, self._state.buckets
        if self._settings is None or self._settings[0] is not method or self._settings[1] is not buckets:
            text = json.dumps(list(self._description().items()))  # order matters too: it fixes the buckets, and places in the model
            self._settings = (method, buckets, blake2b(text.encode(), digest_size=_DIGEST).digest())
        return blake2b(self._settings[2] + json.dumps(self._now()).encode(), digest_size=_DIGEST).digest()

    def _packed_text(self) -> torch.Tensor:
        return packed_text({**self._description(), **self._now()})


def compared(state: MethodState, bucket: Bucket) -> GroupSettings:
    """The settings that must be equal on all ranks. Updates are in true units, and after an overflow in a local step scalers differ."""
    settings = state.settings(bucket)
    return replace(settings, loss_scale=1.0) if bucket.method.feedback.takes.update else settings


@torch.no_grad()
def _fingerprints(state: MethodState) -> torch.Tensor:
    """Of every parameter at x, in the order bound: int64, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for bucket in state.buckets:
        x = bucket.point
        values = bucket.parameters if x is None else bucket.segments.views(x)
        found.update(zip(bucket.segments.names, map(fingerprint, values)))
    return torch.stack([found[name] for name, _ in state.named]).cpu()


def _raise_on_drift(state: MethodState, fingerprints: torch.Tensor) -> None:
    """`fingerprints`: (rank, 1 + parameter); beginning with 0 of a rank that has joined."""
    ranks, fingerprints = fingerprints[:, 0].nonzero().view(-1).tolist(), fingerprints[:, 1:]
    differs = (fingerprints[ranks] != fingerprints[ranks[:1]]).any(0)
    if not bool(differs.any()):
        return
    first = int(differs.nonzero()[0])
    others = [r for r in ranks if fingerprints[r, first] != fingerprints[ranks[0], first]]
    raise DisagreementError(
        f"replicas have drifted apart before step {state.step}: parameter '{state.named[first][0]}' (the first of {int(differs.sum())}) "
        f"holds other bits on rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} than on rank {ranks[0]}. Something outside of "
        "training wrote to it on some ranks only (clipping, loading, initialising), or a hyper-parameter differs there."
    )
