"""The one object with state: buckets with their residuals, the step counter, the seed, and the counters of traffic."""

from __future__ import annotations

import itertools
import json
import math
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Literal

import torch

from .bucket import Bucket, BucketStep, FrozenState, clipped_, local_step, part_of, unscaled_, wire_dtype
from .errors import CompressionError, DisagreementError
from .kernels import fingerprint
from .method import Method
from .protocols import Accumulated, Exchange, GroupSettings, Part, Role, State, Task, Traffic
from .saved_state import check_all_there, check_entry, check_head, check_tensor
from .segments import Key, Segments
from .talk import STEP, code_of, doing_of, packed_text, raise_if_apart, raise_on_other_texts
from .transport.base import Handle, Ready, Transport

__all__ = ["Aggregator", "Comparison"]

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
"""Numbers of the optimizers' aggregators in this process that have not taken part in a step yet, also of those that were let go since: when such an
object is freed is a matter of memory management, and not the same on all ranks."""
_numbers = itertools.count()

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


class Comparison:
    """Of what every rank says at the beginning of a step, or of something else that all do together; nothing in a local step."""

    def __init__(self, aggregator: Aggregator, transport: Transport, said: Handle[list[torch.Tensor]]) -> None:
        self._aggregator, self._transport, self._said = aggregator, transport, said

    def done(self) -> bool:
        return self._said.done()

    def notes(self) -> list[bytes]:
        """Everybody's, by rank. Waits for them."""
        return [t[_HEAD_BYTES:].numpy().tobytes() for t in self._said.wait()]

    def _heads(self) -> list[tuple[bytes, int, int]]:
        return [struct.unpack(_HEAD, t[:_HEAD_BYTES].numpy().tobytes()) for t in self._said.wait()]

    def heads(self) -> list[tuple[bytes, int]]:
        """Everybody's digest, and the param groups whose learning rate is 0 as bits, by rank. Waits for them."""
        return [(digest, resting) for digest, resting, _ in self._heads()]

    def doing(self) -> list[str]:
        """What every rank does, by rank; "" of those that have joined. Waits for them."""
        return [doing_of(code) for *_, code in self._heads()]

    def check_same(self) -> None:
        """Raise `DisagreementError`, on every rank, when they do not do the same. Before anything is waited for that follows only where all do."""
        raise_if_apart(self.doing())

    def settle(self) -> None:
        """Raise `DisagreementError`, on every rank, where ranks differ. All do this after they have started the same collectives of the step, or
        know that they have not."""
        self._aggregator.raise_on_difference(self._transport, self.heads())


