"""DoubleSqueeze as it is written: one server for the whole model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..segments import Segments
from .two_pass import TwoPass

__all__ = ["Central"]


@dataclass(frozen=True)
class Central(TwoPass):
    """Rank 0, a worker too, is the server of all parameters; they are not cut in pieces, so C and D see whole parameters on both ways.

    Worker i sends C(v_i) to it; it forms v = mean_i C(v_i) + (η̃_{t-1}/η̃_t)·E, sends D(v) to everybody and keeps E = v − D(v). Arguments as in
    `TwoPass`. For star networks, and where the parameter's own scale, top-k or block is wanted; the server receives n − 1 payloads and sends n − 1
    copies of its answer, where every server of `TwoPass` handles a share 1/n of that. The result equals that of `TwoPass` when C and D work entry by
    entry, or on blocks that divide the pieces. Tang et al. 2019: DoubleSqueeze, algorithm 1.

    State: `server_residual` over whole parameters on rank 0, without elements elsewhere.
    """

    def served(self, segments: Segments, rank: int, size: int) -> Segments:
        return segments if rank == 0 else replace(segments, table=tuple(replace(s, numel=0) for s in segments))
