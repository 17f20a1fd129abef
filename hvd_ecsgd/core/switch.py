"""Another method in the place of the one that a training began with, with what it has held back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import CompressionError
from ..protocols import Role
from .agreement import Agreement
from .bucket import Bucket, add_servers_
from .method import Method
from .points import Points
from .state import MethodState

__all__ = ["switch"]


@torch.no_grad()
def switch(state: MethodState, agreement: Agreement, points: Points, new: Method, meet: Callable[[str], None]) -> None:
    """Go on with `new`'s compressor and exchange. Residuals stay as they are, in their units; a server's residual whose pieces the new exchange
    does not have, or does not use yet (warm-up), goes back to the workers, n-fold to the one that held it, as the mean divides by n. Other
    state of the exchange is kept if it fits.

    Collective after the first step, and `meet` is called then before anything is sent. Nothing is changed when `CompressionError`, or on every rank
    `DisagreementError`, is raised.
    """
    for bucket in state.buckets:
        if bucket.state is not None:
            points.recapture(bucket, contents=True)
    old, n = state.method, state.size
    method = old.switched(new)
    allocated = [b for b in state.buckets if not b.dense and b.state is not None]
    ranks = range(n)
    compresses = state.step >= method.warmup_steps  # else nobody would ask the servers, nor carry their residuals from one η to the next
    kept = {
        b.name: compresses
        and [old.exchange.state_segments(b.segments, r, n) for r in ranks] == [method.exchange.state_segments(b.segments, r, n) for r in ranks]
        for b in allocated
    }
    if old.server_slot and Role.RESIDUAL not in method.slot_names and not (method.server_slot and all(kept.values())):
        raise CompressionError(
            f"switch(): the servers' residuals have no place in {method.exchange} with {method.feedback}; switch to a method with feedback."
        )
    if agreement.first_step_pending:  # this is a setting like others, compared at the first step
        state.method = method
    else:
        meet("switch")
        state.method = method
        try:
            agreement.compare_texts("switch")
        except BaseException:
            state.method = old
            raise
    if not old.stateful:
        state.form_for_other_method()
    for bucket in state.buckets:
        bucket.method = method.dense() if bucket.dense else method
    for bucket in (b for b in state.buckets if not b.dense and b.state is not None):
        carry_over(state, bucket, old, kept[bucket.name])


def carry_over(state: MethodState, bucket: Bucket, old: Method, same_pieces: bool) -> None:
    """State of the bucket's method, from that of `old`, which it was left by."""
    before, feedback = bucket.exchange_state, bucket.method.feedback
    assert before is not None and bucket.state is not None
    if feedback != old.feedback:
        bucket.state = bucket.new_state()
    after = bucket.new_exchange_state(state.rank, state.size)
    for slot, value in before.items():
        if same_pieces and slot in after and after[slot].shape == value.shape:
            after[slot] = value
        elif slot == old.server_slot:
            assert bucket.residual is not None
            bucket.residual_is_zero = False
            add_servers_(bucket.residual, value, old.exchange, bucket.segments, state.rank, state.size)
    bucket.exchange_state = after
    bucket.shift_()