class Aggregator:
    """Residuals by parameter name, step counter, seed and traffic counters of one bound method.

    `named`: (name, parameter) pairs that require gradients. `group_of` gives a parameter's group index and `settings` the hyper-parameters of a
    bucket's group now; `also` names further things that must be equal on all ranks. `bucket_bytes` = 0 makes one bucket of each parameter
    (Horovod calls us so); results do not depend on it.
    """

    def __init__(
        self,
        method: Method,
        named: NamedParameters,
        *,
        rank: int = 0,
        size: int = 1,
        bucket_bytes: int = 0,
        group_of: Callable[[torch.nn.Parameter], int] | None = None,
        settings: Callable[[Bucket], GroupSettings] | None = None,
        transport: Transport | None = None,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        self.named = list(named)
        self.rank, self.size = rank, size
        self.step = 0
        self.undone = 0
        self.traffic = Traffic()
        self.settings: Callable[[Bucket], GroupSettings] = settings or (lambda bucket: GroupSettings())
        self._static_digest: bytes | None = None
        self._frozen: list[str] = []
        self._held = False
        self._moved = False
        self._in_step = False
        self._open: tuple[Sequence[BucketStep], bool, Transport] | None = None
        """The last step, which stands and may still be discarded: its reductions, whether its gradients were overwritten, and the transport."""
        self._wrong = ""  # what this worker cannot take the step with
        self._refused = False  # some worker cannot, as all have heard
        self._others: Comparison | None = None  # of a worker that cannot: where to see what the others do
        self._refusal = ""  # what is to be raised
        self._transport = transport
        self.statistics: Callable[[], list[torch.Tensor]] = list
        """Running statistics of the model (batch norm), which are averaged where workers evaluate at different points."""
        self.outside: Callable[[str], None] = lambda what: None
        """How `check_together` finds the other ranks."""
        self.called = ""
        """The function outside of a step in which this rank waits for the others to call it, too."""
        self._agreement: Handle[list[torch.Tensor]] | None = None
        self._verification: Handle[list[torch.Tensor]] | None = None
        self._first_step_pending = True
        self._number = next(_numbers)
        self._also = dict(also or {})
        self._set_method(method)
        self.buckets = self._plan(bucket_bytes, group_of or (lambda parameter: 0))

    def expect_first_step(self) -> None:
        """An optimizer has this one, and will come to its first step."""
        _first_steps_pending.add(self._number)

    def _set_method(self, method: Method) -> None:
        self.method = method
        self._method_text = repr(method)
        self._stateful = method.stateful
        self._static_digest = None

    def _plan(self, bucket_bytes: int, group_of: Callable[[torch.nn.Parameter], int]) -> list[Bucket]:
        buckets: list[Bucket] = []
        open_buckets: dict[Any, list[tuple[str, torch.nn.Parameter]]] = {}
        dense_method = self.method.dense()
        offsets: dict[str, int] = {}
        model_numel = 0
        for name, parameter in self.named:  # in the order bound, whatever the buckets
            offsets[name] = model_numel
            if not self.method.is_dense(parameter):
                model_numel += parameter.numel()

        def close(kind: Any) -> None:
            members = open_buckets.pop(kind)
            group, dense, dtype, _ = kind
            segments = replace(Segments.of([(n, p.detach()) for n, p in members], offsets, model_numel), dtype=dtype)
            name = members[0][0] if bucket_bytes == 0 else f"bucket{len(buckets)}"
            buckets.append(Bucket(name, dense_method if dense else self.method, segments, [p for _, p in members], group, dense=dense))

        # Gradients become ready from the last layer to the first.
        for name, parameter in reversed(self.named):
            kind = (group_of(parameter), self.method.is_dense(parameter), wire_dtype(parameter), parameter.device)
            members = open_buckets.setdefault(kind, [])
            members.append((name, parameter))
            if sum(p.numel() for _, p in members) * kind[2].itemsize >= bucket_bytes:
                close(kind)
        for kind in list(open_buckets):
            close(kind)
        return buckets

    # -- one step ----------------------------------------------------------------------------------------------------------------

    def note_frozen(self) -> None:
        """Before the first bucket of a step, in the script's thread: which parameters do not take part is compared across ranks."""
        self._frozen = [name for name, p in self.named if not p.requires_grad]

    def use(self, transport: Transport, joined: bool = False, together: bool | None = None, check_same: Callable[[], None] = lambda: None) -> None:
        """Called at the start of every step. The first time, compare everything across ranks before anything is sent (collective).
        A rank that has `joined` may hold another x. `together`: all ranks are known to be here, or not to be; None: that is not known.
        `check_same` is called before ranks are waited for that may do something else.

        It waits for the slowest rank, however long that loads its data. Only with two models in one backward pass another rank may be waiting
        in the other one. Then `settle` finishes the comparison: at once where ranks are known not to be together, and where that is not known
        when patience ends while another object of this process has its first step to come.
        """
        self._transport = transport
        every = self.method.verify_every
        if every and self.step and self.step % every == 0:
            mine = torch.zeros(1 + len(self.named), dtype=torch.int64, device="cpu")
            if not joined:
                mine[0], mine[1:] = 1, self._fingerprints()
            self._verification = transport.allgather(mine, "replicas", [mine.numel()] * transport.size)
        if not self._first_step_pending:
            return
        self._first_step_pending = False
        _first_steps_pending.discard(self._number)
        # The whole text, not its digest: a rank that sees a difference can tell at once, and needs nothing more from the others.
        self._agreement = transport.allgather(self._packed_text(), "agreement")
        if together is None:
            together = not _first_steps_pending
            give_up = time.monotonic() + _PATIENCE
            while not together and not self._agreement.done() and time.monotonic() < give_up:
                time.sleep(0.001)
        if together or self._agreement.done():
            check_same()
            self.settle()

    def settle(self) -> None:
        """Finish the comparisons that `use` started, before anything received is used. Raises `DisagreementError` on every rank."""
        agreement, self._agreement = self._agreement, None
        if agreement is not None:
            raise_on_other_texts(agreement.wait())
        verification, self._verification = self._verification, None
        if verification is not None:
            self._raise_on_drift(torch.stack(verification.wait()))

    @torch.no_grad()
    def _fingerprints(self) -> torch.Tensor:
        """Of every parameter at x, in the order bound: int64, on the CPU."""
        found: dict[str, torch.Tensor] = {}
        for bucket in self.buckets:
            x = bucket.point
            values = bucket.parameters if x is None else bucket.segments.views(x)
            found.update(zip(bucket.segments.names, map(fingerprint, values)))
        return torch.stack([found[name] for name, _ in self.named]).cpu()

    def _raise_on_drift(self, fingerprints: torch.Tensor) -> None:
        """`fingerprints`: (rank, 1 + parameter); beginning with 0 of a rank that has joined."""
        ranks, fingerprints = fingerprints[:, 0].nonzero().view(-1).tolist(), fingerprints[:, 1:]
        differs = (fingerprints[ranks] != fingerprints[ranks[:1]]).any(0)
        if not bool(differs.any()):
            return
        first = int(differs.nonzero()[0])
        others = [r for r in ranks if fingerprints[r, first] != fingerprints[ranks[0], first]]
        raise DisagreementError(
            f"replicas have drifted apart before step {self.step}: parameter '{self.named[first][0]}' (the first of {int(differs.sum())}) "
            f"holds other bits on rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} than on rank {ranks[0]}. Something outside of "
            "training wrote to it on some ranks only (clipping, loading, initialising), or a hyper-parameter differs there."
        )

    def compare(self, transport: Transport, note: bytes = b"", joined: bool = False, outside: str = "") -> Comparison:
        """Start to compare settings, hyper-parameters and step across ranks.

        Steps can come apart when state is loaded on some ranks only, learning rates when schedules differ. The comparison travels ahead of
        the payloads, so it costs no waiting. Nothing is compared in a local step but the first. `note` travels along; from the second step on
        it has one length on all ranks. `joined`: this rank's settings are left out of the comparison. `outside`: the function that was called, where
        this begins no step; it is the first that ranks hear of each other then, too.
        """
        resting = 0
        if self._stateful:
            settings = [(bucket.group, self.settings(bucket)) for bucket in self.buckets]
            resting = sum({1 << min(group, 62) for group, s in settings if s.lr == 0})
            if not outside:
                self._wrong, self._refused, self._others = next((s.wrong for _, s in settings if s.wrong), ""), False, None
        if self.local and not outside and not self._first_step_pending:
            return Comparison(self, transport, Ready([]))
        digest = _JOINED if joined else _REFUSED if self._wrong and not outside else self._digest()
        said = struct.pack(_HEAD, digest, resting, code_of("" if joined else outside or STEP)) + note
        sizes = None if self._first_step_pending else [len(said)] * transport.size  # nobody knows the others' settings yet
        handle = transport.allgather(torch.frombuffer(bytearray(said), dtype=torch.uint8), "opening", sizes)
        comparison = Comparison(self, transport, handle)
        if digest == _REFUSED:
            self._others = comparison
        return comparison

    @property
    def local(self) -> bool:
        """Nothing is sent in this step."""
        return not self.method.feedback.exchanges(self.step)

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            raise CompressionError("this compression object has not taken part in a step yet, so it has no transport.")
        return self._transport

    @torch.no_grad()
    def clip_factor(self, gradients: Sequence[torch.Tensor]) -> float:
        """What `clip_norm` multiplies this worker's gradients of the whole model by, as `torch.nn.utils.clip_grad_norm_` would; 1 without it, and
        where some gradient is not finite."""
        if self.method.clip_norm is None or not gradients:
            return 1.0
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64).item() for g in gradients]
        norm = math.hypot(*norms) / self.settings(self.buckets[0]).loss_scale
        return min(1.0, self.method.clip_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0

    @torch.no_grad()
    def take_(self, bucket: Bucket, gradients: Sequence[torch.Tensor], factor: float = 1.0) -> list[torch.Tensor]:
        """This worker's gradients as they are accumulated: of an unscaled loss, and clipped, by `factor` and by the method's `clip_value`.

        In place, but for types too narrow for unscaled ones. To be called where the script cannot come in between, as it sees them.
        """
        scale, taken = self._scale_of(self.settings(bucket)), list(gradients)
        if scale != 1.0:
            taken = unscaled_(taken, scale, bucket.segments.dtype)
        clipped_(taken, self.method.clip_value, factor)
        return taken

    def _scale_of(self, group: GroupSettings) -> float:
        """What gradients are divided by before they are accumulated. A method without state or clipping need not know the loss scale."""
        return group.loss_scale if self._stateful or self.method.clips else 1.0

    @torch.no_grad()
    def start(self, bucket: Bucket, gradients: list[torch.Tensor], transport: Transport, out: torch.Tensor | None = None) -> BucketStep | None:
        """Accumulate `gradients`, as `take_` returned them, extract and start to send; the mean goes to the flat `out`, or to a buffer that the
        bucket keeps.

        None when the learning rate is 0 and the method keeps state: nothing is sent, and residuals and momentum stay as they are. With
        hyper-parameters that no step can be taken with nothing is accumulated, and NaN is sent, so that every rank undoes the step.
        """
        for segment, gradient in zip(bucket.segments, gradients, strict=True):
            if tuple(gradient.shape) != segment.shape:
                raise CompressionError(
                    f"the gradient of parameter '{segment.name}' has shape {tuple(gradient.shape)}, but it was bound with shape "
                    f"{segment.shape}; its residual cannot be carried over. "
                    "Bind again after changing a parameter's shape."
                )
        bucket.check_kinds()
        if self._moved:
            raise CompressionError("a training step inside `with compression.at(…):` would be lost; leave the block first.")
        self._in_step = True
        bucket.allocate(transport.rank, transport.size)
        assert bucket.state is not None and bucket.exchange_state is not None
        feedback = bucket.method.feedback
        group = self.settings(bucket)
        self._recapture(bucket)
        if self._stateful and (self._wrong or group.wrong):
            self._wrong, group = self._wrong or group.wrong, GroupSettings(self._others_lr(bucket), loss_scale=group.loss_scale)
        ctx = bucket.context(group, self.method.seed, self.step, transport.rank, transport.size)
        if group.lr == 0 and self._stateful:
            return None
        if bucket.method.exact:
            bucket.remember()
        frozen_state = FrozenState(bucket, transport.rank, transport.size) if bucket.frozen() else None
        accumulated = Accumulated.nothing(bucket.segments) if self._wrong else feedback.accumulate_(bucket.part, gradients, ctx)
        compressor, exchange = bucket.method.at(self.step)
        task = Task(
            name=bucket.name,
            segments=bucket.segments,
            buffer=accumulated.buffer,
            out=bucket.result_buffer() if out is None else out,
            compressor=compressor,
            state=bucket.exchange_state,
            ctx=ctx,
            poisoned=not accumulated.finite,
            reversible=bucket.residual is not None,
            residual=accumulated.buffer if bucket.residual is None else bucket.residual,
            residual_was_zero=compressor.lossless and bucket.residual_is_zero,
            step_size=group.lr if feedback.unit == "gradient" else 1.0,
        )
        # Who applies the mean gets it as a GradScaler expects it, loss-scaled.
        steps, rescale = local_step(task) if self.local else exchange.run(task, transport), 1.0 if feedback.takes.update else self._scale_of(group)
        return BucketStep(bucket, task, steps, gradients, group, rescale, frozen_state)

    def _others_lr(self, bucket: Bucket) -> float:
        """0 if the others send nothing for this bucket, as their learning rate is 0, else 1: who cannot take a step sends what they do."""
        heads = [] if self._others is None else self._others.heads()
        resting = next((groups for digest, groups in heads if digest not in (_JOINED, _REFUSED)), 0)
        return 0.0 if resting >> min(bucket.group, 62) & 1 else 1.0

    @torch.no_grad()
    def finish_step(self, reductions: Sequence[BucketStep], gradients_gone: bool = False, transport: Transport | None = None) -> bool:
        """After all reductions of a step are driven: count it, and undo it on every rank when any rank sent an inf or NaN. True when it stands: then
        `keep_step` or `discard_step` follows.

        `gradients_gone`: as in `BucketStep.undo_`. `transport`: for what the rule then does together with the other ranks; the step's by default.
        """
        finite = all(r.task.finite for r in reductions)
        where = "this rank (a local step)" if self.local and not self._refused else "all ranks"
        transport = self.transport if transport is None else transport
        finite, alone = finite and not self._refused, not self._refused and (self.local or transport.size == 1)
        self._in_step = False
        if not finite:
            for reduction in reductions:
                self._recapture(reduction.bucket, contents=True)  # undoing shifts anew
        for reduction in reductions:
            n = self.transport.size
            reduction.task.traffic.dense = 2 * (n - 1) * reduction.bucket.segments.numel * reduction.bucket.parameters[0].dtype.itemsize // n
            self.traffic += reduction.task.traffic
            if not finite:
                reduction.undo_(gradients_gone)
        self.step += 1
        if finite:
            self._open, self._in_step = (reductions, gradients_gone, transport), self._stateful and bool(reductions)
            if not self._in_step:
                self.keep_step()
            return True
        self.undone += 1
        if self._refused or (alone and self._wrong):
            self._note_refusal(where, None if alone else transport)
        else:
            warnings.warn(
                f"a gradient or a payload held an inf or NaN on some rank: step {self.step - 1} was undone on {where} ({self.undone} so "
                "far). With a GradScaler this happens now and then.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._wrong, self._refused = "", False
        return False

    @property
    def step_is_open(self) -> bool:
        """A step was finished and stands, the method keeps something of it, and it was neither kept nor discarded so far."""
        return self._open is not None

    def keep_step(self) -> None:
        """The step that was finished is applied: let go of what would undo it. Nothing when that is done already; collective otherwise."""
        if self._open is not None:
            (reductions, _, transport), self._open, self._in_step = self._open, None, False
            for reduction in reductions:
                reduction.commit()
            self._between_steps(reductions, transport)

    @torch.no_grad()
    def discard_step(self) -> None:
        """Undo the step that was finished, on all ranks, as one with an inf. Nothing when nothing is open.

        Raises `CompressionError` where the gradients were overwritten and no copy of the state was kept.
        """
        if self._open is None:
            return
        reductions, gradients_gone, _ = self._open
        if gradients_gone and not self.method.exact:
            raise CompressionError(
                "discard(): an unmodified Horovod has written the mean over this worker's gradients, so what the method keeps of them can only be "
                "taken back with a copy of its state: give the preset exact=True. Own optimizers (`import mpi_backend as hvd`) need none."
            )
        self._open, self._in_step = None, False
        for reduction in reductions:
            reduction.undo_(gradients_gone)
        self.undone += 1

    def _note_refusal(self, where: str, transport: Transport | None) -> None:
        """Find out who cannot take the step, and with what. Collective over `transport`, if there is one."""
        said = {"this rank": self._wrong}
        if transport is not None:
            text = torch.frombuffer(bytearray(self._wrong.encode() + b" "), dtype=torch.uint8)
            said = {f"rank {r}": bytes(t.tolist()).decode().strip() for r, t in enumerate(transport.allgather(text, "refused").wait())}
        wrong = {who: what for who, what in said.items() if what}
        everybody = len(wrong) == len(said)
        found = "; ".join(dict.fromkeys(wrong.values()) if everybody else (f"{who}: {what}" for who, what in wrong.items()))
        self._refusal = (
            f"{found}, which would spoil for good what the method keeps. Expected finite numbers, and lr ≥ 0. Step {self.step - 1} was undone on "
            f"{where} and not applied; set the value right, and training goes on."
        )

    def take_refusal(self) -> str:
        """After `finish_step`: on every rank what to raise when the step was refused for somebody's hyper-parameters, once; else nothing."""
        refusal, self._refusal = self._refusal, ""
        return refusal

    @property
    def refuses(self) -> bool:
        """This rank cannot take the step under way with its hyper-parameters."""
        return bool(self._wrong)

    def hear_refusal(self) -> None:
        """Some rank cannot take this step, as all ranks hear."""
        self._refused = True

    @torch.no_grad()
    def _between_steps(self, reductions: Sequence[BucketStep], transport: Transport) -> None:
        """What the feedback rule does together with the other ranks between steps. Nothing after a step in which nothing was sent (η = 0)."""
        if not reductions:
            return
        moving = {id(r.bucket) for r in reductions}
        buckets = [b for b in self.buckets if b.residual is not None]
        parts = [Part(b.state, b.parameters, b.segments, b.method.lossless, id(b) not in moving) for b in buckets if b.state is not None]
        key = Key(self.method.seed, self.step - 1, transport.rank, "prepare", transport.size)
        for round_, tensors in enumerate(self.method.feedback.between_steps(parts, key) if parts else ()):
            for bucket in buckets:  # a residual that takes up others' is zero no more
                bucket.residual_is_zero = bucket.residual_is_zero and not any(t is bucket.residual for t in tensors)
            handles = [transport.allreduce_(t, f"prepare.{round_}.{i}") for i, t in enumerate(tensors)]
            for t, handle in zip(tensors, handles, strict=True):
                handle.wait().div_(transport.divisor)
                self.traffic += Traffic(payload=t.nbytes, sent=2 * (transport.size - 1) * t.nbytes // transport.size)

    # -- parameters that are shifted (DEF) ----------------------------------------------------------------------------------------

    def apply_updates(self, reductions: Sequence[BucketStep]) -> None:
        """Methods that apply the update themselves: move x, and shift; the step is kept. Where nothing came back, x stays; the error to shift by has
        changed.

        After an exchange, the running statistics of a model that is evaluated at different points on different ranks are averaged. Collective when
        there was an exchange.
        """
        self.keep_step()
        with torch.no_grad():
            for reduction in reductions:
                self._recapture(reduction.bucket, contents=True)
            if Role.POINT in self.method.slot_names and not all(r.task.skipped for r in reductions):
                self._average_statistics()
            for reduction in reductions:
                reduction.apply_()

    def _average_statistics(self) -> None:
        """One dense all-reduce per type and device."""
        tensors, n = self.statistics(), self.transport.size
        for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
            members = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = torch.cat([t.reshape(-1) for t in members])
            self.traffic += Traffic(payload=flat.nbytes, sent=2 * (n - 1) * flat.nbytes // n)
            self.transport.allreduce_(flat, f"statistics.{kind[0]}").wait()
            for t, mean in zip(members, torch.split(flat.div_(n), [t.numel() for t in members]), strict=True):
                t.copy_(mean.view(t.shape))

    def _recapture(self, bucket: Bucket, contents: bool = False) -> None:
        """Read x at the first step. Later, what somebody else wrote to shifted parameters cannot be told from the shift: an error.

        `contents`: also what was written without raising a version counter, which takes one pass to see: whenever the parameters are about to be
        overwritten, so that nothing is lost in silence.
        """
        feedback = bucket.method.feedback
        if bucket.point is None:
            return
        if bucket.versions:
            name = bucket.written_to(contents)
            if name is None:
                return
            raise CompressionError(
                f"parameter '{name}' was written to while {feedback} held it at a shifted point that differs between ranks. Write to parameters "
                "(clipping, averaging, broadcasting, loading a checkpoint) inside `with compression.at('averaged'):`, which keeps what is "
                "written; when resuming, load the model before the compression's state and broadcast nothing after it."
            )
        assert bucket.state is not None
        with torch.no_grad():
            bucket.capture_()
            bucket.note_written()

    @property
    def held(self) -> bool:
        """Inside of `at`."""
        return self._held

    @property
    def shifted(self) -> bool:
        """The parameters hold a shifted point now, different on every rank."""
        return not self._held and any(b.point is not None and b.versions == [p._version for p in b.parameters] for b in self.buckets)

    @staticmethod
    def check_point(point: str) -> None:
        if point not in ("averaged", "virtual", "local"):
            raise CompressionError(f"at(): expected 'averaged', 'virtual' or 'local', got {point!r}.")

    @contextmanager
    def at(self, point: Literal["averaged", "virtual", "local"]) -> Iterator[None]:
        """Hold the parameters at a point for evaluation or saving; training goes on from where it was. Not nested; no training step inside.

        `averaged`: x, equal on all ranks; values written to the parameters inside are kept, so write the same on all ranks. `virtual`:
        z = x − mean e − E (E: the servers' residual, of exchanges that have one), which needs one dense all-reduce (update-unit methods;
        collective). `local`: where this worker evaluates its gradients. They are the same, and nothing is done, for methods that do not shift the
        model, but for `virtual`, inside of which writes are lost.
        """
        self.check_point(point)
        if self._held:
            raise CompressionError("at(): the parameters are held at a point already; leave that block first.")
        if point == "virtual" and self.method.feedback.unit != "update":
            raise CompressionError(
                f"at('virtual') is defined for update-unit methods (EF with local momentum, DEF, SAEF); this one is {self.method.feedback}. "
                "Use at('averaged')."
            )
        if point == "virtual":
            self.check_together("at('virtual')")
        moved: list[tuple[Bucket, list[torch.Tensor], list[int]]] = []
        self._held = True
        try:
            with torch.no_grad():
                for bucket in self.buckets if point != "local" else ():
                    self._move_to(point, bucket, moved)
            self._moved = bool(moved)
            yield
        finally:
            self._held = self._moved = False
            with torch.no_grad():
                for bucket, saved, versions in moved:
                    if point == "averaged" and (versions != [p._version for p in bucket.parameters] or not _at_point(bucket)):
                        bucket.capture_()
                        bucket.shift_()
                    else:
                        torch._foreach_copy_(list(bucket.parameters), saved)
                        bucket.versions = [p._version for p in bucket.parameters]

    def shared_state(self) -> list[torch.Tensor]:
        """The slots that hold the same bits on all ranks and depend on the parameters, but for x."""
        return [b.memory for b in self.buckets if b.memory is not None]

    def _move_to(self, point: str, bucket: Bucket, moved: list[tuple[Bucket, list[torch.Tensor], list[int]]]) -> None:
        """Set the bucket's parameters to x or z; note what they held, and their versions afterwards."""
        if bucket.state is None:
            return
        x = bucket.point
        mean_error: torch.Tensor | None = None
        if point == "virtual" and bucket.residual is not None and (x is not None or not bucket.dense):
            mean_error = bucket.residual.clone()
            if bucket.server_residual is not None:
                self._return_to_worker(bucket, bucket.method.exchange, bucket.server_residual, mean_error)
            self.transport.allreduce_(mean_error, f"{bucket.name}.virtual").wait()
            mean_error.div_(self.transport.size)
        if x is not None:
            self._recapture(bucket, contents=True)
        if mean_error is None and x is None:
            return
        saved = [p.detach().clone() for p in bucket.parameters]
        if x is not None:
            torch._foreach_copy_(list(bucket.parameters), bucket.segments.shaped_views(x))
        if mean_error is not None:
            torch._foreach_sub_(list(bucket.parameters), bucket.segments.shaped_views(mean_error))
        moved.append((bucket, saved, [p._version for p in bucket.parameters]))

    # -- another method ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def switch(self, new: Method) -> None:
        """Go on with `new`'s compressor and exchange. Residuals stay as they are, in their units; a server's residual whose pieces the new exchange
        does not have, or does not use yet (warm-up), goes back to the workers, n-fold to the one that held it, as the mean divides by n. Other
        state of the exchange is kept if it fits.

        Collective after the first step. Nothing is changed when `CompressionError`, or on every rank `DisagreementError`, is raised.
        """
        self.check_between_steps("the method was switched")
        if self._held:
            raise CompressionError("switch(): leave `with compression.at(…):` first.")
        for bucket in self.buckets:
            if bucket.state is not None:
                self._recapture(bucket, contents=True)
        old, n = self.method, self.size
        method = old.switched(new)
        allocated = [b for b in self.buckets if not b.dense and b.state is not None]
        ranks = range(n)
        compresses = self.step >= method.warmup_steps  # else nobody would ask the servers, nor carry their residuals from one η to the next
        kept = {
            b.name: compresses
            and [old.exchange.state_segments(b.segments, r, n) for r in ranks] == [method.exchange.state_segments(b.segments, r, n) for r in ranks]
            for b in allocated
        }
        if old.server_slot and Role.RESIDUAL not in method.slot_names and not (method.server_slot and all(kept.values())):
            raise CompressionError(
                f"switch(): the servers' residuals have no place in {method.exchange} with {method.feedback}; switch to a method with feedback."
            )
        if not self._first_step_pending:  # else this is a setting like others, compared at the first step
            self.check_together("switch")
        self._set_method(method)
        if not self._first_step_pending:
            try:
                raise_on_other_texts(self.transport.allgather(self._packed_text(), "switch").wait())
            except BaseException:
                self._set_method(old)
                raise
        for bucket in self.buckets:
            bucket.method = method.dense() if bucket.dense else method
        for bucket in allocated:
            self._carry_over(bucket, old, kept[bucket.name])

    def _carry_over(self, bucket: Bucket, old: Method, same_pieces: bool) -> None:
        """State of the bucket's method, from that of `old`, which it was left by."""
        before, feedback = bucket.exchange_state, bucket.method.feedback
        assert before is not None and bucket.state is not None
        if feedback != old.feedback:
            bucket.state = bucket.new_state()
        after = bucket.new_exchange_state(self.rank, self.size)
        for slot, value in before.items():
            if same_pieces and slot in after and after[slot].shape == value.shape:
                after[slot] = value
            elif slot == old.server_slot:
                assert bucket.residual is not None
                bucket.residual_is_zero = False
                self._return_to_worker(bucket, old.exchange, value, bucket.residual)
        bucket.exchange_state = after
        bucket.shift_()

    def _return_to_worker(self, bucket: Bucket, exchange: Exchange, server_residual: torch.Tensor, residual: torch.Tensor) -> None:
        """Add what this rank holds as a server to what it holds as a worker, n-fold, as the mean over workers divides by n."""
        pieces = exchange.state_segments(bucket.segments, self.rank, self.size)
        for segment, piece in zip(bucket.segments, pieces, strict=True):
            start = segment.start + piece.offset - segment.offset
            residual[start : start + piece.numel].add_(server_residual[piece.start : piece.stop], alpha=self.size)

    # -- agreement ---------------------------------------------------------------------------------------------------------------

    def also_agree_on(self, **settings: Any) -> None:
        """Further things that must be equal on all ranks, from the next step on."""
        self._also.update(settings)
        self._static_digest = None

    def _description(self) -> dict[str, Any]:
        """Everything but the step that must be equal on all ranks."""
        groups = {name: bucket.group for bucket in self.buckets for name in bucket.segments.names}
        return {
            "compressor": repr(self.method.compressor),
            "feedback": repr(self.method.feedback),
            "exchange": repr(self.method.exchange),
            "dense_below": self.method.dense_below,
            "dense_1d": self.method.dense_1d,
            "seed": self.method.seed,
            "verify_every": self.method.verify_every,
            "warmup_steps": self.method.warmup_steps,
            "ratio_schedule": repr(self.method.ratio_schedule),
            "clip_norm": self.method.clip_norm,
            "clip_value": self.method.clip_value,
            **self._also,
            **{f"parameter '{name}'": f"{tuple(p.shape)} {p.dtype} in param group {groups[name]}" for name, p in self.named},
            "parameters per bucket (bucket_bytes)": [len(bucket.parameters) for bucket in self.buckets],
        }

    def _now(self) -> dict[str, Any]:
        """What changes from step to step and must be equal on all ranks."""
        now = {"step": self.step, "hyper-parameters": sorted({repr(self._compared(bucket)) for bucket in self.buckets})}
        return {**now, "frozen since the compression was bound (requires_grad=False)": self._frozen}

    def _compared(self, bucket: Bucket) -> GroupSettings:
        """The settings that must be equal on all ranks. Updates are in true units, and after an overflow in a local step scalers differ."""
        settings = self.settings(bucket)
        return replace(settings, loss_scale=1.0) if bucket.method.feedback.takes.update else settings

    def _digest(self) -> bytes:
        if self._static_digest is None:
            text = json.dumps(list(self._description().items()))  # order matters too: it fixes the buckets, and places in the model
            self._static_digest = blake2b(text.encode(), digest_size=_DIGEST).digest()
        return blake2b(self._static_digest + json.dumps(self._now()).encode(), digest_size=_DIGEST).digest()

    def raise_on_difference(self, transport: Transport, heads: Sequence[tuple[bytes, int]]) -> None:
        """`heads`: by rank. Where those of ranks that have not joined differ, all ranks raise. One that refuses the step is heard of."""
        digests, silent = [digest for digest, _ in heads], (_JOINED, _REFUSED)
        self._refused = self._refused or _REFUSED in digests
        if len({d for d in digests if d not in silent}) < 2:
            return
        rests = {r: resting for r, (digest, resting) in enumerate(heads) if digest not in silent}
        first = next(iter(rests))
        if other := next((r for r in rests if rests[r] != rests[first]), 0):
            differ = rests[first] ^ rests[other]
            group = (differ & -differ).bit_length() - 1
            zero, moving = (first, other) if rests[first] >> group & 1 else (other, first)
            raise DisagreementError(  # without a further collective: what they have started for this group differs
                f"ranks do not agree on hyper-parameters: the learning rate of param group {group} is 0 on rank {zero}, and not on rank {moving}. "
                "Every rank must follow the same schedule."
            )
        # Seen by every rank, so all of them send their texts now.
        text = torch.empty(0, dtype=torch.uint8, device="cpu") if digests[transport.rank] in silent else self._packed_text()
        raise_on_other_texts(transport.allgather(text, "disagreement").wait())
        raise DisagreementError("ranks do not agree on their settings or step; use the same Compression arguments and state on every rank.")

    def _packed_text(self) -> torch.Tensor:
        return packed_text({**self._description(), **self._now()})

    def settings_hash(self, bucket: Bucket) -> int:
        """4 bits that change with settings, hyper-parameters and step; compared across ranks in every payload."""
        text = f"{self._method_text}|{self.step}|{self._compared(bucket)}|{bucket.frozen()}"
        return blake2b(text.encode(), digest_size=1).digest()[0] % 16

    # -- state -------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of all state, by parameter name; plain dictionaries, numbers and tensors. Differs between ranks: save one per rank."""
        rank, size = self.rank, self.size
        parameters: dict[str, dict[str, Any]] = {}
        for bucket in self.buckets:
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
            "method": repr(self.method),
            "rank": rank,
            "size": size,
            "step": self.step,
            "undone": self.undone,
            "parameters": parameters,
            "with_state": list(parameters),  # so that it shows when one is lost
        }

    def begin_step(self) -> None:
        """A gradient has come: state may change from now on, perhaps in a thread that has not begun yet, and gradients are no part of it."""
        self._in_step = True

    def check_between_steps(self, what: str, begun: bool = False) -> None:
        """Raise `CompressionError` when a step is under way: residuals then hold half a step, or gradients of it would be lost. `begun`: it is."""
        if self._in_step or begun:
            raise CompressionError(f"{what} between a backward pass and its optimizer.step(): the step is under way; do it after step().")

    def check_together(self, what: str, ends_step: bool = False) -> None:
        """All ranks call this before they do `what` together outside of a step, also before the first one; `ends_step`: or at the end of one.

        Raises `DisagreementError`, on every rank, where ranks do different things, `CompressionError` where some have joined and will not come.
        """
        if not ends_step:
            self.check_between_steps(f"{what} was called")
        self.called = what
        try:
            self.outside(what)
        finally:
            self.called = ""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over state saved by `state_dict` on the same rank of a group of the same size. Nothing is changed when an error is raised."""
        self.prepare_load(state)()

    def prepare_load(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check `state` and build everything aside; calling the result takes it over and cannot fail. Raises as `load_state_dict`."""
        self.check_between_steps("state was loaded")
        if self._held:
            raise CompressionError("load_state_dict(): leave `with compression.at(…):` first; on leaving, x would be read from shifted parameters.")
        check_head(state, repr(self.method))
        check_all_there(state)
        rank, size = self.rank, self.size
        if (state["rank"], state["size"]) != (rank, size) and state["parameters"]:
            raise CompressionError(
                f"the state was saved by rank {state['rank']} of {state['size']}, and this is rank {rank} of {size}. Residuals belong to "
                "their rank: save one file per rank and load one's own."
            )
        staged: list[tuple[Bucket, State, State, float | None]] = []
        saved = state["parameters"]
        unknown = sorted(set(saved) - {name for name, _ in self.named})
        if unknown:
            raise CompressionError(f"the state holds parameter '{unknown[0]}', which is not bound here.")
        for bucket in self.buckets:
            present = [n for n in bucket.segments.names if n in saved]
            if not present:
                continue  # nothing was sent for these parameters yet
            feedback_state, exchange_state = bucket.new_state(), bucket.new_exchange_state(rank, size)
            tables = [(feedback_state, bucket.segments), (exchange_state, bucket.method.exchange.state_segments(bucket.segments, rank, size))]
            for name in present:
                check_entry(name, saved[name], {**feedback_state, **exchange_state})
            for slots, table in tables:
                for slot, target in slots.items():
                    for i, segment in enumerate(table):
                        if segment.name not in saved:
                            continue  # likewise: its state is still zero
                        value, part = saved[segment.name].get(slot), part_of(target, i, segment)
                        check_tensor(segment.name, slot, value, part)
                        part.copy_(value.reshape(-1))
            staged.append((bucket, feedback_state, exchange_state, self._in_common_units_(bucket, tables, saved)))

        def take_over() -> None:
            points = {bucket.name: self._at_x(bucket) for bucket, *_ in staged}
            for bucket in self.buckets:  # what the saved training had not allocated yet begins anew
                bucket.state = bucket.exchange_state = bucket.unit = None
                bucket.residual_is_zero, bucket.versions = True, []
            for bucket, feedback_state, exchange_state, unit in staged:
                bucket.state, bucket.exchange_state, bucket.unit = feedback_state, exchange_state, unit
                if bucket.point is not None:
                    xs = bucket.segments.shaped_views(bucket.point)
                    for name, x, current in zip(bucket.segments.names, xs, points[bucket.name], strict=True):
                        if name not in saved:  # it stays where it is
                            x.copy_(current)
                bucket.residual_is_zero = bucket.residual is None or not bool(bucket.residual.any())
                with torch.no_grad():
                    bucket.shift_()
            self.step, self.undone = state["step"], state["undone"]

        return take_over

    def _at_x(self, bucket: Bucket) -> list[torch.Tensor]:
        """Where the parameters are, or would be if they were not shifted."""
        if bucket.point is not None and bucket.versions and bucket.written_to(contents=True) is None:
            return bucket.segments.shaped_views(bucket.point)
        return [p.detach() for p in bucket.parameters]

    @staticmethod
    def _in_common_units_(bucket: Bucket, tables: Sequence[tuple[State, Segments]], saved: Mapping[str, Any]) -> float | None:
        """One learning rate for the whole bucket, returned, that its residuals are in units of: saved ones may have been of several param groups."""
        rates = {name: saved[name].get("previous_lr") for name in bucket.segments.names if name in saved}
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


def _at_point(bucket: Bucket) -> bool:
    """The bucket's parameters hold x."""
    x = bucket.point
    return x is not None and all(torch.equal(p, v.to(p.dtype)) for p, v in zip(bucket.parameters, bucket.segments.shaped_views(x), strict=True))
