"""Exchanges in which workers and servers stay silent in some steps; what is not sent stays in their residuals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CompressionError
from ..protocols import Compressor, Feedback, Role, Slot, Slots, Steps, Task, Traffic, decode_sum_, poison
from ..segments import Key, Segments
from ..transport.base import Handle, Transport
from ..verdicts import all_of
from .all_reduce import AllReduce
from .base import Skipping, nothing
from .skip import Every, SkipPolicy
from .two_pass import absorb_, answer_, check_server_compressor, finite

__all__ = ["CompSkip", "SkipAllReduce"]

_TURNS, _ALWAYS = Every(2), Every(1)
_MEMORY = 0.9
"""Share of the running mean of the model's movement that is kept at each step (for `NormBased`)."""


def _check_policy(role: str, policy: object) -> None:
    if isinstance(policy, type) or not isinstance(policy, SkipPolicy):
        raise CompressionError(f"comp_skip: {role} must be a policy such as Every(2), Rounds(2), Bernoulli(0.5) or NormBased(), got {policy!r}.")


def _sends(policy: SkipPolicy, task: Task, column: int, rank: int | None, stage: str, energy: float, movement: float) -> bool:
    """The policy's decision for this step, or that of its cap on the skips counted in `column`."""
    if policy.cap is not None and int(task.state["skips"][0, column]) >= policy.cap:
        return True
    return policy.sends(Key(task.ctx.seed, task.ctx.step, rank, stage), energy, movement)


def _restore_when_undone(task: Task, slot: str) -> torch.Tensor:
    t = task.state[slot]
    task.undo_by(partial(t.copy_, t.clone()))
    return t


def _check_feedback(task: Task) -> None:
    if not task.reversible:
        raise CompressionError(
            f"'{task.name}': skipping needs a feedback rule that keeps what was not sent, and this one has no residual; use ErrorFeedback or "
            "DistEFSGD."
        )


def _raise_alarm(task: Task, transport: Transport, bad: bool) -> Handle[list[torch.Tensor]]:
    """Tell all ranks whether this one holds an inf or NaN, where no payload would."""
    task.traffic += Traffic(payload=1, sent=transport.size - 1)
    return transport.allgather(torch.tensor([bad], dtype=torch.uint8, device="cpu"), f"{task.name}.alarm", [1] * transport.size)


def _spoiled(task: Task) -> torch.Tensor:
    """The result that all ranks see when one of them raised the alarm."""
    task.finite = False
    return task.result().fill_(float("nan"))


def _bytes(compressor: Compressor, segments: Segments) -> int:
    """Bytes of a payload, 0 where they depend on the values."""
    return (compressor.payload_size(segments) or 0) * compressor.payload_dtype(segments.dtype).itemsize


def _energy(t: torch.Tensor, task: Task) -> float:
    """Squared norm of the update that `t` stands for."""
    return task.step_size**2 * float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2


