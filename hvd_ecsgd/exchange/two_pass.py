"""Compressed reduce to the servers of the pieces, then compressed broadcast: both directions lossy, both with feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..arguments import check_flag
from ..errors import CompressionError
from ..protocols import (
    Compressor,
    Feedback,
    Role,
    Slot,
    Slots,
    Steps,
    Sums,
    Task,
    Traffic,
    add_sum_,
    decode_sum_,
    extracted,
    poison,
    sums_for,
)
from ..segments import Key, Segments
from ..transport.base import Transport
from ..verdicts import all_of, known
from .base import Faithful, nothing

__all__ = ["TwoPass", "absorb_", "answer_", "check_server_compressor", "finite"]


def check_server_compressor(server: object) -> None:
    """Raise unless it is a compressor, or None for the worker's."""
    if server is not None and (isinstance(server, type) or not isinstance(server, Compressor)):
        raise CompressionError(f"server_compressor: expected an instance from hvd_ecsgd.compressors, or None for the worker's, got {server!r}.")


def finite(task: Task, received: Sequence[torch.Tensor], mine: Segments) -> bool:
    """No payload of a worker for this server's pieces decodes to an inf or NaN: a server must know before it adds them to what it keeps. One without
    elements was not sent."""
    return known([all_of(task.compressor.finite(p, mine) for p in received if p.numel())])


def _sent(task: Task, received: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, Key]]:
    """Workers' payloads by rank, with their keys. One without elements was not sent."""
    return [(p, task.ctx.key(task.compressor, "push", r)) for r, p in enumerate(received) if p.numel()]


def absorb_(task: Task, server: Compressor, received: Sequence[torch.Tensor], mine: Segments) -> Sums | None:
    """E ← (η̃_{t-1}/η̃_t)·E + (1/n) Σ C⁻¹(payloads), with how to undo it; n counts workers that sent nothing too. Returns what `server` would like to
    know of E, where it was seen in that pass."""
    residual = task.state["server_residual"]
    if task.ctx.carry != 1.0:
        residual.mul_(task.ctx.carry)
        task.undo_by(partial(residual.div_, task.ctx.carry))
    sent = _sent(task, received)
    sums = add_sum_(residual, task.compressor, mine, sent, 1.0 / task.ctx.size, sums_for(server, [mine]))
    for payload, key in sent:
        task.undo_by_adding(residual, task.compressor, payload, mine, key, -1.0 / task.ctx.size)
    return sums


def answer_(task: Task, server: Compressor, mine: Segments, sums: Sums | None) -> torch.Tensor:
    """The server's payload D(E); E keeps the rest; with how to undo it. `sums`: as `absorb_` returned them."""
    residual, key = task.state["server_residual"], task.ctx.key(server, "pull")
    answer = extracted(server, residual, mine, key, sums)
    task.undo_by_adding(residual, server, answer, mine, key, 1.0)
    return answer


def _sizes(compressor: Compressor, tables: Sequence[Segments]) -> list[int] | None:
    """Elements of the payloads for the tables; None, on all ranks alike, when they cannot be known."""
    sizes = [compressor.payload_size(table) for table in tables]
    known = [size if table.numel else 0 for size, table in zip(sizes, tables, strict=True) if size is not None]
    return known if len(known) == len(sizes) else None


@dataclass(frozen=True)
class TwoPass(Faithful):
    """Every segment is cut in n pieces; rank r is the server of the r-th pieces.

    Pass 1 (all-to-all): the worker sends C(v_i), piece by piece. The server of a piece forms v = mean_i C(v_i) + (η̃_{t-1}/η̃_t)·E, sends D(v)
    in pass 2 (all-gather) and keeps E = v − D(v). `server_compressor` D is C by default; `server_feedback=False` forgets E. Payload per worker
    does not grow with n. Equal to a central server that compresses piece by piece. Tang et al. 2019: DoubleSqueeze, algorithm 1.

    State: `server_residual` (gradient or update units, like the worker's), over this rank's pieces.
    """

    survives = True
    server_compressor: Compressor | None = None
    server_feedback: bool = True

    delivers = True

    def __post_init__(self) -> None:
        check_server_compressor(self.server_compressor)
        check_flag(self.server_feedback, "server_feedback")

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        """Any compressor can travel this way, on either side; the server's must bear feedback when the server has it."""
        if self.server_feedback:
            (compressor if self.server_compressor is None else self.server_compressor).check_feedback()
        super().check(compressor, feedback)

    def slots(self, size: int) -> Slots:
        return {"server_residual": Slot(Role.RESIDUAL)} if self.server_feedback else {}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return self.served(segments, rank, size).compact

    def served(self, segments: Segments, rank: int, size: int) -> Segments:
        """The part of every segment that rank `rank` is the server of, over the same buffer; it may be empty."""
        return segments.piece(rank, size)

    def extracts(self, segments: Segments, size: int) -> Sequence[Segments]:
        """What every rank is the server of."""
        return [self.served(segments, r, size) for r in range(size)]

    def run(self, task: Task, transport: Transport) -> Steps:
        n, rank, worker, ctx = transport.size, transport.rank, task.compressor, task.ctx
        server = worker if self.server_compressor is None else self.server_compressor
        pieces = self.extracts(task.segments, n)
        mine = pieces[rank].compact

        payloads = [task.extract_("push", piece) if piece.numel and not task.absent else nothing(worker, mine) for piece in pieces]
        push = torch.cat(payloads) if n > 1 else payloads[0]
        expected = task.sizes(_sizes(worker, [mine] * n))
        task.traffic += Traffic(payload=push.nbytes, sent=push.nbytes - payloads[rank].nbytes)
        received = yield transport.alltoall(push, [p.numel() for p in payloads], f"{task.name}.push", expected)

        if not mine.numel:
            answer = nothing(server, mine)
        elif not finite(task, received, mine):
            answer = poison(server, mine, ctx.key(server, "pull"))
        elif self.server_feedback:
            answer = answer_(task, server, mine, absorb_(task, server, received, mine))
        else:
            mean = mine.scratch()
            sums = decode_sum_(mean, worker, mine, _sent(task, received), 1.0 / n, sums_for(server, [mine]))
            answer = extracted(server, mean, mine, ctx.key(server, "pull"), sums)
        task.traffic += Traffic(payload=answer.nbytes, sent=(n - 1) * answer.nbytes)
        task.last = True
        answers = yield transport.allgather(answer, f"{task.name}.pull", _sizes(server, pieces))

        served = [(r, a) for r, a in enumerate(answers) if pieces[r].numel]
        task.finite = all_of(server.finite(a, pieces[r]) for r, a in served)
        return task.delivered([(server, pieces[r], [(a, ctx.key(server, "pull", r))]) for r, a in served])
