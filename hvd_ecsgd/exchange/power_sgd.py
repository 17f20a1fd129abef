"""PowerSGD: matrices travel as the product of two thin ones, in two all-reduces."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from ..arguments import check_choice, check_integer
from ..errors import CompressionError
from ..kernels import Native, all_finite, native_for
from ..protocols import Compressor, Feedback, Slot, Slots, Steps, Task, Traffic
from ..segments import Key, Segment, Segments
from ..transport.base import Transport, direct
from .base import Faithful

__all__ = ["PowerSGD"]

_THIN = 4


def _cut(flat: torch.Tensor, shapes: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Tensors of these shapes, one after the other in `flat`."""
    return [part.view(shape) for part, shape in zip(torch.split(flat, [math.prod(shape) for shape in shapes]), shapes, strict=True)]


@dataclass(frozen=True)
class PowerSGD(Faithful):
    """P = MQ; all-reduce P; orthogonalise its columns; Q = MᵀP; all-reduce Q; every worker decodes P·mean(Q)ᵀ. Vogels, Karimireddy, Jaggi 2019,
    algorithm 1.

    M is a parameter's buffer seen as shape[0] × the rest, a the `approximation_rank`: a·(rows + columns) numbers travel in place of rows·columns.
    Parameters that this does not make smaller (so whenever a ≥ the smaller side) and those of fewer than two dimensions travel as they are, in the
    first all-reduce. Q is kept and starts the next step's power iteration; the first is drawn from the seed, alike on all ranks, and so is a new one
    after a zero gradient. Parameters of one shape are multiplied and orthogonalised as a batch; a bucket has two all-reduces, whatever it holds.

    With error feedback, `residual="mean"` keeps M − P·mean(Q)ᵀ, what the paper's algorithm 2 and its authors' code do; `"own"` keeps M − P·Q_iᵀ, a
    projection, which is never larger than M. Either conserves: mean residual + result = mean M. The compressor beside it is `Identity()`.

    Every rank orthogonalises the same bits, which gives the same bits where ranks have the same kind of processor and libraries.

    State: `q`, columns × a for each matrix; the same on all ranks.
    """

    survives = delivers = True
    approximation_rank: int = 2
    residual: Literal["mean", "own"] = "mean"

    def __post_init__(self) -> None:
        check_integer(self.approximation_rank, "approximation_rank", "an integer ≥ 1", least=1)
        check_choice(self.residual, "residual", ("mean", "own"))

    @property
    def approximates(self) -> bool:
        return True

    def check(self, compressor: Compressor, feedback: Feedback) -> None:
        if not compressor.lossless:
            raise CompressionError(f"PowerSGD sends factors of the matrices as they are; expected Identity() as the compressor, got {compressor}.")
        super().check(compressor, feedback)

    def slots(self, size: int) -> Slots:
        return {"q": Slot()}

    def state_segments(self, segments: Segments, rank: int, size: int) -> Segments:
        return self._q_table(segments)

    def _is_matrix(self, segment: Segment) -> bool:
        if len(segment.shape) < 2 or segment.numel == 0:
            return False
        rows = segment.shape[0]
        return self.approximation_rank * (rows + segment.numel // rows) < segment.numel

    def _q_table(self, segments: Segments) -> Segments:
        table, start = [], 0
        for s in segments:
            shape = (s.numel // s.shape[0] if self._is_matrix(s) else 0, self.approximation_rank)
            table.append(replace(s, start=start, numel=shape[0] * shape[1], shape=shape))
            start += shape[0] * shape[1]
        return replace(segments, table=tuple(table))

    def run(self, task: Task, transport: Transport) -> Steps:
        transport = direct(transport)
        batches: dict[tuple[int, int], list[int]] = {}
        for i, s in enumerate(task.segments):
            if self._is_matrix(s):
                batches.setdefault((s.shape[0], s.numel // s.shape[0]), []).append(i)
        whole = [i for i, s in enumerate(task.segments) if not self._is_matrix(s)]
        q_views = self._q_table(task.segments).shaped_views(task.state["q"])
        self._draw_missing_(q_views, task)

        # What stands in for a poisoned buffer need only be NaN where it is sent, and what a GPU alone knows to be one where it is sent first.
        finite, buffer = task.accumulated.finite, task.buffer
        if finite is False:
            buffer = torch.full((task.out.numel(),), float("nan"), dtype=task.out.dtype, device=task.out.device)
        tables, n = list(task.segments), transport.size

        def stacked(members: list[int], shape: tuple[int, int]) -> torch.Tensor:
            views = [buffer[tables[i].start : tables[i].stop].view(shape) for i in members]
            return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)

        def flattened(parts: list[torch.Tensor]) -> torch.Tensor:
            flat = torch.cat([t.reshape(-1) for t in parts])
            task.traffic += Traffic(payload=flat.nbytes, sent=2 * (n - 1) * flat.nbytes // n)
            return flat

        native, rows, a = (
            self._native(buffer, task.segments, batches),
            np.array([shape[0] for shape, members in batches.items() for _ in members], np.int64),
            self.approximation_rank,
        )
        if native:
            flat_p = native.low_rank_p(rows, a, torch.cat([q_views[i].reshape(-1) for members in batches.values() for i in members]))
            p = _cut(flat_p, [(len(members), shape[0], a) for shape, members in batches.items()])
        else:
            p = [torch.bmm(stacked(members, shape), torch.stack([q_views[i] for i in members])) for shape, members in batches.items()]
        plain = [buffer[tables[i].start : tables[i].stop].clone() for i in whole]
        sums = flattened([*p, *plain])
        if isinstance(finite, torch.Tensor):
            sums[:1].masked_fill_(~finite, math.nan)
        task.last = not batches
        mean = (yield transport.allreduce_(sums, f"{task.name}.p")).mul_(1.0 / n)
        if not all_finite(mean):
            return self._spoiled(task)
        *p_means, means = torch.split(mean, [t.numel() for t in p] + [sum(t.numel() for t in plain)])
        p = [torch.linalg.qr(mean_.view(t.shape)).Q for mean_, t in zip(p_means, p, strict=True)]

        if native:
            flat_p = torch.cat([p_.reshape(-1) for p_ in p])
            own = _cut(native.low_rank_q(rows, a, flat_p), [(len(members), shape[1], a) for shape, members in batches.items()])
        else:
            own = [torch.bmm(stacked(members, shape).mT, p_) for (shape, members), p_ in zip(batches.items(), p, strict=True)]
        q = own
        if batches:
            task.last = True
            mean = (yield transport.allreduce_(flattened(own), f"{task.name}.q")).mul_(1.0 / n)
            if not all_finite(mean):
                return self._spoiled(task)
            q = [m.view(t.shape) for m, t in zip(torch.split(mean, [t.numel() for t in own]), own, strict=True)]

        out, places = task.place()
        made = places.shaped_views(out)
        if native:
            kept = torch.cat([t.reshape(-1) for t in (q if self.residual == "mean" else own)])
            sent = kept if self.residual == "mean" else torch.cat([t.reshape(-1) for t in q])
            targets = [made[i] for members in batches.values() for i in members]
            native.low_rank_decode_(rows, a, flat_p, sent, kept if task.reversible else None, targets)
        for (shape, members), p_, q_, own_ in zip(batches.items(), p, q, own, strict=True):
            for k, i in enumerate(members):
                s = tables[i]
                if not native:
                    torch.mm(p_[k], q_[k].T, out=made[i].view(shape))
                q_views[i].copy_(q_[k])
                if task.reversible:
                    stays, left = q_[k] if self.residual == "mean" else own_[k], buffer[s.start : s.stop].view(shape)
                    if not native:
                        left.addmm_(p_[k], stays.T, alpha=-1)
                    task.undo_by(partial(left.addmm_, p_[k], stays.T))
        for i, was, now in zip(whole, plain, torch.split(means, [tables[i].numel for i in whole]), strict=True):
            made[i].view(-1).copy_(now)
            left = buffer[tables[i].start : tables[i].stop]
            left.zero_()
            if task.reversible:
                task.undo_by(partial(left.add_, was))
        return out

    def _native(self, buffer: torch.Tensor, segments: Segments, batches: dict[tuple[int, int], list[int]]) -> Native | None:
        """Compiled products, where matrices are thin: they read M as often as there are passes, where a matrix product of many columns computes."""
        if not batches or self.approximation_rank > _THIN:
            return None
        table = tuple(segments.table[i] for members in batches.values() for i in members)
        return native_for(buffer, replace(segments, table=table), "power_sgd")

    @staticmethod
    def _spoiled(task: Task) -> torch.Tensor:
        """Seen by all ranks, in the same sum. Nothing but Q was changed so far."""
        task.finite = False
        return task.result().fill_(float("nan"))

    @staticmethod
    def _draw_missing_(q_views: list[torch.Tensor], task: Task) -> None:
        """Uniform in [-1, 1) where Q is zero: at first, and after a zero gradient. Scaled whole numbers: the same bits on all platforms."""
        q = task.state["q"]
        task.undo_by(partial(q.copy_, q.clone()))
        key = Key(task.ctx.seed, task.ctx.step, None, "q", task.ctx.size)
        filled = torch.stack([view.any() for view in q_views]).tolist() if q_views else []
        for view, s, there in zip(q_views, task.segments, filled, strict=True):
            if view.numel() and not there:
                words = key.words(s, "q").random_raw(view.numel()) >> np.uint64(11)
                view.copy_(torch.from_numpy(words.astype(np.float64) * 2.0**-52 - 1.0).view(view.shape))
