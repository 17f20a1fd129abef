"""Where the parameters are: at x, at a point that the method shifts them to, or at one that they are held at for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from ..errors import CompressionError
from ..verdicts import known
from .bucket import Bucket, add_servers_
from .copies import Averages
from .state import MethodState

__all__ = ["Point", "Points", "check_point"]

Point = Literal["averaged", "virtual", "local"]

_Moved = list[tuple[Bucket, list[torch.Tensor], list[int]]]
"""Of each bucket whose parameters were moved: what they held, and their versions afterwards."""


def check_point(point: str) -> None:
    """Raise `CompressionError` for what is no `Point`."""
    if point not in ("averaged", "virtual", "local"):
        raise CompressionError(f"at(): expected 'averaged', 'virtual' or 'local', got {point!r}.")


class Points:
    """Of the parameters of one record, and of `averages` of them."""

    def __init__(self, state: MethodState, averages: Averages) -> None:
        self._state = state
        self._averages = averages
        self.held = False
        """Inside of `at`."""
        self._moved = False

    @property
    def shifted(self) -> bool:
        """The parameters hold a shifted point now, different on every rank."""
        ours = (b for b in self._state.buckets if b.point is not None and b.written is not None)
        return not self.held and any(b.written_to(contents=False) is None for b in ours)

    def look_at_averages(self) -> None:
        """Before parameters are moved: warn of averages that were taken where they are now, if that is a shifted point."""
        self._averages.look(self.shifted, self._state.method.feedback)

    def check_trainable(self) -> None:
        """Raise `CompressionError` where a step would be lost, as the parameters are elsewhere for the time being."""
        if self._moved:
            raise CompressionError("a training step inside `with compression.at(…):` would be lost; leave the block first.")

    def check_not_held(self, what: str) -> None:
        """Raise `CompressionError` inside of `at`, when `what` is called."""
        if self.held:
            raise CompressionError(f"{what}: leave `with compression.at(…):` first; on leaving, x would be read from shifted parameters.")

    def recapture_all(self, buckets: Sequence[Bucket]) -> None:
        """`recapture` of contents, for which a GPU is waited for once in the usual case."""
        if not known(bucket.is_as_written() for bucket in buckets):
            for bucket in buckets:
                self.recapture(bucket, contents=True)

    def recapture(self, bucket: Bucket, contents: bool = False) -> None:
        """Read x at the first step. Later, what somebody else wrote to shifted parameters cannot be told from the shift: an error.

        `contents`: also what was written without raising a version counter, which takes one pass to see: whenever the parameters are about to be
        overwritten, so that nothing is lost in silence.
        """
        feedback = bucket.method.feedback
        if bucket.point is None:
            return
        if bucket.written is not None:
            name = bucket.written_to(contents)
            if name is None:
                return
            raise CompressionError(
                f"parameter '{name}' was written to while {feedback} held it at a shifted point that differs between ranks. Write to parameters "
                "(clipping, averaging, broadcasting, loading a checkpoint) inside `with compression.at('averaged'):`, which keeps what is "
                "written; when resuming, load the model before the compression's state and broadcast nothing after it."
            )
        self.look_at_averages()  # of what nothing has shifted yet
        with torch.no_grad():
            bucket.capture_()
            bucket.note_written()

    @contextmanager
    def at(self, point: Point, meet: Callable[[str], None]) -> Iterator[None]:
        """Hold the parameters at a point for evaluation or saving; training goes on from where it was. Not nested; no training step inside.

        `averaged`: x, equal on all ranks; values written to the parameters inside are kept, so write the same on all ranks. `virtual`:
        z = x − mean e − E (E: the servers' residual, of exchanges that have one), which needs one dense all-reduce (update-unit methods;
        collective). `local`: where this worker evaluates its gradients. They are the same, and nothing is done, for methods that do not shift the
        model, but for `virtual`, inside of which writes are lost. `meet` is called with what is done before anything is sent.
        """
        state = self._state
        if self.held:
            raise CompressionError("at(): the parameters are held at a point already; leave that block first.")
        if point == "virtual" and state.method.feedback.unit != "update":
            raise CompressionError(
                f"at('virtual') is defined for update-unit methods (EF with local momentum, DEF, SAEF); this one is {state.method.feedback}. "
                "Use at('averaged')."
            )
        if point == "virtual":
            meet("at('virtual')")
        moved: _Moved = []
        if point != "local":  # there they are still shifted
            self.look_at_averages()
        self.held = True
        try:
            with torch.no_grad():
                for bucket in state.buckets if point != "local" else ():
                    self._move_to(point, bucket, moved)
            self._moved = bool(moved)
            yield
            if point != "local":
                self.look_at_averages()  # and say nothing
        finally:
            self.held = self._moved = False
            with torch.no_grad():
                for bucket, saved, versions in moved:
                    if point == "averaged" and (versions != [p._version for p in bucket.parameters] or not _at_x(bucket)):
                        bucket.capture_()
                        bucket.shift_()
                    else:
                        torch._foreach_copy_(list(bucket.parameters), saved)
                        bucket.written = bucket.written and bucket.written.put_back(bucket.parameters)

    def _move_to(self, point: str, bucket: Bucket, moved: _Moved) -> None:
        """Set the bucket's parameters to x or z; note what they held, and their versions afterwards."""
        if bucket.state is None:
            return
        state, x = self._state, bucket.point
        mean_error: torch.Tensor | None = None
        if point == "virtual" and bucket.residual is not None and (x is not None or not bucket.dense):
            mean_error = bucket.residual.clone()
            if bucket.server_residual is not None:
                add_servers_(mean_error, bucket.server_residual, bucket.method.exchange, bucket.segments, state.rank, state.size)
            state.transport.allreduce_(mean_error, f"{bucket.name}.virtual").wait()
            mean_error.div_(state.transport.size)
        if x is not None:
            self.recapture(bucket, contents=True)
        if mean_error is None and x is None:
            return
        saved = [p.detach().clone() for p in bucket.parameters]
        if x is not None:
            torch._foreach_copy_(list(bucket.parameters), bucket.segments.shaped_views(x))
        if mean_error is not None:
            torch._foreach_sub_(list(bucket.parameters), bucket.segments.shaped_views(mean_error))
        moved.append((bucket, saved, [p._version for p in bucket.parameters]))


def _at_x(bucket: Bucket) -> bool:
    """The bucket's parameters hold x."""
    x = bucket.point
    return x is not None and all(torch.equal(p, v.to(p.dtype)) for p, v in zip(bucket.parameters, bucket.segments.shaped_views(x), strict=True))