@dataclass(frozen=True)
class CompSkip(Skipping):
    """Two-pass compression in which each worker, and the server, may skip a step. A reconstruction of CompSkipDSGD.

        worker i:  u = (what feedback accumulates);  skip: send nothing, e ← u;   else send Δ = C(u), e ← u − Δ
        server:    U = (1/n) Σ_{senders} Δ_i + (η̃_{t-1}/η̃_t)·E;   skip: x unchanged, E ← U;   else send D = C(U), E ← U − D

    The structure is that of the paper as far as it could be read; the policies' rules are our choice. As `TwoPass`, rank r is the server of the r-th
    pieces. The mean divides by n, not by the number of senders. A Bernoulli(q) sender acts as a compressor that contracts by qδ.

    With predictable policies (`Every`, `Rounds`, `Bernoulli`) every rank knows who sends: the parts of silent workers have no rows, collectives that
    would carry nothing are not started, and one byte per rank tells of an inf or NaN that did not travel. `NormBased` workers decide by bucket
    and servers by piece; a message without rows is the flag, and sizes are exchanged, so nobody waits for what does not come. When a `NormBased`
    server skips some pieces only, those entries of the result are zero. `server_compressor` is the worker's by default.

    State: `server_residual` over this rank's pieces; `skips`, per segment the skips in a row of each worker and, last, of the server (with
    `NormBased`, of this rank only); for `NormBased` also `movement`, running means of the squared steps of the model: of the segment, and of
    this rank's piece.
    """

    worker: SkipPolicy = _TURNS
    server: SkipPolicy = _ALWAYS
    server_compressor: Compressor | None = None

    def __post_init__(self) -> None:
        _check_policy("worker", self.worker)
        _check_policy("server", self.server)
        check_server_compressor(self.server_compressor)

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        """Any compressor can travel this way, on either side; the server's must bear feedback, which it always has."""
        (compressor if self.server_compressor is None else self.server_compressor).check_feedback()
        super().check(compressor, feedback)

    def slots(self, size: int) -> Slots:
        kept = {"server_residual": Slot(Role.RESIDUAL), "skips": Slot(columns=size + 1, dtype=torch.int64)}
        return kept if self.worker.predictable and self.server.predictable else {**kept, "movement": Slot(columns=2)}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments.piece(rank, size).compact

    def run(self, task: Task, transport: Transport) -> Steps:
        _check_feedback(task)
        n, rank, worker = transport.size, transport.rank, task.compressor
        server = worker if self.server_compressor is None else self.server_compressor
        pieces = [task.segments.piece(r, n) for r in range(n)]
        mine = pieces[rank].compact
        skips = _restore_when_undone(task, "skips")

        # Pass 1: who sends, and what.
        senders = self._senders(task, n)
        known = [s for s in senders if s is not None]
        received: list[torch.Tensor] = []
        task.silent = not senders[rank]
        if senders[rank]:
            payloads = [task.extract_("push", piece) for piece in pieces]
        else:
            payloads = [nothing(worker, mine)] * n
            task.traffic += Traffic(skipped=sum(_bytes(worker, piece) for piece in pieces))
        if any(known) or len(known) < n:
            push, size = torch.cat(payloads), worker.payload_size(mine)
            task.traffic += Traffic(payload=push.nbytes, sent=push.nbytes - payloads[rank].nbytes)
            expected = None if size is None or len(known) < n else [size if s else 0 for s in known]
            received = yield transport.alltoall(push, [p.numel() for p in payloads], f"{task.name}.push", expected)

        # The server of this rank's pieces.
        good = finite(task, received, mine)
        sums = absorb_(task, server, received, mine) if good else None
        serves = self._serves(task, good, n)
        silent = (self.worker.predictable and not all(known)) or (self.server.predictable and not serves)
        alarm = _raise_alarm(task, transport, task.poisoned or not good) if silent else None
        self._count(skips, senders, serves)
        if not serves:
            task.traffic += Traffic(skipped=_bytes(server, mine))

        # Pass 2: the servers' answers.
        answers = [nothing(server, mine)] * n
        if serves or not self.server.predictable:
            if not serves:
                answer = nothing(server, mine)
            elif good:
                answer = answer_(task, server, mine, sums)
            else:
                answer = poison(server, mine, task.ctx.key(server, "pull"))
            task.traffic += Traffic(payload=answer.nbytes, sent=(n - 1) * answer.nbytes)
            sizes = [server.payload_size(piece) for piece in pieces]
            fixed = [s for s in sizes if s is not None] if self.server.predictable else []
            answers = yield transport.allgather(answer, f"{task.name}.pull", fixed if len(fixed) == n else None)
        if alarm is not None and any(bool(a) for a in (yield alarm)):
            return _spoiled(task)
        task.finite = all_of(server.finite(a, piece) for a, piece in zip(answers, pieces, strict=True) if a.numel())
        task.skipped = not serves if self.server.predictable else not any(a.numel() for a in answers)
        out = task.result()
        for r, a in enumerate(answers):
            decode_sum_(out, server, pieces[r], [(a, task.ctx.key(server, "pull", r))] if a.numel() else [])
        self._remember(task, out, pieces[rank])
        return out

    def _senders(self, task: Task, n: int) -> list[bool | None]:
        """Which workers send, by rank; None where that cannot be known here."""
        rank = task.ctx.rank
        if self.worker.predictable:
            return [_sends(self.worker, task, r, r, "worker", float("nan"), float("nan")) for r in range(n)]
        senders: list[bool | None] = [None] * n
        senders[rank] = task.poisoned or _sends(  # an inf or NaN is everybody's business
            self.worker, task, rank, rank, "worker", _energy(task.buffer, task), float(task.state["movement"][:, 0].sum())
        )
        return senders

    def _serves(self, task: Task, good: bool, n: int) -> bool:
        """Whether this rank's pieces are answered: one decision for all servers, or for these pieces."""
        if self.server.predictable:
            return _sends(self.server, task, n, None, "server", float("nan"), float("nan"))
        energy, movement = _energy(task.state["server_residual"], task), float(task.state["movement"][:, 1].sum())
        return not good or _sends(self.server, task, n, task.ctx.rank, "server", energy, movement)

    @staticmethod
    def _count(skips: torch.Tensor, senders: list[bool | None], serves: bool) -> None:
        skips += 1
        for column, sent in enumerate([*senders, serves]):
            if sent is not False:  # unknown ones are not counted here
                skips[:, column] = 0

    @staticmethod
    def _remember(task: Task, out: torch.Tensor, mine: Segments) -> None:
        """The movement of the model in this step, per segment and piece."""
        if "movement" not in task.state:
            return
        movement = _restore_when_undone(task, "movement").mul_(_MEMORY)
        for column, table in enumerate((task.segments, mine)):
            for i, view in enumerate(table.views(out)):
                movement[i, column] += (1 - _MEMORY) * _energy(view, task)


@dataclass(frozen=True)
class SkipAllReduce(Skipping):
    """An ordinary all-reduce that all workers skip together, or none: the decision is drawn from the shared seed. Needs a summable compressor and a
    predictable policy. A skipped step sends one byte per rank, which tells of an inf or NaN. As `CompSkip`, a reconstruction of CompSkipDSGD.

    State: `skips`, the skips in a row, per segment.
    """

    worker: SkipPolicy = _TURNS

    def __post_init__(self) -> None:
        _check_policy("worker", self.worker)
        if not self.worker.predictable:
            raise CompressionError(
                f"SkipAllReduce: all workers must take one decision, and {self.worker} is each worker's own; use Rounds, Every or Bernoulli, or "
                "CompSkip."
            )

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        AllReduce().check(compressor, feedback)

    def slots(self, size: int) -> Slots:
        return {"skips": Slot(columns=1, dtype=torch.int64)}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments

    def run(self, task: Task, transport: Transport) -> Steps:
        _check_feedback(task)
        skips = _restore_when_undone(task, "skips")
        if _sends(self.worker, task, 0, None, "worker", float("nan"), float("nan")):
            skips.zero_()
            return (yield from AllReduce().run(task, transport))
        skips += 1
        task.silent = True
        task.traffic += Traffic(skipped=_bytes(task.compressor, task.segments))
        if any(bool(a) for a in (yield _raise_alarm(task, transport, task.poisoned))):
            return _spoiled(task)
        task.skipped = True
        return task.result().zero_()
