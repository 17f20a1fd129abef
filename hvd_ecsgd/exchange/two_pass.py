"""Compressed reduce to the servers of the pieces, then compressed broadcast: both directions lossy, both with feedback."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..protocols import Compressor, State, Steps, Task, Traffic, poison
from ..segments import Segments
from ..transport.base import Transport

__all__ = ["TwoPass"]


@dataclass(frozen=True)
class TwoPass:
    """Every segment is cut in n pieces; rank r is the server of the r-th pieces.

    Pass 1 (all-to-all): the worker sends C(v_i), piece by piece. The server of a piece forms v = mean_i C(v_i) + (η_{t-1}/η_t)·E, sends D(v) in
    pass 2
    (all-gather) and keeps E = v − D(v). `server_compressor` D is C by default; `server_feedback=False` forgets E. Payload per worker does not
    grow with n. Equal to a central server that compresses piece by piece. Tang et al. 2019: DoubleSqueeze, algorithm 1.

    State: `server_residual` (gradient or update units, like the worker's), over this rank's pieces.
    """

    server_compressor: Compressor | None = None
    server_feedback: bool = True

    def check(self, compressor: Compressor) -> None:
        """Any compressor can travel this way, on either side; the server's must bear feedback when the server has it."""
        if self.server_feedback:
            (compressor if self.server_compressor is None else self.server_compressor).check_feedback()

    def init(self, segments: Segments, rank: int, size: int) -> State:
        return {"server_residual": self.state_segments(segments, rank, size).zeros()} if self.server_feedback else {}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments.piece(rank, size).compact

    def run(self, task: Task, transport: Transport) -> Steps:
        n, rank, worker, ctx = transport.size, transport.rank, task.compressor, task.ctx
        server = worker if self.server_compressor is None else self.server_compressor
        pieces = [task.segments.piece(r, n) for r in range(n)]
        mine = pieces[rank].compact

        payloads = [task.extract_("push", piece) for piece in pieces]
        push = torch.cat(payloads) if n > 1 else payloads[0]
        expected = worker.payload_size(mine)
        task.traffic += Traffic(payload=push.nbytes, sent=push.nbytes - payloads[rank].nbytes)
        received = yield transport.alltoall(push, [p.numel() for p in payloads], f"{task.name}.push", None if expected is None else [expected] * n)

        total = mine.zeros()
        keys = [ctx.key(worker, "push", r) for r in range(n)]
        for r, p in enumerate(received):
            worker.add_(total, p, mine, keys[r], 1.0 / n)
        pull_key = ctx.key(server, "pull")
        if all(worker.finite(p, mine) for p in received):
            if self.server_feedback:
                residual = task.state["server_residual"]
                if task.server_carry != 1.0:
                    residual.mul_(task.server_carry)
                    task.undo_by(partial(residual.div_, task.server_carry))
                residual.add_(total)
                for r, p in enumerate(received):
                    task.undo_by_adding(residual, worker, p, mine, keys[r], -1.0 / n)
                answer = server.extract_(residual, mine, pull_key)
                task.undo_by_adding(residual, server, answer, mine, pull_key, 1.0)
            else:
                answer = server.extract_(total, mine, pull_key)
        else:
            answer = poison(server, mine, pull_key)
        task.traffic += Traffic(payload=answer.nbytes, sent=(n - 1) * answer.nbytes)
        sizes = [server.payload_size(piece) for piece in pieces]
        known = None if any(s is None for s in sizes) else [s for s in sizes if s is not None]
        answers = yield transport.allgather(answer, f"{task.name}.pull", known)

        task.finite = all(server.finite(a, piece) for a, piece in zip(answers, pieces, strict=True))
        out = task.result()
        for r, a in enumerate(answers):
            server.add_(out, a, pieces[r], ctx.key(server, "pull", r))
        return out
