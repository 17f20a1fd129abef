"""A record among fewer workers, as some are gone: those that live keep what they have, and what servers keep is cut anew among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..errors import CompressionError
from ..segments import Segments
from ..transport.base import Transport
from .bucket import Bucket
from .method import Method
from .state import MethodState

__all__ = ["check_survives", "prepare_fewer"]


def check_survives(method: Method) -> None:
    """Raise `CompressionError` for a method that cannot go on among fewer workers: one whose state depends on how many there are in a way that is
    not known here, or that sends something between steps, where none is taken again."""
    feedback, why = method.feedback, ""
    if not getattr(method.exchange, "survives", False):
        why = f"what {method.exchange} keeps belongs to a number of workers"
    elif not getattr(feedback, "survives", False):
        why = f"{feedback} moves parameters on each worker elsewhere, or sends something between steps"
    if why:
        raise CompressionError(
            f"MPI_BACKEND_ON_FAILURE=shrink: this method cannot go on without a worker that dies, as {why}. Use one that exchanges by AllReduce, "
            "AllGather or TwoPass and does not shift the model (top_k, random_block, one_bit, double_squeeze, local_momentum, …), or unset the "
            "variable and let a job that has lost a worker begin again from its checkpoint."
        )


@torch.no_grad()
def prepare_fewer(state: MethodState, transport: Transport) -> Callable[[], None]:
    """Make ready for the workers of `transport`, which are those of `state` that live; no step is under way. Collective among them.

    Returned is what changes the record, and sends nothing. Worker residuals and momentum stay as they are. What a server keeps of its pieces is put
    together and cut in new pieces, without arithmetic; zeros are in the place of what those that are gone have kept. Costs a dense all-reduce of
    what servers keep, once.
    """
    cut: list[tuple[Bucket, str, torch.Tensor]] = []
    for bucket in state.buckets:
        if (slot := bucket.method.server_slot) is None:
            continue
        bucket.allocate(state.rank, state.size)
        assert bucket.exchange_state is not None
        exchange, segments = bucket.method.exchange, bucket.segments
        kept = bucket.exchange_state[slot]
        whole = torch.zeros(segments.numel, dtype=kept.dtype, device=kept.device)
        for place, piece in _places(exchange.state_segments(segments, state.rank, state.size), segments):
            whole[place].copy_(kept[piece])
        transport.allreduce_(whole, f"fewer.{bucket.name}").wait()
        now = bucket.new_exchange_state(transport.rank, transport.size)[slot]
        for place, piece in _places(exchange.state_segments(segments, transport.rank, transport.size), segments):
            now[piece].copy_(whole[place])
        cut.append((bucket, slot, now))

    def commit() -> None:
        for bucket, slot, now in cut:
            assert bucket.exchange_state is not None
            bucket.exchange_state[slot] = now
        for bucket in state.buckets:
            bucket.before = []
        state.rank, state.size, state.process = transport.rank, transport.size, transport.rank

    return commit


def _places(pieces: Segments, segments: Segments) -> Iterator[tuple[slice, slice]]:
    """Where each piece lies in a buffer of the whole segments, and in one of the pieces."""
    for segment, piece in zip(segments, pieces, strict=True):
        start = segment.start + piece.offset - segment.offset
        yield slice(start, start + piece.numel), slice(piece.start, piece.stop)
